# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole optimizer steps, with nothing in them about hardware.

A checkpoint is a tree of arrays (weights, running statistics, optimizer state, step, loss scale)
and a small JSON record (step, configuration with the seed, fingerprints), as Orbax writes them.
Arrays are read one by one, whole or in part. `checkpoint_saver` writes them while a run trains, and
`restoring` reads what a run starts from.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

import fingerprints
from exact_sums import named
from fingerprints import shown
from settings.errors import CheckpointError

PIECE = 2**23  # Bytes of an array that are read at once, to be converted.
CHUNK = 2**22  # Bytes of an array that are compressed at once.
FILE = 2**24  # Bytes of a file; TensorStore has as many in memory before it writes them.


def dtype_and_shape(x: Any) -> str:
    """Both, as people see them."""
    return f'{np.dtype(x.dtype)}{list(x.shape)}'


def described(tree: Any) -> dict[str, str]:
    """The dtypes and shapes of arrays, by name."""
    return {name: dtype_and_shape(x) for name, x in named(tree)}


def signed(
    record: Mapping[str, Any], tree: Mapping[str, Any], marks: Sequence[int] | None = None
) -> dict[str, Any]:
    """A checkpoint's record with the fingerprints of its arrays.

    Args:
      record: JSON.
      tree: of arrays.
      marks: `fingerprints.of` of the tree, if its arrays are not all NumPy's.
    """
    marks = fingerprints.of_host_arrays(tree) if marks is None else marks
    each = {name: shown(mark) for (name, _), mark in zip(named(tree), marks, strict=True)}
    return dict(record) | {'fingerprint': shown(marks), 'fingerprints': each}


def pieces(shape: Sequence[int], dtype: Any) -> Iterator[Any]:
    """Slices of the first axis, one after the other, each of PIECE bytes at most or of one row."""
    if not shape:
        yield ...
        return
    rows = max(1, PIECE // max(1, np.dtype(dtype).itemsize * math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


class Stored:
    """A checkpoint on disk, WORKDIR/checkpoints/STEP. Its arrays are read one by one.

    Args:
      directory: of the checkpoint.
      threads: that read and decompress chunks, if not as many as TensorStore chooses. For each
        thread glibc's `malloc` keeps some of what was freed, so fewer take less memory.

    Raises:
      CheckpointError: when it is missing or incomplete.
    """

    def __init__(self, directory: Path, threads: int | None = None):
        limit = {} if threads is None else {'limit': threads}
        self._context = tensorstore.Context(
            {'file_io_concurrency': limit, 'data_copy_concurrency': limit}
        )
        try:
            self._directory = directory.resolve()  # TensorStore takes no relative paths.
        except (OSError, RuntimeError) as error:  # The latter for a link to itself, up to 3.12.
            raise _unreadable(error) from error
        if not (self._directory / 'state').is_dir():
            raise CheckpointError(
                f'{self._directory} is no checkpoint: it has no folder "state". Name one, '
                'WORKDIR/checkpoints/STEP'
            )
        try:
            self.record = json.loads((self._directory / 'record' / 'metadata').read_text())
            self._arrays, self._paths = self._opened()
        except CheckpointError:
            raise
        except Exception as error:
            raise _unreadable(error) from error
        if 'fingerprints' not in self.record:
            raise CheckpointError(
                'it is of an earlier version of this program, and has no fingerprints'
            )

    def _opened(self) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """TensorStore's arrays by name, and the paths of all leaves, empty subtrees too."""
        state = self._directory / 'state'
        entries = json.loads((state / '_METADATA').read_text())['tree_metadata'].values()
        store = {'driver': 'ocdbt', 'base': f'file://{state}/'}
        keys = tensorstore.KvStore.open(store, context=self._context).result().list().result()
        present = {key.decode().removesuffix('/.zarray') for key in keys}
        arrays, paths = {}, []
        for entry in entries:
            path = tuple(part['key'] for part in entry['key_metadata'])
            paths.append(path)
            if entry['value_metadata']['skip_deserialize']:  # An empty subtree.
                continue
            if '.'.join(path) not in present:
                raise CheckpointError(f'it has no array {"/".join(path)}')
            spec = {'driver': 'zarr', 'kvstore': store, 'path': f'{".".join(path)}/'}
            arrays['/'.join(path)] = tensorstore.open(spec, context=self._context).result()
        return arrays, paths

    def described(self) -> dict[str, str]:
        """The arrays' dtypes and shapes by name."""
        return {name: dtype_and_shape(shape) for name, shape in self._shapes().items()}

    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
            for name, array in self._arrays.items()
        }

    def _tree(self, leaf: Callable[[str], Any]) -> dict[str, Any]:
        names = {path: '/'.join(path) for path in self._paths}
        return traverse_util.unflatten_dict(
            {path: leaf(name) if name in self._arrays else {} for path, name in names.items()}
        )

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """An array, or a part of it."""
        try:
            return np.asarray(self._arrays[name][index].read().result())
        except Exception as error:
            raise _unreadable(error, name) from error

    def placed(self, name: str, like: Any) -> jax.Array:
        """An array on the devices as `like`, of which a process reads what its own devices hold."""
        where = like.sharding.addressable_devices_indices_map(like.shape)
        # Never NumPy's own memory, which could not be donated: it would be copied with all others.
        parts = [
            jax.device_put(self.read(name, index), device, may_alias=False)
            for device, index in where.items()
        ]
        placed = jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)
        return jax.block_until_ready(placed)  # What was read is in memory until then.

    def tree(self) -> dict[str, Any]:
        """All arrays, whole, on the host."""
        return self._tree(self.read)

    def unread(self) -> dict[str, Any]:
        """All arrays as TensorStore's, which `np.asarray` reads: them, or slices of them."""
        return self._tree(self._arrays.__getitem__)

    def check(self, names: Iterable[str]) -> list[str]:
        """Reads arrays chunk by chunk, and judges them; the names of those with values not finite.

        Raises:
          CheckpointError: when one is not what was written.
        """
        tree = self._tree(self._shapes().__getitem__)
        shapes = {name: array.shape for name, array in self._arrays.items()}
        firsts = fingerprints.first_places(tree, shapes)
        first = {name: f for (name, _), f in zip(named(tree), firsts, strict=True)}
        marks, non_finite = {}, []
        for name in names:
            total, finite = 0, True
            for starts, chunk in self._chunks(name):
                total += fingerprints.words_on_host(chunk, starts, shapes[name], first[name])
                finite &= bool(np.isfinite(chunk).all())
            marks[name] = shown(total % 2**64)
            non_finite += [] if finite else [name.removeprefix('variables/')]
        self.compare(marks)
        return non_finite

    def _chunks(self, name: str) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """An array's chunks, as they are on disk, and where they begin."""
        array = self._arrays[name]
        sizes = array.chunk_layout.read_chunk.shape or ()
        steps = [range(0, n, size) for n, size in zip(array.shape, sizes, strict=True)]
        for starts in itertools.product(*steps):
            ends = [min(s + size, n)
                    for s, size, n in zip(starts, sizes, array.shape, strict=True)]  # fmt: skip
            yield starts, self.read(name, tuple(map(slice, starts, ends)))

    def compare(self, marks: Mapping[str, str]) -> None:
        """Raises CheckpointError unless arrays, by name, have the fingerprints of the record."""
        written = self.record['fingerprints']
        damaged = [name for name, mark in marks.items() if written.get(name) != mark]
        if damaged:
            raise CheckpointError(
                f'{len(damaged)} of its arrays are not what was written, the first is {damaged[0]}'
            )


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a run's directory, whole or not, the newest first."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal()]
    return sorted((n for n in numbers if str(n) in names), reverse=True)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint, WORKDIR/checkpoints/STEP, as (tree of host arrays, record).

    Raises:
      CheckpointError: when it is missing, or is not what was written.
    """
    stored = Stored(directory)
    tree = stored.tree()
    stored.compare(signed({}, tree)['fingerprints'])
    return tree, stored.record


def _unreadable(error: Exception, name: str = '') -> CheckpointError:
    what = f'{name} of it' if name else 'it'
    return CheckpointError(f'{what} cannot be read: {first_line(error)}')


def write(directory: Path, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes one checkpoint outside any run, whole or not at all, as `read` reads it.

    Args:
      directory: must not exist.
      tree: nested dicts of host arrays, with at least `variables` and `step`.
      record: JSON.

    Raises:
      FileExistsError: when `directory` exists; it is not touched.
    """
    if directory.exists():
        raise FileExistsError(f'{directory} exists; move it away or choose another output')
    (cpu,) = jax.local_devices(backend='cpu')[:1]
    # Orbax copies all of NumPy's arrays before it writes, but no JAX array.
    arrays = jax.tree.map(lambda x: jax.device_put(x, cpu, may_alias=True), tree)
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
        )
    ) as checkpointer:
        checkpointer.save(directory.resolve(), args=to_save(arrays, signed(record, tree)))


def to_save(tree: Mapping[str, Any], record: Mapping[str, Any]) -> ocp.args.Composite:
    """What Orbax takes of a checkpoint, of JAX's arrays and a record."""

    def chunks(x: jax.Array) -> ocp.SaveArgs:
        # Of stacked layers, a chunk has one, for they are read one by one.
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if x.ndim > 2 else ())

    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(
            tree, save_args=jax.tree.map(chunks, tree), ocdbt_target_data_file_size=FILE
        ),
        record=ocp.args.JsonSave(dict(record)),
    )


def first_line(error: Exception) -> str:
    """What an exception says, or its name, on one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
