# SPDX-License-Identifier: Apache-2.0
"""The names and layouts of Hugging Face's `LlamaForCausalLM`, from ours and back.

Theirs hold linear maps as (out, in), ours as (in, out). Heads and their rotary pairs (i, i + size /
2) are laid out alike.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.llama import network
from models.llama.architectures import ARCHITECTURES, Architecture
from models.llama.layer import FACTOR, HIGHEST, LOWEST, NORM_EPSILON
from settings.errors import CheckpointError
from training.checkpointing import pieces
from workloads.llama31_8b.fields import LONGEST_SEQUENCE

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


def described(architecture: Architecture) -> Any:
    """The shapes of a network's weights."""
    init = functools.partial(network.init, architecture=architecture)
    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))


def identify(params: Any) -> str:
    """The name of the network that these weights are of, by their names and shapes.

    Raises:
      CheckpointError: they are of none that is known.
    """
    found = jax.tree.map(np.shape, params)
    for name, architecture in ARCHITECTURES.items():
        if jax.tree.map(np.shape, described(architecture)) == found:
            return name
    raise CheckpointError(
        f'it is none of the networks {", ".join(ARCHITECTURES)}: other names or shapes of weights'
    )


def config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """What config.json says of a network: all that `LlamaForCausalLM` must know."""
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'torch_dtype': dtype,
        'vocab_size': architecture.vocabulary,
        'hidden_size': architecture.width,
        'intermediate_size': architecture.feed_forward,
        'num_hidden_layers': architecture.layers,
        'num_attention_heads': architecture.heads,
        'num_key_value_heads': architecture.key_value_heads,
        'head_dim': architecture.head_size,
        'hidden_act': 'silu',
        'rms_norm_eps': NORM_EPSILON,
        'rope_theta': architecture.rotary_base,
        'rope_scaling': {
            'rope_type': 'llama3',
            'factor': FACTOR,
            'low_freq_factor': LOWEST,
            'high_freq_factor': HIGHEST,
            'original_max_position_embeddings': architecture.original_length,
        },
        'max_position_embeddings': LONGEST_SEQUENCE,
        'tie_word_embeddings': False,
        'attention_bias': False,
        'mlp_bias': False,
    }


def _name(layer: int, part: str) -> str:
    return f'model.layers.{layer}.{part}.weight'


def exported(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by its name there, one after the other, as a view of ours.

    Args:
      params: of models/llama/network.py; NumPy's arrays, or TensorStore's, which are not read yet.
    """
    yield EMBEDDING, params['embedding']
    for layer in range(params['layers']['attention_norm']['scale'].shape[0]):
        for (module, leaf), theirs in IN_A_LAYER.items():
            yield _name(layer, theirs), params['layers'][module][leaf][layer].T
    yield NORM, params['norm']
    yield HEAD, params['head'].T


def _in_memory(shape: Sequence[int]) -> np.ndarray:
    return np.empty(shape, np.float32)


def imported(
    weights: Mapping[str, Any],
    architecture: Architecture,
    empty: Callable[[Sequence[int]], np.ndarray] = _in_memory,
    called: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The inverse of `exported`, a piece of one weight after the other.

    Args:
      weights: arrays by their name there, or what has a shape and gives arrays when it is sliced.
      architecture: of the network.
      empty: makes an fp32 array of a shape, to be filled.
      called: the name in `weights` of what is called so there; the same, if not given.

    Raises:
      KeyError: a weight is missing.
      CheckpointError: one has another shape.
    """
    params = jax.tree.map(lambda x: empty(x.shape), described(architecture))
    for name, ours in exported(params):
        name = called(name)
        theirs = weights[name]
        if tuple(theirs.shape) != ours.shape:
            raise CheckpointError(f'{name} has shape {list(theirs.shape)}, not {list(ours.shape)}')
        for piece in pieces(ours.shape, ours.dtype):
            ours[piece] = theirs[piece]
    return params
