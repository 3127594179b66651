# SPDX-License-Identifier: Apache-2.0
"""Files of named weights, .safetensors and PyTorch's .pth: read with distrust, written whole.

`read` and `write` move a dictionary of NumPy arrays between memory and a file; `mapped` gives the
tensors of a large .pth file without reading them. PyTorch is needed for .pth only.
"""

import contextlib
import json
import pickle
import pickletools
import re
import shlex
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy

from settings.errors import CheckpointError

_DTYPES = ('F32', 'I64', 'torch.float32', 'torch.int64')  # Of weights and of counters.
_MAPPED_DTYPES = ('torch.float32', 'torch.bfloat16', 'torch.float16')
_MOST_OPCODES = 100_000  # Of a pickle; a ResNet-50 has a tenth. Deeper nesting overflows the stack.
_LISTED = 6  # Names that an error lists.
_ROOT = Path(__file__).resolve().parents[1]

StateDict = dict[str, np.ndarray]


def some(names: Iterable[str]) -> str:
    """The first of some names, for an error."""
    names = list(names)
    more = f', … and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
    return ', '.join(names[:_LISTED]) + more


def write(path: Path, state: StateDict, metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors or a .pth file, whole or not at all.

    In a .pth file the metadata are in `state_dict._metadata['']['source']`, where
    `load_state_dict` ignores them.

    Raises:
      CheckpointError: for another suffix.
      FileExistsError: `path` exists; it is not touched.
      FileNotFoundError: there is no folder to write it into.
    """
    if path.suffix not in ('.safetensors', '.pth'):
        raise CheckpointError(f'{path}: choose a name that ends in .safetensors or .pth')
    if path.exists():
        raise FileExistsError(f'{path} exists; move it away or choose another output')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} into')
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        partial = Path(folder) / path.name
        if path.suffix == '.safetensors':
            safetensors.numpy.save_file(state, partial, {'format': 'pt', **metadata})
        else:
            torch = _import_torch(path)
            tensors: Any = OrderedDict((name, torch.from_numpy(a)) for name, a in state.items())
            tensors._metadata = OrderedDict({'': {'version': 1, 'source': dict(metadata)}})
            torch.save(tensors, partial)
        partial.rename(path)


def read(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Reads a state dictionary and its metadata ({} if there are none).

    A file is never given more memory than it has bytes, whatever it says of its sizes.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is damaged, or holds anything but tensors of float32 and int64.
    """
    readers = {'.safetensors': _read_safetensors, '.pth': _read_pth, '.pt': _read_pth}
    with _damage_named(path):
        if path.suffix not in readers:
            raise CheckpointError(f'{path}: only .safetensors, .pth and .pt files are read')
        return readers[path.suffix](path)


def mapped(path: Path) -> dict[str, Any]:
    """The tensors of a .pth file by name, mapped into memory: they are read where they are used.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is damaged, of PyTorch before 1.6, or holds anything but tensors of
        float32, bfloat16 and float16.
    """
    with _damage_named(path):
        tensors = {name: x.detach() for name, x in _load_pth(path, mmap=True).items()}
        others = [
            f'{n} {x.dtype}' for n, x in tensors.items() if str(x.dtype) not in _MAPPED_DTYPES
        ]
        if others:
            raise CheckpointError(
                f'{path}: only weights of float32, bfloat16 and float16 are read, and not these: '
                + some(others)
            )
        return tensors


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Makes whatever a library raises for a file a CheckpointError."""
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {path}')
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Both libraries raise any for a damaged file.
        reason = str(error).splitlines()[0] if str(error) else 'it ends too early'
        raise CheckpointError(f'{path} is damaged, or no {path.suffix} file: {reason}') from error


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    others = [f'{name} {dtype}' for name, dtype in dtypes.items() if dtype not in _DTYPES]
    if others:
        raise CheckpointError(
            f'{path}: only float32 weights and int64 counters are read. Convert these, for example '
            f'with `state[name].float()`: {some(others)}'
        )


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    with safetensors.safe_open(path, framework='np') as file:
        _check_names(path)
        names = list(file.keys())
        # Before the values: NumPy has no bfloat16.
        _check_dtypes(path, {name: file.get_slice(name).get_dtype() for name in names})
        state = {name: file.get_tensor(name) for name in names}
        return state, dict(file.metadata() or {})


def _check_names(path: Path) -> None:
    """Rejects a header with a name twice: the format forbids it, but the library takes the last."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise CheckpointError(f'{path} is damaged: its header has a name twice')

    with path.open('rb') as file:
        json.loads(file.read(int.from_bytes(file.read(8), 'little')), object_pairs_hook=check)


def _import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        venv, setup, script = (
            shlex.quote(str(_ROOT / name))
            for name in ('.venv-cpu', 'scripts/setup_env.sh', Path(sys.argv[0]).absolute())
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
    """Checks sizes, checksums and pickle of a zip archive, of which PyTorch checks nothing."""
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


def _load_pth(path: Path, *, mmap: bool) -> Mapping[str, Any]:
    """The tensors of a file, checked but for their dtypes; with `mmap` not read."""
    torch = _import_torch(path)
    with path.open('rb') as file:
        if file.read(4) == b'PK\x03\x04':
            _check_archive(path)
        else:  # The form before PyTorch 1.6: five pickles, then the values.
            file.seek(0)
            for _ in range(5):
                _check_pickle(path, file)
    remedy = 'Save `model.state_dict()` alone'
    try:
        loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r'(Unsupported|GLOBAL|Trying)[^\n.]*[\w.]*', str(error))
        raise CheckpointError(
            f'{path} is rejected: its pickle is damaged or carries more than tensors, which could '
            f'run code when read ({found.group() if found else "no tensors"}). {remedy}'
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
            f'{path} is no plain dictionary of names and tensors: {some(others)}. {remedy}'
        )
    absent = [
        name
        for name, tensor in loaded.items()
        if tensor.layout is not torch.strided
        or tensor.device.type != 'cpu'
        or tensor.nbytes > tensor.untyped_storage().nbytes()
    ]
    if absent:
        raise CheckpointError(f'{path}: not all values of these are in the file: {some(absent)}')
    return loaded


def _read_pth(path: Path) -> tuple[StateDict, dict[str, str]]:
    loaded = _load_pth(path, mmap=False)
    _check_dtypes(path, {name: str(tensor.dtype) for name, tensor in loaded.items()})
    source = getattr(loaded, '_metadata', {}).get('', {}).get('source', {})
    if not all(isinstance(text, str) for pair in source.items() for text in pair):
        raise CheckpointError(f'{path} is damaged: its metadata are not names and texts')
    return {name: tensor.detach().numpy() for name, tensor in loaded.items()}, dict(source)
