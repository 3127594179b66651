# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783): tokens go in, their losses come out.

    tokens → embedding → layers → norm → head → logits → loss

A layer is a Flax module, and the weights of all layers are stacked. Logits are made for some tokens
at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from models.llama.architectures import Architecture
from models.llama.layer import NORM_EPSILON, WEIGHT_DEVIATION, Layer, wide_product

TOKENS_AT_A_TIME = 1024  # Of which something as wide as the vocabulary is in memory.

Params = dict[str, Any]
# Functions of the name and the arrays, of one layer for 'layers': whole weights from this device's
# parts; what becomes of the gradient by whole weights.
Whole = Callable[[str, Any], Any]
Summed = Callable[[str, Any], Any]


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
    params: Params, tokens: jax.Array, layer: Layer, whole: Whole
) -> tuple[jax.Array, jax.Array]:
    """What comes out of the last layer, and every layer's input [layers, N, length, width]."""

    def step(x, weights):
        weights, x = lax.optimization_barrier((weights, x))
        return layer.apply({'params': whole('layers', weights)}, x), x

    x = whole('embedding', params['embedding'])[tokens].astype(layer.dtype)
    return lax.scan(step, x, params['layers'])


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    norm = nn.RMSNorm(epsilon=NORM_EPSILON, dtype=x.dtype)
    return norm.bind({'params': {'scale': scale}})(x)


def activations(
    params: Params,
    tokens: jax.Array,
    layer: Layer,
    whole: Whole = as_it_is,
) -> jax.Array:
    """What the head takes, [N, length, width] in the layer's dtype, from tokens [N, length]."""
    return _normed(_through_layers(params, tokens, layer, whole)[0], params['norm'])


def gradient(
    params: Params,
    tokens: jax.Array,
    layer: Layer,
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
      layer: every one of the network, unbound.
      scale: scalar.
      whole: makes whole weights of parts.
      summed: what becomes of a gradient.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    x, layer_inputs = _through_layers(params, inputs, layer, whole)

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
    sizes, wide = layer.architecture, params['embedding'].dtype
    by_embedding = lax.optimization_barrier(
        by_rows((sizes.vocabulary, sizes.width), wide, inputs, by_x)
    )
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
