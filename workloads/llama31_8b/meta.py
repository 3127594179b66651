# SPDX-License-Identifier: Apache-2.0
"""The names and layouts of Meta's own files of Llama's weights, to Hugging Face's.

Both hold linear maps as (out, in). The rows of queries and keys are in another order: Meta turns
the pairs (2i, 2i + 1) of a head, Hugging Face and we the pairs (i, i + size / 2).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.llama.architectures import ARCHITECTURES, Architecture
from models.llama.layer import NORM_EPSILON
from settings.errors import CheckpointError
from workloads.llama31_8b.hugging_face import EMBEDDING, HEAD, NORM

OUTSIDE = {EMBEDDING: 'tok_embeddings.weight', NORM: 'norm.weight', HEAD: 'output.weight'}
IN_A_LAYER = {
    'input_layernorm': 'attention_norm',
    'self_attn.q_proj': 'attention.wq',
    'self_attn.k_proj': 'attention.wk',
    'self_attn.v_proj': 'attention.wv',
    'self_attn.o_proj': 'attention.wo',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'feed_forward.w1',
    'mlp.down_proj': 'feed_forward.w2',
    'mlp.up_proj': 'feed_forward.w3',
}


def name_of(theirs: str) -> str:
    """Meta's name of a weight, from Hugging Face's."""
    if theirs in OUTSIDE:
        return OUTSIDE[theirs]
    _, layers, number, part = theirs.removesuffix('.weight').split('.', 3)
    return f'{layers}.{number}.{IN_A_LAYER[part]}.weight'


class Reordered:
    """A matrix with its rows in another order, read when it is sliced.

    Args:
      weight: has a shape, and gives arrays for arrays of row numbers.
      order: which of its rows is here the first, the second, …; int64 [rows].
    """

    def __init__(self, weight: Any, order: np.ndarray):
        self.shape, self._weight, self._order = weight.shape, weight, order

    def __getitem__(self, piece: Any) -> np.ndarray:
        rows: np.ndarray = self._weight[self._order[piece]]
        return rows


def reordered(weights: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Weights by Meta's names, with the rows of queries and keys in Hugging Face's order.

    Raises:
      CheckpointError: they are of more layers than the network has.
    """
    if any(name.startswith(f'layers.{architecture.layers}.') for name in weights):
        raise CheckpointError(
            f'it has more than the {architecture.layers} layers of its params.json'
        )
    size, changed = architecture.head_size, dict(weights)
    for part, heads in (('wq', architecture.heads), ('wk', architecture.key_value_heads)):
        order = np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).ravel()
        for layer in range(architecture.layers):
            name = f'layers.{layer}.attention.{part}.weight'
            changed[name] = Reordered(weights[name], order)
    return changed


def architecture_of(described: Mapping[str, Any]) -> Architecture:
    """The network that a params.json describes.

    It does not say by what the rotary frequencies are scaled: that is taken to be Llama 3.1's.

    Raises:
      KeyError: a field is missing.
      CheckpointError: it is none of the networks that are known here; the text says where it
        differs from the most similar one.
    """
    given = {'n_kv_heads': described['n_heads'], 'ffn_dim_multiplier': 1.0, **described}
    multiple = given.pop('multiple_of')
    # As llama_models' FeedForward computes it (github.com/meta-llama/llama-models).
    inside = int(given.pop('ffn_dim_multiplier') * int(2 * 4 * given['dim'] / 3))
    given['width of the feed-forward part'] = multiple * math.ceil(inside / multiple)
    best: list[str] | None = None
    for name, architecture in ARCHITECTURES.items():
        ours = {
            'dim': architecture.width,
            'n_layers': architecture.layers,
            'n_heads': architecture.heads,
            'n_kv_heads': architecture.key_value_heads,
            'vocab_size': architecture.vocabulary,
            'width of the feed-forward part': architecture.feed_forward,
            'norm_eps': NORM_EPSILON,
            'rope_theta': architecture.rotary_base,
            'use_scaled_rope': True,
        }
        others = [
            f'{field} is {given.get(field)!r}, and of {name} {ours.get(field)!r}'
            for field in {**ours, **given}
            if given.get(field) != ours.get(field)
        ]
        if not others:
            return architecture
        best = others if best is None or len(others) < len(best) else best
    raise CheckpointError(
        f'its params.json describes none of the networks {", ".join(ARCHITECTURES)}: '
        + '; '.join(best or ())
    )
