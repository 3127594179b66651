# SPDX-License-Identifier: Apache-2.0
"""Training a small Llama: the same bits on any number of devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import accumulation
import exact_sums
import fingerprints
import train_lib
from models.llama.architectures import Architecture
from settings.errors import ConfigError
from tests.workloads.llama31_8b.configurations import configure
from training import compilation, metrics
from training.workload import check_split
from workloads.llama31_8b import optimizers
from workloads.llama31_8b.task import LanguageModelling

SMALL = Architecture(2, 64, 160, 8, 2, 8, 512)
LENGTH, BATCH, STEPS = 64, 8, 4
CONFIG = configure(
    division='open', learning_rate=5e-3, end_learning_rate=5e-4, warmup_steps=2, max_steps=600,
    decay_steps=598,
)  # fmt: skip


def batch_of(step, length=LENGTH):
    tokens = np.random.default_rng([11, step]).integers(0, SMALL.vocabulary, (BATCH, length + 1))
    return {'tokens': tokens.astype(np.int32), 'is_real': np.ones(BATCH, bool)}


@functools.cache
def trained(devices, dtype, architecture=SMALL, length=LENGTH, steps=STEPS):
    """(fingerprint, losses) after some steps of micro-batches of one sequence."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (train_lib.AXIS,))
    accumulation_steps = BATCH // devices
    transformation, schedule = optimizers.create(CONFIG)
    task = LanguageModelling(architecture, length, dtype)
    optimizer = accumulation.accumulated(transformation, accumulation_steps, BATCH, task.split)
    model = train_lib.Model(task, optimizer, schedule, BATCH)
    step_of = compilation.trace_train(model, 1, mesh).lower().compile()
    state = compilation.initial_state(5, model, mesh)
    losses = []
    for step in range(steps):
        batch, micro = batch_of(step, length), []
        for i in range(accumulation_steps):
            part = {n: x[i * devices : (i + 1) * devices] for n, x in batch.items()}
            state, values = step_of(state, compilation.split(mesh, part))
            micro.append(jax.device_get(values))
        losses.append(metrics.measured(micro, BATCH)['loss'])
    assert int(state.step) == steps
    mark = compilation.compile_fingerprints(model, mesh)(train_lib.to_saved(state))
    return fingerprints.shown(mark), losses


# experiments/topologies.py has both dtypes on all numbers of devices.
@pytest.mark.parametrize(
    ('dtype', 'devices'), [('float32', 8), pytest.param('bfloat16', 4, marks=pytest.mark.slow)]
)
def test_training_does_not_depend_on_the_number_of_devices(dtype, devices):
    assert trained(1, dtype) == trained(devices, dtype)


def test_every_device_has_its_part_of_every_matrix():
    task = LanguageModelling(SMALL, LENGTH, 'float32')
    variables = train_lib.initial_variables(jax.random.key(0), task=task)
    mesh = Mesh(np.array(jax.devices()[:4]), (train_lib.AXIS,))
    for name, x in exact_sums.named(compilation.place(mesh, variables, task.split)):
        (part,) = {shard.data.size for shard in x.addressable_shards}
        assert part == (x.size if name.endswith(('scale', 'norm')) else x.size / 4), name


def test_devices_that_do_not_divide_the_width_are_rejected():
    task = LanguageModelling(SMALL, LENGTH, 'float32')
    check_split(task, 4)
    with pytest.raises(ConfigError, match='cannot be split over 5 devices: take .* divides 64'):
        check_split(task, 5)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_the_first_loss_is_of_equal_probabilities(dtype):
    _, losses = trained(1, dtype)
    assert abs(losses[0] - np.log(SMALL.vocabulary)) < 0.1
    assert len(set(losses)) == STEPS


def test_padding_counts_for_nothing():
    task = LanguageModelling(SMALL, LENGTH, 'float32')
    variables, batch = train_lib.initial_variables(jax.random.key(0), task=task), batch_of(0)
    evaluate = jax.jit(task.evaluate)
    whole = evaluate(variables, batch)
    batch['is_real'][5:] = False
    batch['tokens'][5:] = 0
    part = evaluate(variables, batch)
    np.testing.assert_array_equal(part['loss'][:5], whole['loss'][:5])
    assert not part['loss'][5:].any()
    sums = {'loss': float(part['loss'].sum()), 'examples': int(part['examples'].sum())}
    found = task.quality(sums)['eval_loss']
    assert found == pytest.approx(float(whole['loss'][:5].mean()), rel=1e-6)
