# SPDX-License-Identifier: Apache-2.0
"""The devices of a run: their mesh, what is put on them, and the programs compiled for them.

Programs are compiled ahead of time, from shapes alone.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import exact_sums
import fingerprints
import train_lib
from train_lib import AXIS, Model, Task, TrainState

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)


class Programs(NamedTuple):
    """A run's compiled programs.

    `train(state, batch)`, `evaluate(variables, batch)`, `fingerprints(train_lib.to_saved(state))`
    take and give arrays on the mesh: batches split along their first axis, variables and what
    belongs to them as `Task.split` says, all else replicated.
    """

    mesh: Mesh
    train: jax.stages.Compiled
    evaluate: jax.stages.Compiled
    fingerprints: jax.stages.Compiled


@contextlib.contextmanager
def without_garbage_collector() -> Iterator[None]:
    """Leaves cyclic garbage where it is: tracing makes millions of objects, and nearly all stay.

    To search them all again and again takes a tenth of a start (docs/performance.md, change 16).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def split(mesh: Mesh, local: Any) -> Any:
    """Puts this process's part of a batch on its devices (asynchronous)."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def _dimension(name: str, split: Mapping[str, int]) -> int | None:
    """Along which dimension an array is split, by its name, which ends with a variable's."""
    return next((d for n, d in split.items() if name == n or name.endswith(f'/{n}')), None)


def specs(tree: Any, split: Mapping[str, int]) -> Any:
    """How the arrays of a state, of variables or of what belongs to them lie on the mesh.

    Args:
      tree: of arrays or their shapes.
      split: as `Task.split`.
    """
    dimensions = [_dimension(name, split) for name, _ in exact_sums.named(tree)]
    found = [REPLICATED if d is None else PartitionSpec(*[None] * d, AXIS) for d in dimensions]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def place(mesh: Mesh, tree: Any, split: Mapping[str, int] = exact_sums.NOT_SPLIT) -> Any:
    """Puts a tree of whole host arrays, the same in every process, on the devices.

    Args:
      mesh: of all devices.
      tree: a state, variables, or what belongs to them.
      split: as `Task.split`.
    """

    def put(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        return jax.tree.map(put, tree, specs(tree, split))


def on_host(tree: Any) -> Any:
    """A copy of arrays on the mesh in host memory, which stays as it is when they are donated."""
    where = jax.tree.map(lambda x: x.sharding.with_memory_kind('pinned_host'), tree)
    return jax.block_until_ready(jax.device_put(tree, where))


def placed_shapes(mesh: Mesh, tree: Any, split: Mapping[str, int]) -> Any:
    """Shapes of arrays with how they lie on the mesh; see `specs`."""
    return _placed(mesh, specs(tree, split), tree)


def initial_state(seed: int, model: Model, mesh: Mesh) -> TrainState:
    """A run's state at step 0, on the mesh; made in parts, never whole in one place."""

    @jax.enable_x64(jax.enable_x64.value)
    def create(words):
        return train_lib.create_train_state(train_lib.init_key(*words), model=model)

    shapes = placed_shapes(mesh, train_lib.abstract_state(model), model.task.split)
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    # It runs once. Fully optimised, it would take a third of the time that a run takes to compile.
    quick = {'xla_backend_optimization_level': 1}
    words = np.array(divmod(seed, 2**32), np.uint32)
    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        return jax.jit(create, out_shardings=shardings, compiler_options=quick)(words)


def resumed_state(saved: Any, model: Model, mesh: Mesh) -> TrainState:
    """The state that has the arrays of `saved`, which is as `train_lib.to_saved`, on the mesh."""
    shapes = placed_shapes(mesh, train_lib.abstract_state(model), model.task.split)

    def zeros_unless_saved(x):
        if isinstance(x, jax.Array):
            return x
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        return jax.tree.map(zeros_unless_saved, train_lib.from_saved(saved, shapes))


def lifted(
    step: Callable,
    mesh: Mesh,
    in_specs: Any = (REPLICATED, SHARDED),
    out_specs: Any = REPLICATED,
    **options: Any,
) -> jax.stages.Wrapped:
    """A step for one device's slice, as a program for the whole mesh.

    The replication checker of `shard_map` is off: with it, the gradient by a replicated weight is
    summed over the devices implicitly, and here it is summed explicitly, as integers.
    """
    over_all = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(over_all, **options)


def _placed(mesh: Mesh, spec: Any, tree: Any) -> Any:
    """Shapes with their places; `spec`: one, or a tree of them."""
    if isinstance(spec, PartitionSpec):
        spec = jax.tree.map(lambda _: spec, tree)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=NamedSharding(mesh, where)
        ),
        tree,
        spec,
    )


def trace_train(model: Model, micro_batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The training step for so many examples a device, uncompiled."""
    shapes = train_lib.abstract_state(model)
    where = specs(shapes, model.task.split)
    state = _placed(mesh, where, shapes)
    batch = _placed(mesh, SHARDED, model.task.abstract_batch(mesh.size * micro_batch_size))

    @jax.enable_x64(jax.enable_x64.value)
    def train_step(state, batch):
        return train_lib.train_step(state, batch, model=model)

    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        step = lifted(train_step, mesh, (where, SHARDED), (where, REPLICATED), donate_argnums=0)
        return step.trace(state, batch)


def trace_evaluate(task: Task, micro_batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The evaluation step for so many examples a device, uncompiled."""
    variables = train_lib.abstract_variables(task)
    where = specs(variables, task.split)
    step = lifted(functools.partial(train_lib.eval_step, task=task), mesh, (where, SHARDED))
    return step.trace(
        _placed(mesh, where, variables),
        _placed(mesh, SHARDED, task.abstract_batch(mesh.size * micro_batch_size)),
    )


def compile_fingerprints(model: Model, mesh: Mesh) -> jax.stages.Compiled:
    """The program for the fingerprints of a state's arrays, as `train_lib.to_saved` has them."""
    saved, split = train_lib.to_saved(train_lib.abstract_state(model)), model.task.split
    dimensions = {name: _dimension(name, split) for name, _ in exact_sums.named(saved)}
    of_parts = functools.partial(
        fingerprints.of,
        axis=AXIS,
        split={name: d for name, d in dimensions.items() if d is not None},
    )
    where = specs(saved, split)
    return lifted(of_parts, mesh, (where,)).lower(_placed(mesh, where, saved)).compile()


def compile_steps(
    model: Model,
    micro_batch_size: int,
    mesh: Mesh,
    busy: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
) -> Programs:
    """Compiles a run's programs for so many examples a device; each while `busy`, with its name."""
    with busy('compiling the training step'):
        train = trace_train(model, micro_batch_size, mesh).lower().compile()
    with busy('compiling the evaluation'):
        evaluate = trace_evaluate(model.task, micro_batch_size, mesh).lower().compile()
    with busy('compiling the fingerprint'):
        return Programs(mesh, train, evaluate, compile_fingerprints(model, mesh))
