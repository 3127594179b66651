# SPDX-License-Identifier: Apache-2.0
"""ResNet's variables under torchvision's names and in its layouts, and back, bit for bit.

The mapping is pure: {'params', 'batch_stats'} becomes a dictionary of NumPy arrays by name, which
`workloads.weight_files` reads and writes.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from models.resnet import network
from models.resnet.architectures import ARCHITECTURES
from settings.errors import CheckpointError
from workloads.weight_files import StateDict, some

# Inputs that torchvision's weights are made for: (RGB / 255 - mean) / std.
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)
# Inputs of (RGB - our means) = 255·std·(their inputs) + a constant per channel.
TORCHVISION_SCALE = tuple(255 * std for std in TORCHVISION_STD)

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
_COUNTER = 'num_batches_tracked'  # PyTorch's BatchNorm counts its steps; nothing here reads it.
_TORCH_ORDER = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO to OIHW, [in, out] to [out, in].


def torch_name(path: tuple[str, ...]) -> str:
    """torchvision's name of a variable.

    ('params', 'layer1_0', 'downsample_bn', 'scale') becomes 'layer1.0.downsample.1.weight'.
    """
    *modules, leaf = path[1:]
    name = '.'.join([*modules, _LEAVES[leaf]])
    name = re.sub(r'^(layer\d+)_(\d+)', r'\1.\2', name)
    return name.replace('downsample_conv', 'downsample.0').replace('downsample_bn', 'downsample.1')


def _counter(name: str) -> str:
    """The counter that PyTorch keeps beside a running variance."""
    return name.removesuffix('running_var') + _COUNTER


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(_TORCH_ORDER[array.ndim]))


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(np.argsort(_TORCH_ORDER[array.ndim])))


class _Entry(NamedTuple):
    """What a state dictionary has under a name, in PyTorch's layout; counters have no path."""

    path: tuple[str, ...] | None
    shape: tuple[int, ...]
    dtype: type = np.float32


@functools.cache
def _template(model: str, num_classes: int) -> dict[str, _Entry]:
    """The entries of a model's state dictionary by name."""
    net = network.create(model, num_classes=num_classes, bn_span=1)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = functools.partial(net.init, train=False)
    tree = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), image)
    entries = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        name = torch_name(path)
        entries[name] = _Entry(path, tuple(leaf.shape[i] for i in _TORCH_ORDER[leaf.ndim]))
        if path[-1] == 'var':
            entries[_counter(name)] = _Entry(None, (), np.int64)
    return entries


def to_state_dict(variables: Mapping[str, Any], step: int) -> StateDict:
    """A model's variables under torchvision's names.

    Values are copied as they are; the running variance stays the biased one, with which both
    frameworks evaluate alike (docs/equivalence.md).

    Args:
      variables: {'params': …, 'batch_stats': …}, arrays of any kind.
      step: optimizer steps done; it becomes BatchNorm's `num_batches_tracked`.

    Returns:
      {name: array} in the order of the variables, int64 scalars for the counters.
    """
    state = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(variables)).items():
        name = torch_name(path)
        state[name] = _to_torch_layout(np.asarray(leaf))
        if path[-1] == 'var':
            state[_counter(name)] = np.array(step, np.int64)
    return state


def _problems(state: Mapping[str, np.ndarray], model: str) -> dict[str, list[str]]:
    """Why `state` is not that model's: names by what is wrong with them."""
    head = state.get('fc.weight')
    classes = max(head.shape[0], 1) if head is not None and head.ndim == 2 else 1
    template = _template(model, classes)
    both = [(name, state[name], entry) for name, entry in template.items() if name in state]
    return {
        'missing': [name for name, entry in template.items() if entry.path and name not in state],
        'not known': [name for name in state if name not in template],
        'of another shape': [
            f'{name} {list(array.shape)} instead of {list(entry.shape)}'
            for name, array, entry in both
            if array.shape != entry.shape
        ],
        'of another dtype (convert them first)': [
            f'{name} {array.dtype} instead of {np.dtype(entry.dtype)}'
            for name, array, entry in both
            if array.dtype != entry.dtype
        ],
    }


def _impossible(state: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Names of arrays with which no network computes, by what is wrong with their values."""
    return {
        'NaN or infinite': [name for name, array in state.items() if not np.isfinite(array).all()],
        'variances below 0': [
            name
            for name, array in state.items()
            if name.endswith('running_var') and array.min() < 0
        ],
    }


def _listed(problems: Mapping[str, list[str]]) -> str:
    return ''.join(f'\n  {what}: {some(names)}' for what, names in problems.items() if names)


def identify(state: Mapping[str, np.ndarray]) -> str:
    """The model of `ARCHITECTURES` that fits best, by the number of keys that do not."""
    return min(ARCHITECTURES, key=lambda name: sum(map(len, _problems(state, name).values())))


def from_state_dict(state: Mapping[str, np.ndarray], model: str | None = None) -> dict[str, Any]:
    """The inverse of `to_state_dict`.

    Args:
      state: arrays by torchvision's names; `num_batches_tracked` may be there or not.
      model: which model it must be; None: the one that fits best.

    Returns:
      {'params': …, 'batch_stats': …}, float32.

    Raises:
      CheckpointError: naming the keys that are missing, unknown, of another shape or dtype, or
        whose values are impossible: NaN, infinite, a variance below 0.
    """
    nearest = '' if model else ', the nearest of the models here'
    model = model or identify(state)
    problems = _listed(_problems(state, model))
    if problems:
        raise CheckpointError(f'the keys are not those of {model}{nearest}:{problems}')
    impossible = _listed(_impossible(state))
    if impossible:
        raise CheckpointError(f'{model} cannot compute with these values:{impossible}')
    template = _template(model, state['fc.weight'].shape[0])
    weights = {entry.path: name for name, entry in template.items() if entry.path}
    return flax.traverse_util.unflatten_dict(
        {path: _from_torch_layout(state[name]) for path, name in weights.items()}
    )


def scale_input(state: Mapping[str, np.ndarray], factors: tuple[float, ...]) -> StateDict:
    """The same network for inputs whose channel c is 1/factors[c] as large.

    Exact but for one rounding per weight: a convolution is linear, and zeros, the padding, stay
    zeros. A shift of the input (another mean) cannot be folded: it would shift the padding too.
    """
    scale = np.array(factors)[None, :, None, None]
    return dict(state) | {'conv1.weight': (state['conv1.weight'] * scale).astype(np.float32)}
