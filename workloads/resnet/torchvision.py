# SPDX-License-Identifier: Apache-2.0
"""Weights in PyTorch's form: torchvision's names and layouts, in safetensors or .pth files.

The mapping is pure: `to_state_dict` and `from_state_dict` turn {'params', 'batch_stats'} into a
dictionary of NumPy arrays and back, bit for bit. `read` and `write` move such a dictionary between
memory and a file, and are the only functions here that touch one. PyTorch is needed for .pth only.
"""

import contextlib
import functools
import json
import os
import pickle
import pickletools
import re
import shlex
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from models import resnet as models

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
_DTYPES = ('F32', 'I64', 'torch.float32', 'torch.int64')  # Of weights and of counters.
_MOST_OPCODES = 100_000  # Of a pickle; a ResNet-50 has a tenth. Deeper nesting overflows the stack.
_LISTED = 6  # Keys that an error names of each kind.
_ROOT = Path(__file__).resolve().parents[2]

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
    return np.ascontiguousarray(array.transpose(_TORCH_ORDER[array.ndim]))


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
        torch_name(path): (path, tuple(leaf.shape[axis] for axis in _TORCH_ORDER[leaf.ndim]))
        for path, leaf in flax.traverse_util.flatten_dict(tree).items()
    }


def _counter(name: str) -> str:
    """The counter that PyTorch keeps beside a running variance."""
    return name.removesuffix('running_var') + _COUNTER


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


def _some(names: list[str]) -> str:
    more = f', … and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
    return ', '.join(names[:_LISTED]) + more


def _problems(state: Mapping[str, np.ndarray], model: str) -> list[tuple[int, str]]:
    """Why `state` is not that model's, as (how many keys, what is wrong with them)."""
    head = state.get('fc.weight')
    classes = max(head.shape[0], 1) if head is not None and head.ndim == 2 else 1
    template = _template(model, classes)
    counters = {_counter(name) for name in template if name.endswith('running_var')}
    missing = [name for name in template if name not in state]
    extra = [name for name in state if name not in template and name not in counters]
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
    miscounted = [
        f'{name} {state[name].dtype}{list(state[name].shape)}'
        for name in sorted(counters)
        if name in state and (state[name].dtype, state[name].shape) != (np.int64, ())
    ]
    found = {
        'missing': missing,
        'not known': extra,
        'of another shape': shapes,
        'not float32 (convert them first)': dtypes,
        'counters that are no int64 scalars': miscounted,
    }
    return [(len(keys), f'{what}: {_some(keys)}') for what, keys in found.items() if keys]


def _impossible(state: Mapping[str, np.ndarray]) -> list[str]:
    """Values with which no network computes, by what is wrong with the arrays that hold them."""
    weights = {name: array for name, array in state.items() if not name.endswith(_COUNTER)}
    infinite = [name for name, array in weights.items() if not np.isfinite(array).all()]
    negative = [
        name for name, array in weights.items() if name.endswith('running_var') and array.min() < 0
    ]
    found = {'NaN or infinite': infinite, 'variances below 0': negative}
    return [f'{what}: {_some(names)}' for what, names in found.items() if names]


def identify(state: Mapping[str, np.ndarray]) -> str:
    """The model of `models.NAMES` that fits best, by the number of keys that do not."""
    return min(models.NAMES, key=lambda name: sum(count for count, _ in _problems(state, name)))


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
    problems = _problems(state, model)
    if problems:
        lines = '\n  '.join(text for _, text in problems)
        raise CheckpointError(f'the keys are not those of {model}{nearest}:\n  {lines}')
    impossible = _impossible(state)
    if impossible:
        raise CheckpointError(
            f'{model} cannot compute with these values:\n  ' + '\n  '.join(impossible)
        )
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

    A file is never given more memory than it has bytes, whatever it says of its sizes.

    Raises:
      FileNotFoundError: when there is no such file.
      CheckpointError: for a damaged file, one that holds anything but tensors, or tensors that are
        neither float32 nor int64.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {path}')
    readers = {'.safetensors': _read_safetensors, '.pth': _read_pth, '.pt': _read_pth}
    if path.suffix not in readers:
        raise CheckpointError(f'{path}: only .safetensors, .pth and .pt files are read')
    try:
        return readers[path.suffix](path)
    except CheckpointError:
        raise
    except Exception as error:  # Both libraries raise any for a damaged file.
        reason = str(error).splitlines()[0] if str(error) else 'it ends too early'
        raise CheckpointError(f'{path} is damaged, or no {path.suffix} file: {reason}') from error


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    others = [f'{name} {dtype}' for name, dtype in dtypes.items() if dtype not in _DTYPES]
    if others:
        raise CheckpointError(
            f'{path}: only float32 weights and int64 counters are read. Convert these knowingly, '
            f'with `state[name].float()`: {_some(others)}'
        )


def _has_double_names(path: Path) -> bool:
    """Whether a file that the library reads names an array twice; the format forbids it."""
    doubled = False

    def note(pairs: list[tuple[str, Any]]) -> None:
        nonlocal doubled
        doubled = doubled or len(dict(pairs)) < len(pairs)

    with path.open('rb') as file:
        json.loads(file.read(int.from_bytes(file.read(8), 'little')), object_pairs_hook=note)
    return doubled


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    with safetensors.safe_open(path, framework='np') as file:
        if _has_double_names(path):
            raise CheckpointError(f'{path} is damaged: its header has a name twice')
        names = list(file.keys())
        # Before the values: NumPy has no bfloat16.
        _check_dtypes(path, {name: file.get_slice(name).get_dtype() for name in names})
        state = {name: file.get_tensor(name) for name in names}
        return state, dict(file.metadata() or {})


def _import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        venv, setup, script = (
            shlex.quote(str(_ROOT / name))
            for name in ('.venv-cpu', 'scripts/setup_env.sh', 'scripts/convert_checkpoint.py')
        )
        raise CheckpointError(
            f'{path}: .pth files need PyTorch, whose libraries would overwrite those of '
            'requirements.txt. Make it an environment of its own, and run the same command there; '
            f'or use a .safetensors file, which needs no PyTorch:\n'
            f'  VENV={venv} {setup} --cpu --test\n'
            f'  {venv}/bin/python {script} …'
        ) from error
    return torch


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    for count, _ in enumerate(pickletools.genops(file)):
        if count > _MOST_OPCODES:
            raise CheckpointError(f'{path} is rejected: its pickle is no list of tensors')


def _check_archive(path: Path) -> None:
    """Checks sizes, checksums and pickle of a zip archive, of which PyTorch checks nothing.

    Raises:
      CheckpointError: naming the member that is damaged, or larger when read than in the file.
      zipfile.BadZipFile: when it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [member.filename for member in members if member.compress_type]
        if packed:
            raise CheckpointError(
                f'{path} is rejected: {packed[0]} in it is compressed, which `torch.save` never '
                'does and which could fill the memory. Save `model.state_dict()` anew'
            )
        names = {member.filename for member in members}
        too_large = sum(member.file_size for member in members) > path.stat().st_size
        if too_large or len(names) < len(members):
            raise CheckpointError(f'{path} is damaged: its members overlap')
        damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f'{path} is damaged: the checksum of {damaged} in it is wrong')
        for name in names:
            if name.endswith('/data.pkl'):
                with archive.open(name) as file:
                    _check_pickle(path, file)


def _read_pth(path: Path) -> tuple[StateDict, dict[str, str]]:
    torch = _import_torch(path)
    with path.open('rb') as file:
        if file.read(4) == b'PK\x03\x04':
            _check_archive(path)
        else:  # The form before PyTorch 1.6: five pickles, then the values.
            file.seek(0)
            for _ in range(5):
                _check_pickle(path, file)
    try:
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(Unsupported|GLOBAL|Trying)[^\n.]*[\w.]*', str(error))
        raise CheckpointError(
            f'{path} is rejected: its pickle is damaged or carries more than tensors, which could '
            f'run code when read ({found.group() if found else "no tensors"}). Save '
            '`model.state_dict()` alone'
        ) from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f'{path} holds no state dictionary but {type(loaded).__name__}')
    others = [
        str(key)
        for key, value in loaded.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise CheckpointError(
            f'{path} is no plain state dictionary of names and tensors: {_some(others)}. Save '
            '`model.state_dict()` alone'
        )
    _check_dtypes(path, {name: str(tensor.dtype) for name, tensor in loaded.items()})
    hollow = [
        name
        for name, tensor in loaded.items()
        if tensor.layout is not torch.strided
        or tensor.device.type != 'cpu'
        or tensor.nbytes > tensor.untyped_storage().nbytes()
    ]
    if hollow:
        raise CheckpointError(f'{path}: not all values of these are in the file: {_some(hollow)}')
    source = getattr(loaded, '_metadata', {}).get('', {}).get('source', {})
    if not all(isinstance(text, str) for pair in source.items() for text in pair):
        raise CheckpointError(f'{path} is damaged: its metadata are not names and texts')
    return {name: tensor.detach().numpy() for name, tensor in loaded.items()}, dict(source)
