# SPDX-License-Identifier: Apache-2.0
"""The names and layouts of Hugging Face's `LlamaForCausalLM`, from ours and back.

Theirs hold linear maps as (out, in), ours as (in, out). Heads and their rotary pairs (i, i + size /
2) are laid out alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

IN_A_LAYER = {
    ('attention_norm', 'scale'): 'input_layernorm',
    ('query', 'kernel'): 'self_attn.q_proj',
    ('key', 'kernel'): 'self_attn.k_proj',
    ('value', 'kernel'): 'self_attn.v_proj',
    ('output', 'kernel'): 'self_attn.o_proj',
    ('feed_forward_norm', 'scale'): 'post_attention_layernorm',
    ('gate', 'kernel'): 'mlp.gate_proj',
    ('up', 'kernel'): 'mlp.up_proj',
    ('down', 'kernel'): 'mlp.down_proj',
}
EMBEDDING, NORM, HEAD = 'model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight'


def _name(layer: int, part: str) -> str:
    return f'model.layers.{layer}.{part}.weight'


def exported(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by its name there, one after the other.

    Args:
      params: of models/llama/network.py, host arrays.
    """
    yield EMBEDDING, params['embedding']
    for layer in range(len(params['layers']['attention_norm']['scale'])):
        for (module, leaf), theirs in IN_A_LAYER.items():
            yield _name(layer, theirs), params['layers'][module][leaf][layer].T
    yield NORM, params['norm']
    yield HEAD, params['head'].T


def imported(weights: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    """The inverse of `exported`.

    Raises:
      KeyError: a weight is missing.
    """
    stacked: dict[str, Any] = {}
    for (module, leaf), theirs in IN_A_LAYER.items():
        arrays = [weights[_name(layer, theirs)].T for layer in range(layers)]
        stacked.setdefault(module, {})[leaf] = np.stack(arrays)
    return {
        'embedding': weights[EMBEDDING],
        'layers': stacked,
        'norm': weights[NORM],
        'head': weights[HEAD].T,
    }
