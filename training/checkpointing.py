# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole optimizer steps, with nothing in them about hardware.

A checkpoint is a tree of NumPy arrays (weights, running statistics, optimizer state, step, loss
scale) and a small JSON record (step, configuration with the seed, fingerprint), written with Orbax.
Process 0 reads the newest good one at the start and the others receive it, so a run continues on
any number of devices and processes. `checkpoint_saver` writes them while a run trains.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from exact_sums import fingerprint_on_host, named, shown
from settings.errors import CheckpointError
from train_lib import TrainState, Variables, to_saved


def check(tree: Mapping[str, Any], template: TrainState) -> None:
    """Checks that a tree belongs to a run.

    Args:
      tree: as `train_lib.to_saved` makes it.
      template: the run's state, as shapes and dtypes.

    Raises:
      CheckpointError: when an array is missing, left over, or of another shape or dtype.
    """
    ours, theirs = _described(to_saved(template)), _described(tree)
    differ = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if differ:
        first = differ[0]
        raise CheckpointError(
            f'the checkpoint is of another model or optimizer: {len(differ)} arrays differ, the '
            f'first is {first}: {theirs.get(first, "none")} there, {ours.get(first, "none")} here'
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
    wild = [name for name, array in named(weights) if not np.isfinite(array).all()]
    if wild:
        raise CheckpointError(
            f'init_from={path}: values of {len(wild)} arrays are not finite (NaN or infinity): '
            f'{", ".join(wild[:3])}{", …" if len(wild) > 3 else ""}'
        )
    return weights


def replace_weights(
    path: Path, theirs: Variables, ours: Variables, head: tuple[str, ...]
) -> tuple[Variables, list[str]]:
    """The weights of another run in the place of our own.

    Args:
      path: where they are from.
      theirs: from `read_weights`.
      ours: the run's own initial variables, arrays or their shapes.
      head: the start of the path of what may differ, and then stays as it is in `ours`.

    Returns:
      The variables, and the names of those that are ours.

    Raises:
      CheckpointError: when they are of another model.
    """
    a, b = _described(ours), _described(theirs)
    differ = sorted(name for name in a | b if a.get(name) != b.get(name))
    if [name for name in differ if not name.startswith('/'.join((*head, '')))]:
        raise CheckpointError(
            f'init_from={path} is a checkpoint of another model: {len(differ)} arrays differ, the '
            f'first is {differ[0]}'
        )
    kept, own = traverse_util.flatten_dict(theirs), traverse_util.flatten_dict(ours)
    is_head = {name: name[: len(head)] == head for name in own}
    chosen = {name: own[name] if differ and is_head[name] else kept[name] for name in own}
    return traverse_util.unflatten_dict(chosen), differ


def initial_weights(
    path: Path, ours: Variables, head: tuple[str, ...]
) -> tuple[Variables, list[str]]:
    """`read_weights` and `replace_weights` in one."""
    return replace_weights(path, read_weights(path), ours, head)


def _described(tree: Any) -> dict[str, str]:
    return {name: f'{x.dtype}{list(x.shape)}' for name, x in named(tree)}


def signed(record: Mapping[str, Any], tree: Any) -> dict[str, Any]:
    """A checkpoint's record with the fingerprint of its tree."""
    return dict(record) | {'fingerprint': shown(fingerprint_on_host(tree))}


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
    for step in steps(directory):
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
        if 'fingerprint' not in record:
            raise CheckpointError(
                'it is of an earlier version of this program, and has no fingerprint'
            )
        whole = signed(record, tree) == record
    except CheckpointError:
        raise
    except Exception as error:  # Orbax, TensorStore and JSON have many for a damaged file.
        raise CheckpointError(f'it cannot be read: {first_line(error)}') from error
    if not whole:
        raise CheckpointError('its fingerprint is not the one that was written')
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
                record=ocp.args.JsonSave(signed(record, tree)),
            ),
        )


def first_line(error: Exception) -> str:
    """What an exception says, or its name, on one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
