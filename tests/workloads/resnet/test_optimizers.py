# SPDX-License-Identifier: Apache-2.0
"""LARS, SGD and the schedule against values that the official reference computed."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import accumulation
from exact_sums import FixedPoint
from tests import harness
from workloads.resnet import optimizers

GOLDEN = Path(__file__).parents[2] / 'golden'
# The official names of the golden arrays, and ours.
NAMES = {
    'conv1/kernel': ('conv1', 'kernel'),
    'bn_conv1/gamma': ('bn1', 'scale'),
    'bn_conv1/beta': ('bn1', 'bias'),
    'fc1000/kernel': ('fc', 'kernel'),
    'fc1000/bias': ('fc', 'bias'),
}


def golden_tree(arrays, prefix):
    tree: dict = {}
    for theirs, (module, leaf) in NAMES.items():
        tree.setdefault(module, {})[leaf] = jnp.asarray(arrays[f'{prefix}/{theirs}'])
    return tree


def test_lars_equals_the_official_implementation():
    arrays = np.load(GOLDEN / 'lars.npz')
    transform = optimizers.lars(lambda t: 0.5 + 0.25 * t, 0.9, 2e-4, 0.0)
    weights = golden_tree(arrays, 'w0')
    state = transform.init(weights)
    for t in range(4):
        updates, state = transform.update(golden_tree(arrays, f'g{t}'), state, weights)
        weights = optax.apply_updates(weights, updates)
    for ours, theirs in zip(
        jax.tree.leaves(weights), jax.tree.leaves(golden_tree(arrays, 'w4')), strict=True
    ):
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_lars_ratio_is_one_where_a_norm_is_zero():
    weights = {'a': {'kernel': jnp.zeros((2, 2))}, 'b': {'kernel': jnp.ones((2, 2))}}
    gradient = {'a': {'kernel': jnp.ones((2, 2))}, 'b': {'kernel': jnp.zeros((2, 2))}}
    transform = optimizers.lars(lambda t: 0.5, 0.9, 2e-4, 0.0)
    updates, _ = transform.update(gradient, transform.init(weights), weights)
    np.testing.assert_allclose(updates['a']['kernel'], -0.5)
    np.testing.assert_allclose(updates['b']['kernel'], -0.5 * 2e-4)


def schedule_of(warmup_steps, **fields):
    """The schedule with a warm-up of so many steps: an epoch is one step here."""
    config = dataclasses.replace(
        harness.resolve('digits', 'unused'), warmup_epochs=warmup_steps, **fields
    )
    assert optimizers.warmup_steps(config, config.global_batch_size) == warmup_steps
    return optimizers.learning_rate_schedule(config, config.global_batch_size)


@pytest.mark.parametrize('name', ['bs4096', 'bs1632'])
def test_schedule_equals_the_official_one(name):
    # Made with steps per epoch rounded up, as `warmup_steps` has them; the official default rounds
    # down (tests/golden/README.md).
    golden = json.loads((GOLDEN / 'lr_schedule.json').read_text())[name]
    schedule = schedule_of(
        golden['warmup_steps'],
        decay_steps=golden['decay_steps'],
        learning_rate=golden['base_learning_rate'],
        end_learning_rate=golden['end_learning_rate'],
        decay_power=golden['power'],
    )
    for step, rate in golden['values'].items():
        # 1e-6 of the base rate: the official values are themselves float32 results.
        assert abs(float(schedule(int(step))) - rate) <= 1e-6 * golden['base_learning_rate']
        if rate > 1e-3:
            assert float(schedule(int(step))) == pytest.approx(rate, rel=1e-6)


def test_schedule_without_warmup_or_decay():
    schedule = schedule_of(0, decay_steps=10, learning_rate=2.0)
    assert float(schedule(0)) == pytest.approx(2.0)
    assert float(schedule(1000)) == pytest.approx(1e-4)
    schedule = schedule_of(4, decay_steps=0, learning_rate=2.0)
    assert float(schedule(4)) == pytest.approx(2.0)
    assert float(schedule(5)) == pytest.approx(1e-4)


def test_sgd_is_its_equation():
    rng = np.random.default_rng(0)
    weights = {
        'bn1': {'scale': rng.normal(size=3), 'bias': rng.normal(size=3)},
        'fc': {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)},
    }
    rates, momentum, decay = [0.3, 0.2, 0.1], 0.9, 1e-2
    transform = optimizers.sgd(lambda t: jnp.asarray(rates)[t], momentum, decay)
    ours, state = jax.tree.map(jnp.asarray, weights), None
    state = transform.init(ours)
    theirs = {path: weights[path[0]][path[1]] for path in NAMES.values() if path[0] in weights}
    velocity = {path: np.zeros_like(w) for path, w in theirs.items()}
    for rate in rates:
        gradient = jax.tree.map(lambda w: rng.normal(size=w.shape), weights)
        updates, state = transform.update(jax.tree.map(jnp.asarray, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, w in theirs.items():
            penalty = 0.0 if path[0] == 'bn1' else 2 * decay * w
            g = gradient[path[0]][path[1]]
            velocity[path] = momentum * velocity[path] - rate * (g + penalty)
            theirs[path] = w + velocity[path]
    for path, w in theirs.items():
        np.testing.assert_allclose(ours[path[0]][path[1]], w, rtol=1e-5)


def test_running_statistics_move_once_by_the_average():
    config = harness.resolve('digits', 'unused', optimizer='sgd', learning_rate=0.1)
    plan = harness.plan_for(config, num_train=1437)
    transform = accumulation.accumulated(optimizers.create(config, plan).transformation, 4, 4)
    running = {'bn1': {'mean': jnp.array([1.0, 2.0])}}
    variables = {'params': {'fc': {'kernel': jnp.ones((1, 1))}}, 'batch_stats': running}
    state = transform.init(variables)
    batch_means = [jnp.array([float(i), 10.0]) for i in range(4)]
    for mean in batch_means:
        sums = {
            'params': {'': FixedPoint(accumulation.LARGEST_GRADIENT, 4).encode(jnp.zeros(1))},
            'batch_stats': {'': FixedPoint(accumulation.LARGEST_VALUE, 4).encode(mean)},
        }
        updates, state = transform.update(sums, state, variables)
        variables = optax.apply_updates(variables, updates)
    expected = 0.9 * np.array([1.0, 2.0]) + 0.1 * np.array([1.5, 10.0])
    np.testing.assert_allclose(variables['batch_stats']['bn1']['mean'], expected, rtol=1e-6)
    assert int(state.gradient_step) == 1
