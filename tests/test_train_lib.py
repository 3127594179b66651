# SPDX-License-Identifier: Apache-2.0
"""The promise: what is computed depends on hyperparameters and seed, and on nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_lib
from tests.harness import (
    TinyBottleneck,
    assert_close,
    differences,
    distance,
    is_same,
    plan_for,
    resolve,
    train,
    train_fp64,
)
from workloads.resnet.task import ImageClassification

BATCH, SPAN = 32, 4
# (devices, per-device batch); accumulation fills the rest of the batch.
TOPOLOGIES = [(1, BATCH), (1, SPAN), (2, 8), (2, 16), (4, 4), (8, 4)]


def tiny(digits_dir, **overrides):
    # At this rate a ReLU that changes sides (see train_fp64) moves all weights together by 2e-7 of
    # their size, at the recipe's by 2e-5; without one they differ by 6e-9.
    shape = {'global_batch_size': BATCH, 'bn_span': SPAN, 'learning_rate': 0.1, 'seed': 3}
    return resolve('digits', digits_dir, **(shape | overrides))


def photographs(first, last):
    """Noise with structure, at 32×32, by position."""
    labels = np.arange(first, last) % 10
    rng = [np.random.default_rng(position) for position in range(first, last)]
    noise = np.stack([r.integers(0, 128, (32, 32, 3)) for r in rng])
    return {
        'image': (noise + 12 * labels[:, None, None, None]).astype(np.uint8),
        'label': labels.astype(np.int32),
    }


def joined(trained):
    return np.concatenate([batch['image'] for batch in trained.batches])


@pytest.fixture(scope='module')
def on_one_device(digits_dir):
    return train(tiny(digits_dir))


@pytest.mark.parametrize(
    ('devices', 'per_device_batch'),
    [
        pytest.param(*topology, marks=[pytest.mark.slow] if topology in TOPOLOGIES[3:5] else [])
        for topology in TOPOLOGIES[1:]
    ],
)
def test_digits_do_not_depend_on_topology(digits_dir, on_one_device, devices, per_device_batch):
    config = tiny(digits_dir, per_device_batch=per_device_batch)
    other = train(config, devices=devices)
    assert joined(other).tobytes() == joined(on_one_device).tobytes()
    # Over all weights together: see train_fp64, and the test below.
    for part in ('params', 'batch_stats'):
        apart = distance(on_one_device.state.variables[part], other.state.variables[part])
        assert apart <= 1e-5
    assert int(other.state.step) == 10


@pytest.mark.slow
@pytest.mark.parametrize(('task_type', 'size'), [(ImageClassification, 8), (TinyBottleneck, 32)])
def test_in_fp64_every_array_is_the_same_on_all_topologies(digits_dir, task_type, size):
    steps = 10
    config = dataclasses.replace(tiny(digits_dir, image_size=size), dtype='float64')
    images = photographs(0, steps * BATCH)
    images['image'] = images['image'][:, :size, :size]
    trained = []
    for devices, per_device_batch in [(1, BATCH), (1, SPAN), (8, SPAN)]:
        config = dataclasses.replace(config, per_device_batch=per_device_batch)
        plan = plan_for(config, num_train=4096, num_devices=devices)
        firsts = range(0, steps * BATCH, plan.micro_batch)
        micro_batches = [
            {k: v[i : i + plan.micro_batch] for k, v in images.items()} for i in firsts
        ]
        trained.append(train_fp64(config, plan, micro_batches, task_type)[2])
    first, *others = trained
    for other in others:
        assert_close(first, other, 1e-12)


def test_the_span_is_not_the_hardware(digits_dir, on_one_device):
    other = train(tiny(digits_dir, bn_span=16))
    assert max(differences(on_one_device.state.variables, other.state.variables).values()) > 1e-3


def test_same_seed_is_bitwise_equal_and_another_seed_is_not(digits_dir, on_one_device):
    again = train(tiny(digits_dir))
    assert is_same(again.state, on_one_device.state)
    assert is_same(again.metrics, on_one_device.metrics)
    assert is_same(again.batches, on_one_device.batches)
    other = train(tiny(digits_dir, seed=4))
    assert (
        max(differences(other.state.variables['params'], again.state.variables['params']).values())
        > 0.1
    )
    assert joined(other).tobytes() != joined(again).tobytes()


def test_every_bit_of_the_seed_counts():
    keys = [train_lib.init_key(seed) for seed in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_parameters_and_statistics_stay_fp32(digits_dir, dtype):
    trained = train(tiny(digits_dir, dtype=dtype), steps=2)
    floating = [x for x in jax.tree.leaves(trained.state) if np.issubdtype(x.dtype, np.floating)]
    assert floating
    assert {x.dtype for x in floating} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_does_not_depend_on_topology(digits_dir, dtype):
    one = train(tiny(digits_dir, dtype=dtype))
    other = train(tiny(digits_dir, dtype=dtype, per_device_batch=4), devices=4)
    # Over all weights together: a bias that is still near zero has few bits that are right.
    quarter_of_the_last_bit = float(jnp.finfo(dtype).eps) / 4
    for part in ('params', 'batch_stats'):
        apart = distance(one.state.variables[part], other.state.variables[part])
        assert apart <= quarter_of_the_last_bit


@pytest.mark.slow
def test_float16_retries_an_overflow_with_a_smaller_scale_and_loses_no_batch(
    digits_dir, monkeypatch
):
    config = tiny(digits_dir, dtype='float16')
    gentle = train(config, steps=3)
    monkeypatch.setattr(train_lib, 'INITIAL_LOSS_SCALE', 2.0**24)
    wild = train(config, steps=3)
    scales = [float(metrics['loss_scale']) for metrics in wild.metrics]
    assert scales[0] < 2.0**24
    assert all(metrics['finite'] for metrics in wild.metrics)
    assert int(wild.state.step) == 3
    assert is_same(gentle.batches, wild.batches)
    assert_close(gentle.state.variables, wild.state.variables, 1e-2)


@pytest.mark.slow
def test_float16_scale_grows_again(digits_dir, monkeypatch):
    monkeypatch.setattr(train_lib, 'STEPS_TO_DOUBLE_LOSS_SCALE', 4)
    trained = train(tiny(digits_dir, dtype='float16', per_device_batch=16), steps=5)
    scales = [float(metrics['loss_scale']) for metrics in trained.metrics]
    start = train_lib.INITIAL_LOSS_SCALE
    assert scales == [start] * 7 + [2 * start] * 3  # Two micro-steps a step; doubled after four.


def test_a_loss_that_is_not_finite_moves_no_weight(digits_dir):
    class Broken(TinyBottleneck):
        def train_loss(self, variables, batch):
            loss, aux = super().train_loss(variables, batch)
            return loss * jnp.nan, aux

    config = tiny(digits_dir, image_size=32)
    start = train(config, steps=0, task_type=Broken, batches=photographs).state.variables
    broken = train(config, steps=1, task_type=Broken, batches=photographs)
    assert not broken.metrics[0]['finite']
    assert is_same(broken.state.variables, start)
