# SPDX-License-Identifier: Apache-2.0
"""The promise: what is computed depends on hyperparameters and seed, and on nothing else."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import accumulation
import exact_sums
import loss_scaling
import train_lib
from tests.harness import (
    OneBlock,
    TinyBottleneck,
    assert_close,
    differences,
    distance,
    is_same,
    model_for,
    photographs,
    plan_for,
    resolve,
    train,
)
from training import compilation, metrics
from workloads.resnet.task import ImageClassification

BATCH, SPAN = 32, 4


def tiny(digits_dir, **overrides):
    """At the recipe's own rate, at which training amplifies any difference within some steps."""
    shape = {'global_batch_size': BATCH, 'micro_batch_size': SPAN, 'bn_span': SPAN, 'seed': 3}
    return resolve('digits', digits_dir, **(shape | overrides))


def joined(trained):
    return np.concatenate([batch['image'] for batch in trained.batches])


def assert_same(a, b):
    """Two trainings, on whatever devices, agree in every bit of batches, metrics and state."""
    assert joined(a).tobytes() == joined(b).tobytes()
    assert a.measured() == b.measured()
    assert is_same(train_lib.to_saved(a.state), train_lib.to_saved(b.state))


def train_digits(digits_dir, *, seed=3, steps=10, devices=1, **overrides):
    config = tiny(digits_dir, seed=seed, **overrides)
    return train(config, devices=devices, steps=steps, task_type=OneBlock)


@pytest.fixture(scope='module')
def on_one_device(digits_dir):
    return train_digits(digits_dir)


@pytest.mark.parametrize('devices', [*(pytest.param(d, marks=pytest.mark.slow) for d in (2, 4)), 8])
def test_digits_do_not_depend_on_the_number_of_devices(digits_dir, on_one_device, devices):
    assert_same(train_digits(digits_dir, devices=devices), on_one_device)
    assert int(on_one_device.state.step) == 10


def test_half_precision_does_not_depend_on_the_number_of_devices(digits_dir):
    one, two = (train_digits(digits_dir, dtype='bfloat16', devices=d, steps=4) for d in (1, 2))
    assert_same(one, two)


# Every optimizer and dtype; experiments/topologies.py has all pairs on all numbers of devices.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('optimizer', 'dtype', 'devices'),
    [('sgd', 'bfloat16', 2), ('lars', 'float32', 8), ('lars', 'float16', 4)],
)
def test_bottlenecks_do_not_depend_on_the_number_of_devices(digits_dir, optimizer, dtype, devices):
    recipe = {'optimizer': optimizer, 'dtype': dtype, 'image_size': 32, 'warmup_epochs': 0}
    config = tiny(digits_dir, **recipe, learning_rate=8.0 if optimizer == 'lars' else 0.1)
    one, several = (
        train(config, devices=d, steps=4, task_type=TinyBottleneck, batches=photographs)
        for d in (1, devices)
    )
    assert_same(one, several)


def test_another_micro_batch_is_the_same_mathematics(digits_dir, on_one_device):
    whole = train_digits(digits_dir, micro_batch_size=BATCH, steps=1)
    parts = train_digits(digits_dir, steps=1)
    assert not is_same(whole.state.variables, parts.state.variables)
    assert distance(whole.state.variables, parts.state.variables) <= 1e-6


def test_same_seed_is_bitwise_equal_and_another_seed_is_not(digits_dir, on_one_device):
    again = train_digits(digits_dir)
    assert is_same(again.state, on_one_device.state)
    assert is_same(again.metrics, on_one_device.metrics)
    assert is_same(again.batches, on_one_device.batches)
    other = train_digits(digits_dir, seed=4)
    assert (
        max(differences(other.state.variables['params'], again.state.variables['params']).values())
        > 0.1
    )
    assert joined(other).tobytes() != joined(again).tobytes()


def test_every_bit_of_the_seed_counts():
    keys = [
        train_lib.init_key(*divmod(seed, 2**32)) for seed in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1)
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_parameters_and_statistics_stay_fp32(digits_dir, dtype):
    config = tiny(digits_dir, dtype=dtype)
    model = model_for(config, plan_for(config, num_train=1437), ImageClassification(config, 10))
    mesh = Mesh(np.array(jax.devices()[:1]), (train_lib.AXIS,))
    state, _ = compilation.trace_train(model, SPAN, mesh).out_info
    floating = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating)]
    assert floating
    assert {x.dtype for x in floating} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_float16_retries_an_overflow_with_a_smaller_scale_and_loses_no_batch(
    digits_dir, monkeypatch
):
    config = tiny(digits_dir, dtype='float16', learning_rate=0.1)
    gentle = train(config, steps=3, task_type=OneBlock)
    monkeypatch.setattr(loss_scaling, 'INITIAL_LOSS_SCALE', 2.0**26)
    wild = train(config, steps=3, task_type=OneBlock)
    assert wild.measured()[0]['loss_scale'] < 2.0**26
    assert int(wild.state.step) == 3
    assert is_same(gentle.batches, wild.batches)
    assert_close(gentle.state.variables, wild.state.variables, 1e-2)


@pytest.mark.slow
def test_float16_scale_grows_again(digits_dir, monkeypatch):
    monkeypatch.setattr(loss_scaling, 'STEPS_TO_DOUBLE_LOSS_SCALE', 4)
    config = tiny(digits_dir, dtype='float16', micro_batch_size=16, learning_rate=0.1)
    trained = train(config, steps=5, task_type=OneBlock)
    scales = [float(metrics['loss_scale']) for metrics in trained.metrics]
    start = loss_scaling.INITIAL_LOSS_SCALE
    assert scales == [start] * 7 + [2 * start] * 3  # Two micro-steps a step; doubled after four.


class Broken(OneBlock):
    """Its gradient is multiplied by `factor` where a batch has the label 7 in its first place."""

    factor = jnp.nan

    def train_loss(self, variables, batch):
        loss, (metrics, statistics) = super().train_loss(variables, batch)
        loss = loss * jnp.where(batch['label'][0] == 7, self.factor, 1.0)
        return loss, (metrics, statistics)


class Loud(Broken):
    """In float16 the gradient overflows there at first."""

    factor = 4096.0


class OutOfRange(Broken):
    """Finite, and more than can be added up."""

    factor = 1e9


def one_seven(first, last):
    """No label is 7 but that of position 52: of the second step the sixth micro-batch of SPAN."""
    batch = photographs(first, last)
    batch['label'] = np.where(np.arange(first, last) == 52, 7, batch['label'] % 7).astype(np.int32)
    return batch


@pytest.mark.parametrize(
    ('task_type', 'devices'),
    [
        (Broken, 1),
        (OutOfRange, 2),
        *(
            pytest.param(task_type, devices, marks=pytest.mark.slow)
            for task_type, devices in ((Broken, 2), (OutOfRange, 1))
        ),
    ],
)
def test_a_gradient_that_cannot_be_added_up_stops_everything(digits_dir, task_type, devices):
    """In whichever micro-step it is found: of the state nothing moves, then or later."""
    how = {'devices': devices, 'task_type': task_type, 'batches': one_seven}
    config = tiny(digits_dir, image_size=32)
    before, after = train(config, steps=1, **how), train(config, steps=4, **how)
    assert is_same(train_lib.to_saved(before.state), train_lib.to_saved(after.state))
    assert not before.state.rejected.any()
    found = [bool(metrics['rejected'].any()) for metrics in after.metrics]
    assert found.index(True) == (BATCH + 20) // SPAN // devices
    assert all(found[found.index(True) :])
    names = metrics.rejected_names(after.state.variables, after.state.rejected)
    assert all(name.startswith('gradient of ') for name in names)
    assert names


@pytest.mark.slow
def test_float16_scale_is_that_of_the_micro_batch_that_needs_the_smallest(digits_dir):
    config = tiny(digits_dir, dtype='float16', image_size=32, learning_rate=0.1)
    one, several = (
        train(config, steps=3, devices=devices, task_type=Loud, batches=one_seven)
        for devices in (1, 4)
    )
    first, second, third = (metrics['loss_scale'] for metrics in one.measured())
    assert first == loss_scaling.INITIAL_LOSS_SCALE > second == third
    assert_same(one, several)


@dataclasses.dataclass(frozen=True)
class InParts:
    """A task of four arrays, two of them split, whose gradient is a number; of one a NaN."""

    bad: str
    dtype = 'float32'
    split = types.MappingProxyType({'params/b': 0, 'params/d': 1})

    def abstract_batch(self, examples):
        return {'x': jax.ShapeDtypeStruct((examples,), np.float32)}

    def init(self, key):
        del key
        shapes = {'a': (3,), 'b': (8, 2), 'c': (5,), 'd': (2, 4)}
        return {'params': {name: jnp.ones(shape) for name, shape in shapes.items()}}

    def gradient(self, variables, batch, scale, form):
        del variables
        gradient = self.init(None)['params']
        for name, array in gradient.items():
            array = array * batch['x'].mean() * scale
            array = array * jnp.nan if name == self.bad else array
            dimension = self.split.get(f'params/{name}')
            if dimension is not None:
                array = exact_sums.psum_scatter(array, form, train_lib.AXIS, dimension)
            gradient[name] = array
        return {'params': gradient}, {'loss': batch['x'].mean()}


@pytest.mark.parametrize('bad', ['', 'a', 'b', 'c', 'd'])
def test_split_arrays_move_like_whole_ones_and_what_is_not_finite_is_named(bad):
    task, mesh = InParts(bad), Mesh(np.array(jax.devices()[:2]), (train_lib.AXIS,))
    optimizer = accumulation.accumulated(optax.sgd(1.0), 1, 4, task.split)
    model = train_lib.Model(task, optimizer, lambda step: 1.0, 4)
    state = compilation.initial_state(0, model, mesh)
    batch = compilation.split(mesh, {'x': np.arange(4, dtype=np.float32)})
    after, _ = compilation.trace_train(model, 2, mesh).lower().compile()(state, batch)
    names = metrics.rejected_names(after.variables, jax.device_get(after.rejected))
    assert names == ([f'gradient of {bad}'] if bad else [])
    # Of four micro-batches two are here, with means of 0.5 and 2.5.
    expected = 1.0 if bad else 1.0 - (0.5 + 2.5) / 4
    for name, x in after.variables['params'].items():
        np.testing.assert_array_equal(x, np.full(x.shape, expected), err_msg=name)
