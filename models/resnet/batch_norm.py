# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over groups of `span` neighbouring examples.

In training every group of `span` examples is normalised by its own mean and variance, whatever
the number of devices and however many examples a device happens to hold: the span is a
hyperparameter, the device's batch is not. The layer does not move its running statistics. It
writes the *batch's* statistics, averaged over its groups, into the `batch_stats` collection; the
training step averages them over the global batch and moves the running ones once per update.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(
    span: int, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises every group of `span` examples of x [N, H, W, C] by its own statistics.

    Mean and variance come from one pass over the activations, shifted by one of them, so that the
    variance loses little to cancellation however large the mean is (Chan, Golub & LeVeque 1983,
    "Algorithms for computing the sample variance", section 3).

    The gradient (Ioffe & Szegedy 2015, section 3) is written out, because it needs two sums over
    the activations where the automatic one needs three and reads them once more.

    Returns:
      y like x, and the groups' means and biased variances [N / span, 1, 1, 1, C]. No gradient
      flows back through the latter two.
    """
    return _normalise_forward(span, x, scale, bias)[0]


def _grouped(span: int, x: jax.Array) -> jax.Array:
    """[N / span, span, H, W, C], in at least fp32."""
    return x.reshape(-1, span, *x.shape[1:]).astype(jnp.promote_types(x.dtype, jnp.float32))


def _sums(*groups: jax.Array) -> list[jax.Array]:
    """Over every group, [N / span, 1, 1, 1, C], from [N / span, span, H, W, C].

    First over every image, so that a GPU has enough sums to compute at a time.
    """
    count, span, _, _, channels = groups[0].shape
    of_images = [x.reshape(count * span, -1, channels).sum(axis=1) for x in groups]
    # Behind the barrier XLA adds up few values; without it, the activations once more.
    of_images = lax.optimization_barrier(of_images)
    return [x.reshape(count, span, channels).sum(axis=1)[:, None, None, None] for x in of_images]


def _normalise_forward(span, x, scale, bias):
    groups = _grouped(span, x)
    row, column = x.shape[1] // 2, x.shape[2] // 2  # Padding tells at the edges.
    near = x[::span, row : row + 1, column : column + 1].astype(groups.dtype)[:, None]
    shifted = groups - near
    count = shifted[0, ..., 0].size
    shift_gc, square_gc = (total / count for total in _sums(shifted, jnp.square(shifted)))
    mean_gc = near + shift_gc
    var_gc = jnp.maximum(square_gc - jnp.square(shift_gc), 0)
    inverse_gc = lax.rsqrt(var_gc + EPSILON)
    y = (groups - mean_gc) * (inverse_gc * scale[None, None, None, None])
    y = y + bias[None, None, None, None]
    return (y.reshape(x.shape).astype(x.dtype), mean_gc, var_gc), (x, scale, mean_gc, inverse_gc)


def _normalise_backward(span, residuals, cotangents):
    x, scale, mean_gc, inverse_gc = residuals
    dy = _grouped(span, cotangents[0])
    normal = (_grouped(span, x) - mean_gc) * inverse_gc
    count = dy[0, ..., 0].size
    bias_gc, scale_gc = _sums(dy, dy * normal)
    dx = (dy - bias_gc / count - normal * (scale_gc / count)) * (
        inverse_gc * scale[None, None, None, None]
    )
    return (
        dx.reshape(x.shape).astype(x.dtype),
        scale_gc.sum(axis=(0, 1, 2, 3)),
        bias_gc.sum(axis=(0, 1, 2, 3)),
    )


normalise.defvjp(_normalise_forward, _normalise_backward)


class BatchNorm(nn.Module):
    """Batch normalisation by span (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1).

    y = scale · (x - mean) / sqrt(var + 1e-5) + bias, the mean and the biased variance taken over
    span × H × W elements per channel, never below fp32.

    Attributes:
      span: examples per group; must divide the batch (training only).
    """

    span: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x [N, H, W, C] and returns the same shape and dtype.

        Raises:
          ValueError: in training, when `span` does not divide N.
        """
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
        mean_c = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        var_c = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)

        if not train:
            precise = jnp.promote_types(x.dtype, jnp.float32)
            multiplier = scale * lax.rsqrt(var_c.value + EPSILON)
            shift = bias - mean_c.value * multiplier
            y = x.astype(precise) * multiplier[None, None, None] + shift[None, None, None]
            return y.astype(x.dtype)

        if x.shape[0] % self.span:
            raise ValueError(f'bn_span={self.span} does not divide the batch of {x.shape[0]}')
        y, mean_gc, var_gc = normalise(self.span, x, scale, bias)
        if not self.is_initializing():
            mean_c.value = mean_gc.mean(axis=(0, 1, 2, 3))
            var_c.value = var_gc.mean(axis=(0, 1, 2, 3))
        return y
