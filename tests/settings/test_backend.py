# SPDX-License-Identifier: Apache-2.0
"""Sums on a CPU are right, and the same every time."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from settings import backend

ROOT = Path(__file__).parents[2]


def test_sums_are_right():
    """All partial sums are whole numbers below 2^24, which fp32 holds exactly."""
    total = jax.jit(lambda x: jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024))))
    assert {float(total(jnp.ones((1024, 1)))) for _ in range(10)} == {2.0 * 1024 * 1024}


def test_sums_of_products_are_right():
    """f(i) = i²; of https://github.com/jax-ml/jax/issues/39103."""
    rows = jnp.stack([jnp.arange(32_769.0), jnp.zeros(32_769), jnp.zeros(32_769)], axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    assert float(squares[-1]) == 32_768.0**2


@pytest.fixture
def environ(monkeypatch):
    """An environment of the test's own."""
    monkeypatch.setattr(os, 'environ', {})
    return os.environ


def test_a_deterministic_run_takes_kernels_that_repeat(environ):
    backend.prepare(False, 8)
    assert not set(backend.DETERMINISTIC_GPU_FLAGS) & set(environ['XLA_FLAGS'].split())
    backend.prepare(True, 8)
    assert set(backend.DETERMINISTIC_GPU_FLAGS) <= set(environ['XLA_FLAGS'].split())
    assert environ['NVIDIA_TF32_OVERRIDE'] == '0'


@pytest.mark.parametrize(('micro_batches', 'devices'), [(8, 8), (64, 8), (12, 6), (7, 7), (1, 1)])
def test_micro_batches_are_spread_over_cpu_devices(environ, micro_batches, devices):
    backend.prepare(True, micro_batches)
    assert environ['JAX_NUM_CPU_DEVICES'] == str(devices)
    backend.prepare(True, 5)
    assert environ['JAX_NUM_CPU_DEVICES'] == str(devices)


# Sums of these gradients of kernels are split among threads; which, and how, caches decide, too.
CONVOLUTION = """
from settings import backend
backend.configure()
import hashlib, jax, numpy as np
def convolved(x, w):
    how = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=how)
def gradient(x, w, g):
    return jax.vjp(convolved, x, w)[1](g)[1]
w = np.zeros((3, 3, 16, 16), np.float32)
for size in (8, 16, 32):
    shape = (16, size, size, 16)
    x, g = (np.random.default_rng(i).standard_normal(shape, np.float32) for i in (0, 1))
    print(hashlib.sha256(np.asarray(jax.jit(gradient)(x, w, g)).tobytes()).hexdigest())
"""


def test_the_number_of_cores_and_devices_does_not_change_a_bit():
    """On one core, on all, and with two devices; without the setting, 1 and 8 threads differ."""

    def digest(program, *wrapper, **variables):
        return subprocess.run(
            [*wrapper, sys.executable, '-c', program],
            cwd=ROOT, env=os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': '.'} | variables,
            text=True, capture_output=True, check=True,
        ).stdout  # fmt: skip

    one_core = ('taskset', '-c', str(min(os.sched_getaffinity(0))))
    assert digest(CONVOLUTION, *one_core) == digest(CONVOLUTION, JAX_NUM_CPU_DEVICES='2')
    without = CONVOLUTION.replace('backend.configure()', '')
    assert digest(without, NPROC='1') != digest(without, NPROC='8')


def test_flags_are_added_once(environ):
    environ['XLA_FLAGS'] = '--xla_dump_to=somewhere'
    backend.configure('--xla_gpu_autotune_level=0')
    backend.configure('--xla_gpu_autotune_level=0')
    flags = ['--xla_dump_to=somewhere', *backend.CPU_FLAGS, '--xla_gpu_autotune_level=0']
    assert environ['XLA_FLAGS'].split() == flags
