# SPDX-License-Identifier: Apache-2.0
"""A layer of Llama 3.1: attention with rotary positions, and a feed-forward network."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.llama.architectures import Architecture

# fp32 is computed in fp32, also in the gradients; without it, in TF32 on Ampere and later.
PRECISION = lax.Precision.HIGHEST
NORM_EPSILON = 1e-5
WEIGHT_DEVIATION = 0.02
# Llama 3.1's scaling of rotary frequencies: wave lengths above original_length / LOWEST are
# stretched FACTOR times, those below original_length / HIGHEST not at all.
FACTOR, LOWEST, HIGHEST = 8.0, 1.0, 4.0


def rotary_frequencies(architecture: Architecture) -> np.ndarray:
    """Radians a token for every pair of a head's elements, float64 [head_size / 2].

    θ^(-2i / head_size), scaled as by the official code (llama_models, `apply_scaling`).
    """
    size = architecture.head_size
    plain = architecture.rotary_base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    turns = architecture.original_length * plain / (2 * np.pi)
    unscaled = np.clip((turns - LOWEST) / (HIGHEST - LOWEST), 0.0, 1.0)
    return (1 - unscaled) * plain / FACTOR + unscaled * plain


def rotations(architecture: Architecture, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angles at positions 0 to length - 1, float64 [length, size / 2].

    They are computed on the host, so that no device rounds angles of thousands of radians.
    """
    angles = np.arange(length)[:, None] * rotary_frequencies(architecture)
    return np.cos(angles), np.sin(angles)


def _at_least_fp32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def rotated(x: jax.Array, cosines: np.ndarray, sines: np.ndarray) -> jax.Array:
    """Turns the pairs (i, i + size / 2) of every head by their position's angles.

    Args:
      x: [N, length, heads, size].
      cosines, sines: [length, size / 2].

    Returns:
      The same shape and dtype; computed in fp32 at least.
    """
    wide = _at_least_fp32(x.dtype)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    c, s = (jnp.asarray(table[None, :, None], wide) for table in (cosines, sines))
    turned = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    return turned.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(form, a, b)` of arrays of one dtype, in fp32 at least.

    What its gradient multiplies is rounded to that dtype first, as with autocast: fp32 times half
    precision would be a product of fp32, at a tenth of the speed on a GPU.
    """
    wide = _at_least_fp32(a.dtype)
    return jnp.einsum(form, a, b, precision=PRECISION, preferred_element_type=wide)


def _wide_product_backward(form, operands, gradient):
    narrow = functools.partial(jnp.einsum, form, precision=PRECISION)
    return jax.vjp(narrow, *operands)[1](gradient.astype(operands[0].dtype))


wide_product.defvjp(lambda form, a, b: (wide_product(form, a, b), (a, b)), _wide_product_backward)


@jax.custom_vjp
def softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last axis.

    It and its gradient stand between barriers: fused with what is around them, they would be
    rounded differently for different numbers of devices.
    """
    return lax.optimization_barrier(jax.nn.softmax(lax.optimization_barrier(scores), axis=-1))


def _softmax_forward(scores):
    probabilities = softmax(scores)
    return probabilities, probabilities


def _softmax_backward(probabilities, gradient):
    p, dp = lax.optimization_barrier((probabilities, gradient))
    weighted = p * dp
    return (lax.optimization_barrier(weighted - p * weighted.sum(-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def can_fuse(dtype: jnp.dtype) -> bool:
    """Whether cuDNN has a kernel for attention: in half precision, on Ampere GPUs and later."""
    device = jax.devices()[0]
    is_half = jnp.finfo(dtype).bits == 16
    return is_half and device.platform == 'gpu' and float(device.compute_capability) >= 8


def attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, fused: bool = False
) -> jax.Array:
    """Causal attention of grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
      queries: [N, length, heads, size].
      keys, values: [N, length, key_value_heads, size].
      fused: whether cuDNN computes it. Else N · heads · length² probabilities are in memory.

    Returns:
      [N, length, heads, size] in the dtype of `queries`; probabilities are computed in fp32 at
      least.
    """
    if fused:
        return jax.nn.dot_product_attention(
            queries, keys, values, is_causal=True, implementation='cudnn'
        )
    count, length, heads, size = queries.shape
    grouped = queries.reshape(count, length, keys.shape[2], -1, size)
    scores = wide_product('nqkgh,ntkh->nkgqt', grouped, keys)
    position = jnp.arange(length)
    is_past = (position[:, None] >= position[None, :])[None, None, None]
    masked = jnp.where(is_past, scores * size**-0.5, -jnp.inf)
    probabilities = softmax(masked).astype(values.dtype)
    mixed = jnp.einsum('nkgqt,ntkh->nqkgh', probabilities, values, precision=PRECISION)
    return mixed.reshape(count, length, heads, size)


class Layer(nn.Module):
    """One layer: x + attention(norm(x)), then y + swiglu(norm(y)) (Shazeer 2020, 2002.05202).

    Attributes:
      architecture: the network's.
      dtype: of activations; weights are fp32.
      fused: whether cuDNN computes attention; see `can_fuse`.
    """

    architecture: Architecture
    dtype: jnp.dtype
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, length, width] to the same."""
        a = self.architecture
        narrow = WEIGHT_DEVIATION / math.sqrt(2 * a.layers)  # What is added to x, 2·layers times.

        def linear(features: int, name: str, deviation: float = WEIGHT_DEVIATION) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                precision=PRECISION,
                kernel_init=nn.initializers.normal(deviation),
                name=name,
            )

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=NORM_EPSILON, dtype=self.dtype, name=name)

        def heads(h: jax.Array, count: int, name: str) -> jax.Array:
            return linear(count * a.head_size, name)(h).reshape(*h.shape[:2], count, a.head_size)

        cosines, sines = rotations(a, x.shape[1])
        turn = functools.partial(rotated, cosines=cosines, sines=sines)
        h = norm('attention_norm')(x)
        mixed = attention(
            turn(heads(h, a.heads, 'query')),
            turn(heads(h, a.key_value_heads, 'key')),
            heads(h, a.key_value_heads, 'value'),
            self.fused,
        )
        x = x + linear(a.width, 'output', narrow)(mixed.reshape(*x.shape[:2], -1))
        h = norm('feed_forward_norm')(x)
        inner = nn.silu(linear(a.feed_forward, 'gate')(h)) * linear(a.feed_forward, 'up')(h)
        return x + linear(a.width, 'down', narrow)(inner)
