# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783): tokens go in, their losses come out.

    tokens → embedding → layers → norm → head → logits → loss

A layer is a Flax module, and the weights of all layers are stacked. Logits are made for some tokens
at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.llama.architectures import Architecture

# fp32 is computed in fp32, also in the gradients; without it, in TF32 on Ampere and later.
PRECISION = lax.Precision.HIGHEST
NORM_EPSILON = 1e-5
TOKENS_AT_A_TIME = 1024  # Of which something as wide as the vocabulary is in memory.
WEIGHT_DEVIATION = 0.02
# Llama 3.1's scaling of rotary frequencies: wave lengths above original_length / LOWEST are
# stretched FACTOR times, those below original_length / HIGHEST not at all.
FACTOR, LOWEST, HIGHEST = 8.0, 1.0, 4.0

Params = dict[str, Any]
# Functions of the name and the arrays, of one layer for 'layers': whole weights from this device's
# parts; what becomes of the gradient by whole weights.
Whole = Callable[[str, Any], Any]
Summed = Callable[[str, Any], Any]


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


def is_fused(dtype: jnp.dtype) -> bool:
    """Whether cuDNN computes attention, in one kernel: half precision, on Ampere GPUs and later."""
    device = jax.devices()[0]
    is_half = jnp.finfo(dtype).bits == 16
    return is_half and device.platform == 'gpu' and float(device.compute_capability) >= 8


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Causal attention of grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
      queries: [N, length, heads, size].
      keys, values: [N, length, key_value_heads, size].

    Returns:
      [N, length, heads, size] in the dtype of `queries`; probabilities are computed in fp32 at
      least. Needs memory for N · heads · length² of them, unless it `is_fused`.
    """
    if is_fused(queries.dtype):
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
    """

    architecture: Architecture
    dtype: jnp.dtype

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
        )
        x = x + linear(a.width, 'output', narrow)(mixed.reshape(*x.shape[:2], -1))
        h = norm('feed_forward_norm')(x)
        inner = nn.silu(linear(a.feed_forward, 'gate')(h)) * linear(a.feed_forward, 'up')(h)
        return x + linear(a.width, 'down', narrow)(inner)


def init(key: jax.Array, architecture: Architecture) -> Params:
    """Weights, fp32: 'embedding' [vocabulary, width], 'layers' (stacked), 'norm', 'head'."""
    a = architecture
    of_embedding, of_layers, of_head = jax.random.split(key, 3)
    normal = nn.initializers.normal(WEIGHT_DEVIATION)
    layer = Layer(a, jnp.dtype('float32'))
    keys = jax.random.split(of_layers, a.layers)
    return {
        'embedding': normal(of_embedding, (a.vocabulary, a.width)),
        'layers': jax.vmap(lambda key: layer.init(key, jnp.zeros((1, 1, a.width))))(keys)['params'],
        'norm': jnp.ones(a.width),
        'head': normal(of_head, (a.width, a.vocabulary)),
    }


def as_it_is(name: str, weights: Any) -> Any:
    """`Whole` and `Summed` where every device has all weights."""
    del name
    return weights


def _chunks(x: jax.Array) -> jax.Array:
    """The first axis as [chunks, tokens at a time]."""
    return x.reshape(-1, math.gcd(len(x), TOKENS_AT_A_TIME), *x.shape[1:])


def by_rows(
    shape: tuple[int, int], dtype: jnp.dtype, tokens: jax.Array, gradient: jax.Array
) -> jax.Array:
    """The gradient by the embedding, of a shape and dtype, from that by its rows.

    A product with one-hot vectors: additions in one order. On a GPU, a scatter that keeps to an
    order sorts all the gradient's elements.

    Args:
      shape, dtype: of the embedding.
      tokens: int [N, length].
      gradient: [N, length, width].
    """

    def some(total, chunk):
        tokens, gradient = chunk
        is_row = (jnp.arange(shape[0])[:, None] == tokens[None]).astype(gradient.dtype)
        return total + wide_product('vt,tw->vw', is_row, gradient), None

    chunks = _chunks(tokens.ravel()), _chunks(gradient.reshape(-1, shape[1]))
    return lax.scan(some, jnp.zeros(shape, dtype), chunks)[0]


def _through_layers(
    params: Params, tokens: jax.Array, architecture: Architecture, dtype: jnp.dtype, whole: Whole
) -> tuple[jax.Array, jax.Array]:
    """What comes out of the last layer, and every layer's input [layers, N, length, width]."""
    layer = Layer(architecture, dtype)

    def step(x, weights):
        weights, x = lax.optimization_barrier((weights, x))
        return layer.apply({'params': whole('layers', weights)}, x), x

    x = whole('embedding', params['embedding'])[tokens].astype(dtype)
    return lax.scan(step, x, params['layers'])


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    norm = nn.RMSNorm(epsilon=NORM_EPSILON, dtype=x.dtype)
    return norm.bind({'params': {'scale': scale}})(x)


def activations(
    params: Params,
    tokens: jax.Array,
    architecture: Architecture,
    dtype: jnp.dtype,
    whole: Whole = as_it_is,
) -> jax.Array:
    """What the head takes, [N, length, width] in `dtype`, from tokens, int [N, length]."""
    return _normed(_through_layers(params, tokens, architecture, dtype, whole)[0], params['norm'])


def gradient(
    params: Params,
    tokens: jax.Array,
    architecture: Architecture,
    dtype: jnp.dtype,
    scale: jax.Array,
    whole: Whole = as_it_is,
    summed: Summed = as_it_is,
) -> tuple[jax.Array, Any]:
    """The mean loss over a batch, and its gradient times `scale`.

    It is written out for two reasons. One layer's weights, activations and gradient at a time are
    in memory: of each only the input is kept. And every layer stands between barriers: fused with
    what is around it, it would be rounded differently for different numbers of devices.

    Args:
      params: as `init` makes them, or each device's parts.
      tokens: int [N, length + 1].
      architecture: of the network.
      dtype: of activations.
      scale: scalar.
      whole: makes whole weights of parts.
      summed: what becomes of a gradient.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    layer = Layer(architecture, dtype)
    x, layer_inputs = _through_layers(params, inputs, architecture, dtype, whole)

    def loss_of(x, norm, head):
        return sequence_losses(_normed(x, norm), head, labels).mean()

    # One after the other, so that one whole array of the vocabulary's size is in memory.
    x, norm, head = lax.optimization_barrier((x, params['norm'], params['head']))
    loss, pull_back = jax.vjp(loss_of, x, norm, whole('head', head))
    by_x, by_norm, by_head = lax.optimization_barrier(pull_back(scale.astype(loss.dtype)))
    by_head = summed('head', by_head)

    def step(by_x, saved):
        weights, x, by_x = lax.optimization_barrier((*saved, by_x))
        _, pull_back = jax.vjp(layer.apply, {'params': whole('layers', weights)}, x)
        by_weights, by_x = lax.optimization_barrier(pull_back(by_x))
        return by_x, summed('layers', by_weights['params'])

    by_x, by_layers = lax.scan(step, by_x, (params['layers'], layer_inputs), reverse=True)
    shape, wide = (architecture.vocabulary, architecture.width), params['embedding'].dtype
    by_embedding = lax.optimization_barrier(by_rows(shape, wide, inputs, by_x))
    return loss, {
        'embedding': summed('embedding', by_embedding),
        'layers': by_layers,
        'norm': by_norm,
        'head': by_head,
    }


def logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """Of every token, fp32 at least, [..., vocabulary], from the normed activations."""
    return wide_product('...w,wv->...v', x, head.astype(x.dtype))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of every token [tokens] in nats, from its logits [tokens, vocabulary] and its label.

    The label is found by comparison; the gradient of an index would be a scatter.
    """
    is_label = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    of_label = jnp.where(is_label, logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - of_label


def losses(x: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of every token in nats, without logits of all tokens at the same time.

    Args:
      x: [tokens, width], normed.
      head: [width, vocabulary].
      labels: int [tokens], the tokens that follow.

    Returns:
      fp32 at least, [tokens].
    """

    @jax.checkpoint
    def some(carry, chunk):
        x, labels = chunk
        return carry, cross_entropy(logits(x, head), labels)

    return lax.scan(some, None, (_chunks(x), _chunks(labels)))[1].ravel()


def sequence_losses(x: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over each sequence's tokens, fp32 at least, [N].

    Args:
      x: [N, length, width], normed.
      head: [width, vocabulary].
      labels: int [N, length].
    """
    by_token = losses(x.reshape(labels.size, -1), head, labels.ravel())
    return by_token.reshape(labels.shape).mean(1)
