# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole optimizer steps, with nothing in them about hardware.

A checkpoint is a tree of arrays (weights, running statistics, optimizer state, step, loss scale)
and a small JSON record (step, configuration with the seed, fingerprints), as Orbax writes them.
Arrays are read one by one and every process reads the parts that are its own, so a run continues on
any number of devices and processes. `checkpoint_saver` writes them while a run trains.
"""

import dataclasses
import functools
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
from jax.sharding import Mesh

import exact_sums
import train_lib
from exact_sums import named, shown
from settings.errors import CheckpointError
from train_lib import Model, Variables
from training import compilation, processes

PIECE = 2**28  # Bytes of an array that are judged at once.


def check_weights(path: Path, ours: Variables, head: tuple[str, ...]) -> list[str]:
    """Judges a checkpoint whose weights and running statistics are to start another run.

    Args:
      path: WORKDIR/checkpoints/STEP.
      ours: the run's own variables, arrays or their shapes.
      head: the start of the path of what may be of other shapes; the run then has it anew.

    Returns:
      The names of arrays that the run has anew, in `ours`.

    Raises:
      CheckpointError: when it cannot be read, is of another model, or holds values that are not
        finite.
    """
    try:
        stored = Stored(path)
        theirs = {n: text for n, text in stored.described().items() if n.startswith('variables/')}
        kept = {f'variables/{name}': text for name, text in _described(ours).items()}
        differ = sorted(n for n in theirs | kept if theirs.get(n) != kept.get(n))
        short = [name.removeprefix('variables/') for name in differ]
        own = '/'.join((*head, ''))
        if [name for name in short if not head or not name.startswith(own)]:
            raise CheckpointError(
                f'it is a checkpoint of another model: {len(differ)} arrays differ, the first is '
                f'{short[0]}'
            )
        wild = stored.check(theirs)
    except CheckpointError as error:
        raise CheckpointError(f'init_from={path}: {error}') from error
    if wild:
        raise CheckpointError(
            f'init_from={path}: values of {len(wild)} arrays are not finite (NaN or infinity): '
            f'{", ".join(wild[:3])}{", …" if len(wild) > 3 else ""}'
        )
    return short


def weights(path: Path, ours: Variables) -> Variables:
    """The variables of a checkpoint that `check_weights` has found good.

    Args:
      path: WORKDIR/checkpoints/STEP.
      ours: the run's own variables on the mesh, or shapes that say how they lie on it. An array of
        another shape than the checkpoint's stays.
    """
    stored = Stored(path)
    theirs = stored.described()

    def chosen(name, own):
        same = theirs.get(f'variables/{name}') == _text(own)
        return stored.placed(f'variables/{name}', own) if same else own

    found = [chosen(name, own) for name, own in named(ours)]
    return jax.tree.unflatten(jax.tree.structure(ours), found)


def _text(x: Any) -> str:
    return f'{np.dtype(x.dtype)}{list(x.shape)}'


def _described(tree: Any) -> dict[str, str]:
    return {name: _text(x) for name, x in named(tree)}


def signed(
    record: Mapping[str, Any], tree: Mapping[str, Any], marks: Sequence[int] | None = None
) -> dict[str, Any]:
    """A checkpoint's record with the fingerprints of its arrays.

    Args:
      record: JSON.
      tree: of arrays.
      marks: `exact_sums.fingerprints` of the tree, if its arrays are not all NumPy's.
    """
    marks = exact_sums.fingerprints_on_host(tree) if marks is None else marks
    each = {name: shown(mark) for (name, _), mark in zip(named(tree), marks, strict=True)}
    return dict(record) | {'fingerprint': shown(marks), 'fingerprints': each}


class Stored:
    """A checkpoint on disk, WORKDIR/checkpoints/STEP. Its arrays are read one by one.

    Raises:
      CheckpointError: when it is missing or incomplete.
    """

    def __init__(self, directory: Path):
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
        keys = tensorstore.KvStore.open(store).result().list().result()
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
            arrays['/'.join(path)] = tensorstore.open(spec).result()
        return arrays, paths

    def described(self) -> dict[str, str]:
        """The arrays' dtypes and shapes by name."""
        return {
            name: f'{array.dtype.numpy_dtype}{list(array.shape)}'
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
        read = functools.partial(self.read, name)
        return jax.make_array_from_callback(like.shape, like.sharding, read)

    def tree(self) -> dict[str, Any]:
        """All arrays, whole, on the host."""
        return self._tree(self.read)

    def check(self, names: Iterable[str]) -> list[str]:
        """Reads arrays in pieces, and judges them; the names of those with values not finite.

        Raises:
          CheckpointError: when one is not what was written.
        """
        arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype.numpy_dtype)
                  for name, a in self._arrays.items()}  # fmt: skip
        tree = self._tree(arrays.__getitem__)
        shapes = {name: array.shape for name, array in arrays.items()}
        firsts = exact_sums.first_places(tree, shapes)
        first = {name: f for (name, _), f in zip(named(tree), firsts, strict=True)}
        marks, wild = {}, []
        for name in names:
            total, finite, place = 0, True, first[name]
            for piece in self._pieces(name):
                total += exact_sums.words_on_host(piece, place)
                finite &= bool(np.isfinite(piece).all())
                place += np.uint64(piece.size)
            marks[name] = shown(total % 2**64)
            wild += [] if finite else [name.removeprefix('variables/')]
        self.compare(marks)
        return wild

    def _pieces(self, name: str) -> Iterator[np.ndarray]:
        """An array's elements in their order, in pieces of PIECE bytes, or of one row."""
        shape = self._arrays[name].shape
        if not shape:
            yield self.read(name)
            return
        row = self._arrays[name].dtype.numpy_dtype.itemsize * math.prod(shape[1:])
        rows = max(1, PIECE // max(1, row))
        for start in range(0, shape[0], rows):
            yield self.read(name, slice(start, min(start + rows, shape[0])))

    def compare(self, marks: Mapping[str, str]) -> None:
        """Raises CheckpointError unless arrays, by name, have the fingerprints of the record."""
        written = self.record['fingerprints']
        damaged = [name for name, mark in marks.items() if written.get(name) != mark]
        if damaged:
            raise CheckpointError(
                f'{len(damaged)} of its arrays are not what was written, the first is {damaged[0]}'
            )


@dataclasses.dataclass(frozen=True)
class Found:
    """What `find` found: the newest whole checkpoint's tree, None if there is no checkpoint.

    Attributes:
      tree: as `train_lib.to_saved` makes it, on the devices.
      step: optimizer steps that the run has done.
      fingerprint: of the tree, as people see it.
      damaged: newer ones that cannot be read, with the reason.
    """

    tree: dict[str, Any] | None = None
    step: int = 0
    fingerprint: str = ''
    damaged: Sequence[tuple[Path, str]] = ()


def find(directory: Path, model: Model, mesh: Mesh) -> Found:
    """Reads the newest checkpoint in a run's directory that is whole; writes nothing.

    All processes call it; each reads what its own devices hold.

    Args:
      directory: of checkpoints.
      model: what the run learns.
      mesh: of its devices.

    Raises:
      CheckpointError: when there are checkpoints and none can be read, or one that is of another
        model.
    """
    directory, fingerprints = directory.resolve(), None
    damaged: list[tuple[Path, str]] = []
    template = train_lib.abstract_state(model)
    like = compilation.placed_shapes(mesh, train_lib.to_saved(template), model.task.split)
    for step in processes.broadcast(steps(directory)):
        path = directory / str(step)
        fingerprints = fingerprints or compilation.compile_fingerprints(model, mesh)
        tree, problem_or_mark = _on_devices(path, like, fingerprints)
        if tree is not None:
            return Found(tree, step, problem_or_mark, damaged)
        damaged.append((path, problem_or_mark))
    if damaged:
        raise CheckpointError(
            f'none of the checkpoints in {directory} can be read ({damaged[0][0].name}: '
            f'{damaged[0][1]}); start again in a new work directory'
        )
    return Found()


def _on_devices(path: Path, like: Any, fingerprints: Callable[[Any], jax.Array]) -> tuple[Any, str]:
    """A checkpoint's tree on the devices, and its fingerprint; else None, and what is wrong."""
    tree, problem, stored = None, None, None
    try:
        stored = Stored(path)
        theirs, ours = stored.described(), _described(like)
        if theirs == ours:
            arrays = [stored.placed(name, x) for name, x in named(like)]
            tree = jax.tree.unflatten(jax.tree.structure(like), arrays)
    except CheckpointError as error:
        problem = str(error)
    problems = [text for text in processes.gathered(problem) if text]
    if problems or stored is None:
        return None, problems[0]
    if tree is None:
        differ = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
        raise CheckpointError(
            f'the checkpoint is of another model or optimizer: {len(differ)} arrays differ, the '
            f'first is {differ[0]}: {theirs.get(differ[0], "none")} there, '
            f'{ours.get(differ[0], "none")} here'
        )
    marks = jax.device_get(fingerprints(tree))
    try:
        stored.compare({n: shown(mark) for (n, _), mark in zip(named(tree), marks, strict=True)})
    except CheckpointError as error:
        return None, str(error)
    return tree, shown(marks)


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
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), record=ocp.JsonCheckpointHandler()
        )
    ) as checkpointer:
        checkpointer.save(
            directory.resolve(),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(signed(record, tree)),
            ),
        )


def first_line(error: Exception) -> str:
    """What an exception says, or its name, on one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
