# SPDX-License-Identifier: Apache-2.0
"""Weights in PyTorch's form: torchvision's names and layouts, in safetensors or .pth files.

The mapping is pure: `to_state_dict` and `from_state_dict` turn {'params', 'batch_stats'} into a
dictionary of NumPy arrays and back, bit for bit. `read` and `write` move such a dictionary between
memory and a file, and are the only functions here that touch one. PyTorch is needed for .pth only.
"""

import contextlib
import functools
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import models

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
_LISTED = 6  # Keys that an error names of each kind.

StateDict = dict[str, np.ndarray]


class CheckpointError(ValueError):
    """Weights that cannot be converted; the text names the keys and what would be right."""


def torch_name(path: tuple[str, ...]) -> str:
    """torchvision's name of a variable.

    ('params', 'layer1_0', 'downsample_bn', 'scale') becomes 'layer1.0.downsample.1.weight'.
    """
    *modules, leaf = path[1:]
    name = '.'.join([*modules, _LEAVES[leaf]])
    name = re.sub(r'^(layer\d+)_(\d+)', r'\1.\2', name)
    return name.replace('downsample_conv', 'downsample.0').replace('downsample_bn', 'downsample.1')


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, [in, out] to [out, in]; vectors stay."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
    return np.ascontiguousarray(array.transpose(order))


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
    return np.ascontiguousarray(array.transpose(order))


@functools.cache
def _template(model: str, num_classes: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Of every variable of a model: {torch name: (path, shape in PyTorch's layout)}."""
    network = models.create(model, num_classes=num_classes, bn_span=1)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = functools.partial(network.init, train=False)
    tree = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), image)
    return {
        torch_name(path): (path, _to_torch_layout(np.broadcast_to(np.float32(0), leaf.shape)).shape)
        for path, leaf in flax.traverse_util.flatten_dict(tree).items()
    }


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
            state[name.replace('running_var', _COUNTER)] = np.array(step, np.int64)
    return state


def _some(names: list[str]) -> str:
    more = f', … and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
    return ', '.join(names[:_LISTED]) + more


def _faults(state: Mapping[str, np.ndarray], model: str) -> list[tuple[int, str]]:
    """Why `state` is not that model's, as (how many keys, what is wrong with them)."""
    head = state.get('fc.weight')
    classes = head.shape[0] if head is not None and head.ndim == 2 else 1
    template = _template(model, classes)
    missing = [name for name in template if name not in state]
    extra = [name for name in state if name not in template and not name.endswith(_COUNTER)]
    shapes = [
        f'{name} {list(state[name].shape)} instead of {list(shape)}'
        for name, (_, shape) in template.items()
        if name in state and state[name].shape != shape
    ]
    dtypes = [
        f'{name} {state[name].dtype}'
        for name in template
        if name in state and state[name].dtype != np.float32
    ]
    found = {
        'missing': missing,
        'not known': extra,
        'of another shape': shapes,
        'not float32 (convert them first)': dtypes,
    }
    return [(len(keys), f'{what}: {_some(keys)}') for what, keys in found.items() if keys]


def identify(state: Mapping[str, np.ndarray]) -> str:
    """The model of `models.NAMES` that fits best, by the number of keys that are at fault."""
    return min(models.NAMES, key=lambda name: sum(count for count, _ in _faults(state, name)))


def from_state_dict(state: Mapping[str, np.ndarray], model: str | None = None) -> dict[str, Any]:
    """The inverse of `to_state_dict`.

    Args:
      state: arrays by torchvision's names; `num_batches_tracked` may be there or not.
      model: which model it must be; None: the one that fits best.

    Returns:
      {'params': …, 'batch_stats': …}, float32.

    Raises:
      CheckpointError: naming the keys that are missing, unknown, of another shape or dtype.
    """
    nearest = '' if model else ', the nearest of the models here'
    model = model or identify(state)
    faults = _faults(state, model)
    if faults:
        lines = '\n  '.join(text for _, text in faults)
        raise CheckpointError(f'the keys are not those of {model}{nearest}:\n  {lines}')
    template = _template(model, state['fc.weight'].shape[0])
    return flax.traverse_util.unflatten_dict(
        {path: _from_torch_layout(state[name]) for name, (path, _) in template.items()}
    )


def scale_input(state: Mapping[str, np.ndarray], factors: tuple[float, ...]) -> StateDict:
    """The same network for inputs whose channel c is 1/factors[c] as large.

    Exact but for one rounding per weight: a convolution is linear, and zeros, the padding, stay
    zeros. A shift of the input (another mean) cannot be folded: it would shift the padding too.
    """
    scale = np.array(factors)[None, :, None, None]
    return dict(state) | {'conv1.weight': (state['conv1.weight'] * scale).astype(np.float32)}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well.

    Raises:
      FileExistsError: when `path` exists; it is not touched.
    """
    if path.exists():
        raise FileExistsError(f'{path} exists; move it away or choose another output')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} into')
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        os.rename(partial, path)


def write(path: Path, state: StateDict, metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors or a .pth file, whole or not at all.

    In a .pth file the metadata are in `state_dict._metadata['']['source']`, where
    `load_state_dict` ignores them.

    Raises:
      CheckpointError: for another suffix.
      FileExistsError: when `path` exists; it is not touched.
    """
    path = Path(path)
    if path.suffix not in ('.safetensors', '.pth'):
        raise CheckpointError(f'{path}: choose a name that ends in .safetensors or .pth')
    with replacing(path) as partial:
        if path.suffix == '.safetensors':
            metadata = {'format': 'pt', **metadata}
            safetensors.numpy.save_file(state, partial, metadata)
            return
        torch = _import_torch(path)
        tensors: Any = OrderedDict((name, torch.from_numpy(array)) for name, array in state.items())
        tensors._metadata = OrderedDict({'': {'version': 1, 'source': dict(metadata)}})
        torch.save(tensors, partial)


def read(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Reads a state dictionary and its metadata ({} if there are none).

    Raises:
      FileNotFoundError: when there is no such file.
      CheckpointError: for a damaged file, one that holds anything but tensors, or half precision.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {path}')
    if path.suffix == '.safetensors':
        state, metadata = _read_safetensors(path)
    elif path.suffix in ('.pth', '.pt'):
        state, metadata = _read_pth(path)
    else:
        raise CheckpointError(f'{path}: only .safetensors, .pth and .pt files are read')
    return state, metadata


def _refuse_half(path: Path, dtypes: Mapping[str, str]) -> None:
    half = [f'{name} {dtype}' for name, dtype in dtypes.items() if '16' in dtype or 'F8' in dtype]
    if half:
        raise CheckpointError(
            f'{path}: half precision, where float32 is needed (convert it knowingly, with '
            f'`state[name].float()`): {_some(half)}'
        )


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework='np') as file:
            names = list(file.keys())
            # Before the values: NumPy has no bfloat16.
            _refuse_half(path, {name: file.get_slice(name).get_dtype() for name in names})
            state = {name: file.get_tensor(name) for name in names}
            return state, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f'{path} is damaged or no safetensors file: {error}') from error


def _import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f'{path}: .pth files need PyTorch (pip install -r requirements-torch.txt); '
            '.safetensors files do not'
        ) from error
    return torch


def _read_pth(path: Path) -> tuple[StateDict, dict[str, str]]:
    torch = _import_torch(path)
    try:
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(Unsupported|GLOBAL|Trying)[^\n.]*[\w.]*', str(error))
        raise CheckpointError(
            f'{path} is refused: its pickle is damaged or carries more than tensors, which could '
            f'run code when read ({found.group() if found else "no tensors"}). Save '
            '`model.state_dict()` alone'
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else 'it ends too early'
        raise CheckpointError(f'{path} is damaged: {reason}') from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f'{path} holds no state dictionary but {type(loaded).__name__}')
    others = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f'{path} is no plain state dictionary; these are no tensors: {_some(others)}. Save '
            '`model.state_dict()` alone'
        )
    _refuse_half(path, {name: str(tensor.dtype) for name, tensor in loaded.items()})
    source = getattr(loaded, '_metadata', {}).get('', {}).get('source', {})
    return {name: t.detach().numpy() for name, t in loaded.items()}, dict(source)
