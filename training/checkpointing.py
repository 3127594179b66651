# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole optimizer steps, with nothing in them about hardware.

A checkpoint is a tree of NumPy arrays (weights, running statistics, optimizer state, step, loss
scale) and a small JSON record (step, configuration with the seed, checksum). Process 0 writes it
with Orbax, in a thread of its own; at the start it reads the newest good one and the others receive
it, so a run continues on any number of devices and processes.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from run_files.line_file import SaveError
from train_lib import LossScale, TrainState

# What fails is raised, too; their tracebacks would only bury the line that is printed for it.
for _name in ('absl', 'asyncio'):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

KEPT = 2  # The newest, and the one before it in case the newest is damaged.


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the text says which and what to do."""


def to_tree(state: TrainState) -> dict[str, Any]:
    """What is worth keeping of a state between two optimizer steps, as nested dicts.

    The accumulator of `optax.MultiSteps` is left out: it is zero or absent there, and must not
    tie the checkpoint to a number of accumulation steps.
    """
    return {
        'variables': state.variables,
        'opt_state': flax.serialization.to_state_dict(state.opt_state.inner_opt_state),
        'loss_scale': state.loss_scale._asdict(),
        'step': state.step,
    }


def check(tree: Mapping[str, Any], template: TrainState) -> None:
    """Checks that a tree belongs to a run.

    Args:
      tree: as made by `to_tree`.
      template: the run's state, as shapes and dtypes.

    Raises:
      CheckpointError: when an array is missing, left over, or of another shape or dtype.
    """
    ours, theirs = _described(to_tree(template)), _described(tree)
    differ = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if differ:
        first = differ[0]
        raise CheckpointError(
            f'the checkpoint is of another model or optimizer: {len(differ)} arrays differ, the '
            f'first is {first}: {theirs.get(first, "none")} there, {ours.get(first, "none")} here'
        )


def from_tree(tree: Mapping[str, Any], template: TrainState) -> TrainState:
    """The inverse of `to_tree`, for a tree that `check` has passed."""
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), template.opt_state)
    inner = flax.serialization.from_state_dict(zeros.inner_opt_state, tree['opt_state'])
    return TrainState(
        variables=tree['variables'],
        opt_state=zeros._replace(inner_opt_state=inner, gradient_step=tree['step']),
        loss_scale=LossScale(**tree['loss_scale']),
    )


def read_weights(path: Path) -> dict[str, Any]:
    """Weights and running statistics of a checkpoint, to start another run from.

    Args:
      path: a checkpoint, WORKDIR/checkpoints/STEP.

    Raises:
      CheckpointError: when it cannot be read, or holds values that are not finite.
    """
    try:
        weights = read(path)[0]['variables']
    except CheckpointError as error:
        raise CheckpointError(f'init_from={path}: {error}') from error
    wild = [name for name, array in _flat(weights) if not np.isfinite(array).all()]
    if wild:
        raise CheckpointError(
            f'init_from={path}: values of {len(wild)} arrays are not finite (NaN or infinity): '
            f'{", ".join(wild[:3])}{", …" * (len(wild) > 3)}'
        )
    return weights


def with_weights(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The weights of another run in the place of our own.

    Args:
      path: where they are from.
      theirs: from `read_weights`.
      ours: the run's own initial variables, arrays or their shapes.

    Returns:
      Theirs; where their number of classes is another, with our own initial head.

    Raises:
      CheckpointError: when they are of another model.
    """
    a, b = _described(ours), _described(theirs)
    differ = sorted(name for name in a | b if a.get(name) != b.get(name))
    if [name for name in differ if not name.startswith('params/fc/')]:
        raise CheckpointError(
            f'init_from={path} is a checkpoint of another model: {len(differ)} arrays differ, the '
            f'first is {differ[0]}'
        )
    if differ:
        theirs = {**theirs, 'params': {**theirs['params'], 'fc': ours['params']['fc']}}
    return theirs


def initial_weights(path: Path, ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """`read_weights` and `with_weights` in one."""
    return with_weights(path, read_weights(path), ours)


def _flat(tree: Any) -> list[tuple[str, Any]]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [('/'.join(str(key.key) for key in path), leaf) for path, leaf in pairs]


def _described(tree: Any) -> dict[str, str]:
    return {name: f'{x.dtype}{list(x.shape)}' for name, x in _flat(tree)}


def checksum(tree: Any) -> int:
    """CRC-32 over names, dtypes, shapes and bytes of a tree of host arrays."""
    total = 0
    for name, leaf in _flat(tree):
        array = np.asarray(leaf)
        total = zlib.crc32(f'{name}{array.dtype}{array.shape}'.encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).data.cast('B') if array.size else b'', total)
    return total


@dataclasses.dataclass(frozen=True)
class Found:
    """What `find` found: the newest whole checkpoint's tree, None if there is no checkpoint.

    `damaged` are newer ones that cannot be read, with the reason.
    """

    tree: dict[str, Any] | None
    damaged: Sequence[tuple[Path, str]] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that the run has done."""
        return 0 if self.tree is None else int(self.tree['step'])


def find(directory: Path, template: TrainState) -> Found:
    """Reads the newest checkpoint in a run's directory that is whole; writes nothing.

    Raises:
      CheckpointError: when there are checkpoints and none can be read, or one that is of another
        model than `template`.
    """
    directory, damaged = directory.resolve(), []
    paths = directory.iterdir() if directory.is_dir() else ()
    for step in sorted((int(p.name) for p in paths if _is_step(p)), reverse=True):
        path = directory / str(step)
        try:
            tree, _ = read(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        check(tree, template)
        return Found(tree, damaged)
    if damaged:
        raise CheckpointError(
            f'none of the checkpoints in {directory} can be read ({damaged[0][0].name}: '
            f'{damaged[0][1]}); start again in a new work directory'
        )
    return Found(None)


def _is_step(path: Path) -> bool:
    return path.name.isascii() and path.name.isdecimal() and path.name == str(int(path.name))


class Checkpoints:
    """A run's checkpoints in `directory`; made by process 0 alone.

    Args:
      directory: is made if it is missing.
      report: receives a sentence for every error that does not end the run: a damaged checkpoint,
        a save that failed.
      damaged: checkpoints to put aside, as found by `find`: the run comes by these steps again.
    """

    def __init__(
        self,
        directory: Path,
        report: Callable[[str], None],
        damaged: Sequence[tuple[Path, str]] = (),
    ):
        self._directory, self._report = directory.resolve(), report
        self._directory.mkdir(parents=True, exist_ok=True)
        for path, reason in damaged:
            aside = _free(path.with_name(f'damaged-{path.name}'))
            path.rename(aside)
            self._report(f'checkpoint {path} is damaged, and now called {aside.name}: {reason}')
        self._manager = self._open()
        # Orbax has threads too, but starts them only after half a second's work on a ResNet-50.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._saving: concurrent.futures.Future | None = None
        self._landed = True  # The last save, or it is on its way.

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}, barrier_sync_key_prefix='checkpoints'
                ),
            ),
        )

    def save(self, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Starts writing a tree of host arrays and a JSON record; an earlier save ends first.

        A save that fails (a full disk) is reported and the run goes on.
        """
        self.wait()
        step = int(tree['step'])
        self._landed = True
        if step in self._manager.all_steps():
            return
        self._saving = self._thread.submit(self._write, step, tree, record)

    def _write(self, step: int, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        _reserve(self._directory, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(dict(record) | {'checksum': checksum(tree)}),
            ),
        )

    def wait(self) -> None:
        """Returns when the last save is on disk, or has failed and been reported."""
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._landed = False
        self._report(f'a checkpoint could not be saved in {self._directory}: {_first_line(error)}')
        try:
            self._manager.close()
        except Exception:
            logging.getLogger(__name__).debug('the failed save was reported already')
        if not self._directory.is_dir():
            raise SaveError(f'{self._directory} is gone: it was deleted while the run was using it')
        self._manager = self._open()  # Removes what the failed save left behind.

    def close(self) -> bool:
        """Waits for the last save and ends the thread; whether that save landed."""
        self.wait()
        self._manager.close()
        self._thread.shutdown()
        return self._landed


def _reserve(directory: Path, size: int) -> None:
    """Checks that so many bytes can be written.

    TensorStore prints a traceback for every array that a full disk or a quota keeps it from
    writing; here it is one OSError.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that does not exist."""
    numbered = (path.with_name(f'{path.name}-{n}') for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint, WORKDIR/checkpoints/STEP, as (tree of host arrays, record).

    Raises:
      CheckpointError: when it is missing, or is not what was written.
    """
    try:
        directory = directory.resolve()  # Orbax takes no relative paths.
        if not (directory / 'state').is_dir():
            raise CheckpointError(
                f'{directory} is no checkpoint: it has no folder "state". Name one, '
                'WORKDIR/checkpoints/STEP'
            )
        _read_one_by_one(directory / 'state')
        restored = _restore(directory)
        tree, record = jax.tree.map(np.asarray, restored['state']), restored['record']
        whole = checksum(tree) == record['checksum']
    except CheckpointError:
        raise
    except Exception as error:  # Orbax, TensorStore and JSON have many for a damaged file.
        raise CheckpointError(f'it cannot be read: {_first_line(error)}') from error
    if not whole:
        raise CheckpointError('its checksum is not the one that was written')
    return tree, record


def _read_one_by_one(directory: Path) -> None:
    """Reads every array of a checkpoint's state once, and raises what keeps one from being read.

    Orbax reads them all at once, and for every one that is still on its way when another fails,
    TensorStore prints a traceback.
    """
    named = json.loads((directory / '_METADATA').read_text())['tree_metadata'].values()
    missing = {
        '.'.join(part['key'] for part in entry['key_metadata'])
        for entry in named
        if not entry['value_metadata']['skip_deserialize']  # An empty subtree.
    }
    store = {'driver': 'ocdbt', 'base': f'file://{directory}/'}
    for key in tensorstore.KvStore.open(store).result().list().result():
        name, _, file = key.decode().rpartition('/')
        if file == '.zarray':
            array = {'driver': 'zarr', 'kvstore': store, 'path': f'{name}/'}
            tensorstore.open(array).result().read().result()
            missing.discard(name)
    if missing:
        raise CheckpointError(f'it has no array {min(missing)}')


def _restore(directory: Path) -> Mapping[str, Any]:
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(  # Else Orbax waits for the other processes.
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'read-{me}'
    )
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            record=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        ),
        multiprocessing_options=alone,
    ) as checkpointer:
        abstract = checkpointer.metadata(directory).item_metadata['state']
        return checkpointer.restore(
            directory,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(
                    jax.tree.map(lambda x: np.empty(x.shape, x.dtype), dict(abstract))
                ),
                record=ocp.args.JsonRestore(),
            ),
        )


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
                record=ocp.args.JsonSave(dict(record) | {'checksum': checksum(tree)}),
            ),
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
