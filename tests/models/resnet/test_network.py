# SPDX-License-Identifier: Apache-2.0
"""The network's size, its BatchNorm by span, its padding and its pool."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.resnet import network
from models.resnet.batch_norm import EPSILON, BatchNorm
from models.resnet.network import ResNet, Stem, relu, window_padding
from models.resnet.pooling import max_pool_3x3_stride_2
from tests.harness import resolve
from workloads.resnet.task import ImageClassification

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_resnet50_has_the_official_number_of_parameters():
    model = network.create('resnet50', num_classes=1000, bn_span=1)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)
    )
    assert count(variables['params']) == 25_557_032
    assert count(variables['batch_stats']) == 53_120


def test_stride_is_in_the_3x3_convolution():
    model = network.create('resnet50', num_classes=10, bn_span=1)
    _, shapes = jax.eval_shape(
        lambda: model.init_with_output(
            jax.random.key(0),
            jnp.zeros((1, 64, 64, 3)),
            train=False,
            capture_intermediates=True,
            mutable=['params', 'batch_stats', 'intermediates'],
        )
    )
    block = shapes['intermediates']['layer2_0']
    assert block['conv1']['__call__'][0].shape[1:3] == (16, 16)
    assert block['conv2']['__call__'][0].shape[1:3] == (8, 8)


def one_block(**fields):
    """The smallest network."""
    fields = {'bottleneck': False, 'num_classes': 100, 'large_stem': False, 'bn_span': 1} | fields
    return ResNet(stage_sizes=(1,), **fields)


@pytest.mark.parametrize('truncated', [True, False])
def test_initial_weights(truncated):
    model = one_block(width=256, truncated_init=truncated)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), train=False)['params']
    kernel = params['layer1_0']['conv2']['kernel']
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    assert (np.abs(kernel).max() < 2.3 * kernel.std()) == truncated  # At two deviations.
    assert params['fc']['kernel'].std() == pytest.approx(0.01, rel=0.02)
    assert (params['bn1']['scale'] == 1).all()
    assert not params['bn1']['bias'].any()


@pytest.mark.parametrize('truncated', [True, False])
def test_the_configuration_chooses_the_initialisation(truncated):
    config = resolve('digits', 'unused', truncated_init=truncated)
    assert ImageClassification(config, num_classes=10).model.truncated_init == truncated


@pytest.mark.parametrize('span', [2, 4, 8])
def test_batch_norm_normalises_each_span_by_itself(span):
    x = np.random.default_rng(0).normal(3, 2, (8, 3, 5, 4)).astype(np.float32)
    layer = BatchNorm(span)
    variables = layer.init(jax.random.key(0), x, False)
    y, updated = layer.apply(variables, x, True, mutable=['batch_stats'])
    means, variances = [], []
    for group in range(8 // span):
        rows = slice(group * span, (group + 1) * span)
        mean, var = x[rows].mean((0, 1, 2)), x[rows].var((0, 1, 2))
        np.testing.assert_allclose(y[rows], (x[rows] - mean) / np.sqrt(var + EPSILON), atol=2e-6)
        means.append(mean)
        variances.append(var)
    np.testing.assert_allclose(updated['batch_stats']['mean'], np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(updated['batch_stats']['var'], np.mean(variances, 0), rtol=1e-5)


def test_batch_norm_variance_survives_a_large_mean():
    x = np.random.default_rng(0).normal(1000, 0.1, (4, 8, 8, 1)).astype(np.float32)
    layer = BatchNorm(4)
    variables = layer.init(jax.random.key(0), x, False)
    _, updated = layer.apply(variables, x, True, mutable=['batch_stats'])
    expected = x.astype(np.float64).var()
    assert updated['batch_stats']['var'][0] == pytest.approx(expected, rel=1e-3)


def test_batch_norm_evaluates_with_running_statistics():
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 2)).astype(np.float32)
    stats = {'mean': np.array([1.0, -1.0], np.float32), 'var': np.array([4.0, 0.25], np.float32)}
    params = {'scale': np.array([2.0, 3.0], np.float32), 'bias': np.array([0.5, 0.0], np.float32)}
    y = BatchNorm(16).apply({'params': params, 'batch_stats': stats}, x, False)
    expected = (x - stats['mean']) / np.sqrt(stats['var'] + EPSILON) * params['scale']
    np.testing.assert_allclose(np.asarray(y), expected + params['bias'], rtol=1e-5, atol=1e-6)


def test_a_span_that_does_not_divide_the_batch_is_an_error():
    x = jnp.zeros((6, 1, 1, 1))
    layer = BatchNorm(4)
    variables = layer.init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match='bn_span=4 does not divide the batch of 6'):
        layer.apply(variables, x, True, mutable=['batch_stats'])


@pytest.mark.parametrize('size', [7, 8, 112])
@pytest.mark.parametrize('kernel', [1, 3, 7])
def test_same_padding_is_tensorflows(kernel, size):
    before, after = window_padding(kernel, 2, size, 'same')
    lax_pads = jax.lax.padtype_to_pads((size,), (kernel,), (2,), 'SAME')
    assert (before, after) == lax_pads[0]
    assert window_padding(kernel, 2, size, 'symmetric') == ((kernel - 1) // 2,) * 2


@pytest.mark.parametrize('size', [(32, 32), (33, 40), (38, 37)])
def test_stem_equals_a_7x7_convolution_with_stride_2(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    init = network.conv_init(truncated=True)
    padding, precision = [(3, 3)] * 2, network.PRECISION
    plain = nn.Conv(
        8, (7, 7), (2, 2), padding, use_bias=False, precision=precision, kernel_init=init
    )
    stem = Stem(8, jnp.dtype('float32'), init)
    variables = plain.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, stem.init(jax.random.key(1), x))
    (expected, of_plain), (found, of_stem) = (
        jax.vjp(layer.apply, variables, x) for layer in (plain, stem)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(
        *(jax.tree.leaves(f(jnp.cos(expected))) for f in (of_stem, of_plain)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16', 'float16'])
def test_relu_and_its_gradient_equal_jaxs(dtype):
    with jax.enable_x64(dtype == 'float64'):
        tiny = jnp.finfo(dtype).tiny
        x = jnp.array([-jnp.inf, -2, -tiny, -0.0, 0, tiny, 2, jnp.inf, jnp.nan], dtype)
        g = jnp.arange(1, 10, dtype=dtype)
        theirs, their_vjp = jax.vjp(jax.nn.relu, x)
        for program in (relu, jax.jit(relu)):
            ours, our_vjp = jax.vjp(program, x)
            (grad,) = our_vjp(g)
            assert ours.dtype == grad.dtype == dtype
            # Equal with the NaN, which stays one. (NumPy sees no NaN in bfloat16.)
            np.testing.assert_array_equal(ours.astype(float), theirs.astype(float))
            np.testing.assert_array_equal(grad, their_vjp(g)[0])


def test_relus_gradient_reads_its_result():
    # Under jit a barrier hides that result > 0 where input > 0, which XLA would make use of.
    program = jax.make_jaxpr(lambda x: jax.vjp(relu, x))(jnp.ones(3)).jaxpr
    (barrier,) = (e for e in program.eqns if e.primitive.name == 'optimization_barrier')
    assert program.outvars == [barrier.outvars[0]] * 2  # The result and all that is kept.


@pytest.mark.parametrize('pads', [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (1, 0))])
@pytest.mark.parametrize('shape', [(2, 9, 12, 3), (1, 8, 8, 2), (1, 5, 3, 1)])
def test_max_pool_and_its_gradient_equal_xlas(shape, pads):
    x = jax.random.normal(jax.random.key(0), shape)

    @jax.jit
    def both(x):
        (theirs, their_vjp), (ours, our_vjp) = (
            jax.vjp(pool, x)
            for pool in (
                lambda x: nn.max_pool(x, (3, 3), (2, 2), pads),
                lambda x: max_pool_3x3_stride_2(x, pads),
            )
        )
        g = jax.random.normal(jax.random.key(1), theirs.shape)
        return (ours, *our_vjp(g)), (theirs, *their_vjp(g))

    (ours, our_gradient), (theirs, their_gradient) = both(x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(our_gradient, their_gradient, atol=1e-6)


def test_max_pool_gradient_goes_to_one_of_equal_maxima_and_needs_no_scatter():
    pads = ((1, 1), (1, 1))

    def total(x):
        return max_pool_3x3_stride_2(x, pads).sum()

    grad = jax.grad(total)(jnp.zeros((1, 8, 8, 1)))
    assert float(grad.sum()) == 16
    assert set(np.unique(grad)) <= {0.0, 1.0}
    program = jax.jit(jax.grad(total)).lower(jnp.zeros((1, 8, 8, 1))).as_text()
    assert 'scatter' not in program


@pytest.mark.parametrize('around', [-jnp.inf, 0.0, jnp.inf])
def test_max_pool_does_not_hide_a_nan(around):
    """Of nine windows, each has a NaN in another place."""
    is_nan = jnp.eye(9, dtype=bool).reshape(9, 3, 3, 1)
    x = jnp.where(is_nan, jnp.nan, around)
    y, vjp = jax.vjp(lambda x: max_pool_3x3_stride_2(x, ((0, 0), (0, 0))), x)
    assert jnp.isnan(y).all()
    np.testing.assert_array_equal(vjp(jnp.ones_like(y))[0], is_nan)


def test_a_nan_in_the_image_is_one_in_the_logits():
    model = one_block(width=8)
    x = jnp.zeros((1, 8, 8, 3)).at[0, 7, 7, 1].set(jnp.nan)
    logits, _ = jax.jit(lambda x: model.init_with_output(jax.random.key(0), x, train=False))(x)
    assert np.isnan(np.asarray(logits)).all()
