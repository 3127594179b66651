# SPDX-License-Identifier: Apache-2.0
"""What a run takes from checkpoints: its own newest state, or the weights of another run.

Every process reads the parts that its devices hold, so a run continues on any number of devices and
processes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import train_lib
from exact_sums import named
from fingerprints import shown
from settings.errors import CheckpointError
from train_lib import Model, Variables
from training import compilation, processes
from training.checkpointing import Stored, described, dtype_and_shape, steps


def check_weights(path: Path, ours: Variables, head: tuple[str, ...]) -> list[str]:
    """Judges a checkpoint whose weights and running statistics are to start another run.

    Args:
      path: WORKDIR/checkpoints/STEP.
      ours: the run's own variables, arrays or their shapes.
      head: path prefix of arrays whose shape may differ; the run initializes those itself.

    Returns:
      The names of arrays that the run initializes itself, in `ours`.

    Raises:
      CheckpointError: when it cannot be read, is of another model, or holds values that are not
        finite.
    """
    try:
        stored = Stored(path)
        theirs = {n: text for n, text in stored.described().items() if n.startswith('variables/')}
        kept = {f'variables/{name}': text for name, text in described(ours).items()}
        differ = sorted(n for n in theirs | kept if theirs.get(n) != kept.get(n))
        short = [name.removeprefix('variables/') for name in differ]
        own = '/'.join((*head, ''))
        if [name for name in short if not head or not name.startswith(own)]:
            raise CheckpointError(
                f'it is a checkpoint of another model: {len(differ)} arrays differ, the first is '
                f'{short[0]}'
            )
        non_finite = stored.check(theirs)
    except CheckpointError as error:
        raise CheckpointError(f'init_from={path}: {error}') from error
    if non_finite:
        raise CheckpointError(
            f'init_from={path}: {len(non_finite)} arrays have values that are not finite: '
            f'{", ".join(non_finite[:3])}{", …" if len(non_finite) > 3 else ""}'
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
        same = theirs.get(f'variables/{name}') == dtype_and_shape(own)
        return stored.placed(f'variables/{name}', own) if same else own

    found = [chosen(name, own) for name, own in named(ours)]
    return jax.tree.unflatten(jax.tree.structure(ours), found)


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
        theirs, ours = stored.described(), described(like)
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
