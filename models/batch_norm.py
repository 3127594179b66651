# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over groups of `span` neighbouring examples.

In training every group of `span` examples is normalised by its own mean and variance, whatever
the number of devices and however many examples a device happens to hold: the span is a
hyperparameter, the device's batch is not. The layer does not move its running statistics. It
writes the *batch's* statistics, averaged over its groups, into the `batch_stats` collection; the
training step averages them over the global batch and moves the running ones once per update.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation by span (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1).

    y = scale · (x - mean) / sqrt(var + 1e-5) + bias, the mean and the biased variance taken over
    span × H × W elements per channel, in two passes (the variance of the centred values) and never
    below fp32.

    Attributes:
      span: examples per group; must divide the batch (training only).
      scale_init: initial scale.
    """

    span: int
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x [N, H, W, C] and returns the same shape and dtype.

        Raises:
          ValueError: in training, when `span` does not divide N.
        """
        channels = x.shape[-1]
        scale = self.param('scale', self.scale_init, (channels,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
        mean_c = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        var_c = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)

        precise = jnp.promote_types(x.dtype, jnp.float32)
        if not train:
            multiplier = scale * lax.rsqrt(var_c.value + EPSILON)
            shift = bias - mean_c.value * multiplier
            y = x.astype(precise) * multiplier[None, None, None] + shift[None, None, None]
            return y.astype(x.dtype)

        if x.shape[0] % self.span:
            raise ValueError(f'bn_span={self.span} does not divide the batch of {x.shape[0]}')
        groups = x.reshape(-1, self.span, *x.shape[1:]).astype(precise)
        mean_gc = groups.mean(axis=(1, 2, 3), keepdims=True)
        centred = groups - mean_gc
        var_gc = jnp.square(centred).mean(axis=(1, 2, 3), keepdims=True)
        if not self.is_initializing():
            mean_c.value = mean_gc.mean(axis=(0, 1, 2, 3))
            var_c.value = var_gc.mean(axis=(0, 1, 2, 3))
        y = centred * (lax.rsqrt(var_gc + EPSILON) * scale[None, None, None, None])
        y = y + bias[None, None, None, None]
        return y.reshape(x.shape).astype(x.dtype)
