# SPDX-License-Identifier: Apache-2.0
"""Sums on a CPU are right, and the same every time."""

import os

import jax
import jax.numpy as jnp

from settings import backend


def test_sums_are_right():
    """All partial sums are whole numbers below 2^24, which fp32 holds exactly."""
    total = jax.jit(lambda x: jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024))))
    assert {float(total(jnp.ones((1024, 1)))) for _ in range(10)} == {2.0 * 1024 * 1024}


def test_sums_of_products_are_right():
    """f(i) = i²; of https://github.com/jax-ml/jax/issues/39103."""
    rows = jnp.stack([jnp.arange(32_769.0), jnp.zeros(32_769), jnp.zeros(32_769)], axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    assert float(squares[-1]) == 32_768.0**2


def test_a_deterministic_run_takes_kernels_that_repeat(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.delenv('NVIDIA_TF32_OVERRIDE', raising=False)
    backend.prepare(deterministic=False)
    assert not set(backend.DETERMINISTIC_GPU_FLAGS) & set(os.environ['XLA_FLAGS'].split())
    backend.prepare(deterministic=True)
    assert set(backend.DETERMINISTIC_GPU_FLAGS) <= set(os.environ['XLA_FLAGS'].split())
    assert os.environ['NVIDIA_TF32_OVERRIDE'] == '0'


def test_flags_are_added_once(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=somewhere')
    backend.configure('--xla_gpu_autotune_level=0')
    backend.configure('--xla_gpu_autotune_level=0')
    flags = ['--xla_dump_to=somewhere', *backend.CPU_FLAGS, '--xla_gpu_autotune_level=0']
    assert os.environ['XLA_FLAGS'].split() == flags
