# SPDX-License-Identifier: Apache-2.0
"""AdamW, clipping and schedule are the official ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import exact_sums
from tests.models.llama.cases import FOLDER, NAMES, Case, loss
from workloads.llama31_8b import hugging_face, optimizers

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SCHEDULES = json.loads((FOLDER.parent / 'lr_schedule.json').read_text())['cases']
ADAMW = {'beta_1': 0.9, 'beta_2': 0.95, 'epsilon': 1e-5, 'weight_decay': 0.1}


@pytest.mark.parametrize('case', SCHEDULES, ids=lambda case: case['name'])
def test_the_schedule_is_the_official_one(case):
    schedule = optimizers.learning_rate_schedule(
        case['base_lr'], case['min_lr'], case['warmup_steps'], case['max_steps']
    )
    schedule, (steps, rates) = jax.jit(schedule), zip(*case['values'], strict=True)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule(np.array(steps)), rates, rtol=1e-12)
    found = schedule(np.array(steps, np.int32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rates, rtol=2e-6)


@pytest.mark.parametrize(
    ('train', 'after', 'decays'),
    [('train', 'after', optimizers.is_matrix), ('train_decay_all', 'after_decay_all', None)],
)
@pytest.mark.parametrize(
    'name', [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_steps_are_the_official_ones(name, train, after, decays):
    """Losses, norms and every weight in fp64, with and without decay of norms."""
    case = Case(name)
    options, expected = case.config['opt'], case.values['f64']
    schedule = optimizers.learning_rate_schedule(
        options['lr'], 0.1 * options['lr'], options['warmup'], options['max_steps']
    )
    optimizer = optax.chain(
        optimizers.clip(options['clip'], optax.tree.norm),
        optimizers.adamw(schedule, **ADAMW, decays=decays),
    )

    @jax.jit
    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(loss)(
            params, tokens, case.architecture, jnp.dtype('float64')
        )
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(gradient)

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, case.params('float64'))
        state = optimizer.init(params)
        for number, golden in enumerate(expected[train]):
            params, state, value, norm = step(params, state, case.tokens(number))
            np.testing.assert_allclose(value, golden['loss'], rtol=1e-10)
            np.testing.assert_allclose(norm, golden['grad_norm_before_clip'], rtol=1e-10)
    found = dict(hugging_face.exported(jax.tree.map(np.asarray, params)))
    assert found.keys() == expected[after].keys()
    for weight, golden in expected[after].items():
        array = found[weight]
        close = {'rtol': 1e-10, 'atol': 1e-13, 'err_msg': weight}
        np.testing.assert_allclose(np.linalg.norm(array), golden['norm'], **close)
        np.testing.assert_allclose(array.sum(), golden['sum'], rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(array.ravel()[:4], golden['first'], **close)
        np.testing.assert_allclose(array.ravel()[-2:], golden['last'], **close)


def test_all_but_norms_decay():
    decays = optimizers.is_matrix(Case(NAMES[0]).params('float32'))
    for module, leaf in hugging_face.IN_A_LAYER:
        assert decays['layers'][module][leaf] == (leaf == 'kernel')
    assert decays['embedding']
    assert decays['head']
    assert not decays['norm']


def test_the_exact_norm_clips_as_any_other():
    """In fp32, where the exact norm is meant to be used."""
    gradient = {'a': np.random.default_rng(1).standard_normal(1000).astype(np.float32)}
    plain, _ = optimizers.clip(1.0, optax.tree.norm).update(gradient, optax.EmptyState())
    found, _ = optimizers.clip(1.0, exact_sums.norm).update(gradient, optax.EmptyState())
    np.testing.assert_allclose(found['a'], plain['a'], rtol=1e-6)
    small = {'a': gradient['a'] / 1000}
    found, _ = optimizers.clip(1.0, exact_sums.norm).update(small, optax.EmptyState())
    np.testing.assert_array_equal(found['a'], small['a'])
