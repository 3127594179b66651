# SPDX-License-Identifier: Apache-2.0
"""The network is Hugging Face's LlamaForCausalLM."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import layer, network
from models.llama.architectures import ARCHITECTURES, Architecture
from models.llama.layer import Layer
from tests.harness import equations
from tests.models.llama.cases import FOLDER, NAMES, Case, loss
from workloads.llama31_8b import hugging_face

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SMALL = Architecture(3, 32, 48, 4, 2, 8, 64)
initial = jax.jit(network.init, static_argnums=1)


@pytest.fixture(params=NAMES)
def case(request):
    return Case(request.param)


CASES = pytest.mark.parametrize(
    ('case', 'dtype', 'golden', 'close'),
    [
        pytest.param(name, *how, marks=[pytest.mark.slow] if name == 'long_8192' else [])
        for name in NAMES
        for how in (('float64', 'f64', 1e-10), ('float32', 'f32', 5e-5))
    ],
    indirect=['case'],
)


@pytest.fixture
def elsewhere(request, case):
    """The folder of official outputs that are not committed, where one is needed."""
    if (FOLDER / f'{case.name}.npz').exists():
        return None
    return request.getfixturevalue('official_outputs')


@CASES
def test_logits_are_the_official_ones(case, elsewhere, dtype, golden, close):
    with jax.enable_x64(dtype == 'float64'):
        params, tokens = case.params(dtype), case.tokens(0)[:, :-1]

        @jax.jit
        def logits(params):
            x = network.activations(params, tokens, Layer(case.architecture, jnp.dtype(dtype)))
            return network.logits(x, params['head'])

        found = np.asarray(logits(params))
    assert found.dtype == dtype
    expected, positions = case.logits(golden, elsewhere)
    np.testing.assert_allclose(found[:, positions], expected, rtol=0, atol=close)


@CASES
def test_losses_and_gradients_are_the_official_ones(case, dtype, golden, close):
    with jax.enable_x64(dtype == 'float64'):
        params, tokens = case.params(dtype), case.tokens(0)
        value, gradient = jax.jit(
            lambda p: network.gradient(
                p, tokens, Layer(case.architecture, jnp.dtype(dtype)), jnp.ones((), dtype)
            )
        )(params)
    assert value.dtype == dtype
    expected = case.values[golden]
    np.testing.assert_allclose(value, expected['loss'], rtol=close)
    norms = {
        name: np.linalg.norm(array)
        for name, array in hugging_face.exported(jax.tree.map(np.asarray, gradient))
    }
    assert norms.keys() == expected['grad_norm'].keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected['grad_norm'][name], rtol=close, err_msg=name)


def test_rotary_frequencies_are_the_official_ones(case):
    found = layer.rotary_frequencies(case.architecture)
    np.testing.assert_allclose(found, case.values['inv_freq_f64_own_rule'], rtol=1e-14)


def test_most_of_the_benchmarks_frequencies_are_scaled_or_not():
    frequencies = layer.rotary_frequencies(ARCHITECTURES['llama31_8b'])
    plain = 500_000.0 ** (-np.arange(64) / 64)
    assert np.sum(frequencies == plain) == 29
    assert np.sum(frequencies == plain / 8) == 29


def test_the_benchmarks_parameters_are_counted():
    a = ARCHITECTURES['llama31_8b']
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), a))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 8_030_261_248
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype('float32')}


def test_operations_of_a_token_are_those_of_its_products(small):
    """Of the network as it is traced, forward; twice as many backward."""
    params, tokens = small
    length = tokens.shape[1] - 1
    traced = jax.make_jaxpr(lambda p, x: Layer(SMALL, jnp.dtype('float32')).apply({'params': p}, x))
    one = jax.tree.map(lambda x: x[0], params['layers'])
    program = traced(one, jnp.zeros((1, length, SMALL.width)))
    products = [e for e in equations(program.jaxpr) if e.primitive.name == 'dot_general']
    of_layer = 0
    for product in products:
        (contracted, _), _ = product.params['dimension_numbers']
        summed = [product.invars[0].aval.shape[i] for i in contracted]
        of_layer += 2 * math.prod(summed) * product.outvars[0].aval.size
    of_head = 2 * SMALL.width * SMALL.vocabulary
    forward = SMALL.layers * of_layer / length + of_head
    assert SMALL.operations(length) == 3 * forward


def test_weights_start_as_the_rules_say():
    a = Architecture(8, 128, 256, 4, 2, 32, 512)
    params = initial(jax.random.key(1), a)
    for name, array in hugging_face.exported(jax.tree.map(np.asarray, params)):
        if name.endswith('norm.weight'):
            assert (array == 1).all()
            continue
        narrow = name.endswith(('o_proj.weight', 'down_proj.weight'))
        sigma = 0.02 / 4 if narrow else 0.02
        assert abs(array.std() / sigma - 1) < 5 / np.sqrt(2 * array.size), name
        assert abs(array.mean()) < 5 * sigma / np.sqrt(array.size), name
        assert np.abs(array).max() > 3 * sigma, name  # not truncated
    kernels = params['layers']['query']['kernel']
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == a.layers


@pytest.fixture(scope='module')
def small():
    params = initial(jax.random.key(2), SMALL)
    tokens = np.random.default_rng(2).integers(0, SMALL.vocabulary, (2, 17))
    return jax.tree.map(lambda x: np.asarray(5 * x, np.float64), params), tokens


def test_the_written_out_gradient_is_that_of_the_loss(small):
    params, tokens = small
    dtype = jnp.dtype('float64')
    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, SMALL, dtype)))(params)
        found = jax.jit(lambda p: network.gradient(p, tokens, Layer(SMALL, dtype), jnp.float64(1)))(
            params
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max()),
            found,
            expected,
        )


def test_a_token_depends_on_none_that_follows(small):
    params, tokens = small
    other = tokens.copy()
    other[:, 9:] = (other[:, 9:] + 1) % SMALL.vocabulary
    with jax.enable_x64(True):
        a, b = (
            network.activations(params, t, Layer(SMALL, jnp.dtype('float64')))
            for t in (tokens, other)
        )
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert (a[:, 9] != b[:, 9]).any(-1).all()


def gradient(params, tokens, dtype):
    return network.gradient(params, tokens, Layer(SMALL, jnp.dtype(dtype)), jnp.float32(1))


def test_losses_do_not_depend_on_how_many_are_computed_at_a_time(small, monkeypatch):
    found = []
    for at_a_time in (1, 8, 32):
        monkeypatch.setattr(network, 'TOKENS_AT_A_TIME', at_a_time)
        with jax.enable_x64(True):
            found.append(jax.jit(gradient, static_argnums=2)(*small, 'float64'))
    for each in found[1:]:
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_half_precision_multiplies_nothing_wider_and_nothing_is_scattered(small):
    params, tokens = small
    params = jax.tree.map(np.float32, params)
    program = jax.make_jaxpr(lambda p: gradient(p, tokens, 'bfloat16'))(params)
    operations = list(equations(program.jaxpr))
    products = [e for e in operations if e.primitive.name == 'dot_general']
    assert len(products) > 20
    assert {x.aval.dtype for e in products for x in e.invars} == {jnp.dtype('bfloat16')}
    assert not [e for e in operations if 'scatter' in e.primitive.name]


def test_half_precision_is_of_activations_alone(small):
    params, tokens = small
    params = jax.tree.map(np.float32, params)
    half, whole = jnp.dtype('bfloat16'), jnp.dtype('float32')

    @jax.jit
    def compute(params):
        x = network.activations(params, tokens[:, :-1], Layer(SMALL, half))
        found = jax.value_and_grad(loss)(params, tokens, SMALL, half)
        return x, *found, loss(params, tokens, SMALL, whole)

    x, value, gradient, exact = compute(params)
    assert x.dtype == jnp.bfloat16
    assert value.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {np.dtype('float32')}
    np.testing.assert_allclose(value, exact, rtol=0.02)


def test_hugging_face_names_are_ours_and_back(small):
    params, _ = small
    again = hugging_face.imported(dict(hugging_face.exported(params)), SMALL)
    jax.tree.map(np.testing.assert_array_equal, again, params)
