# SPDX-License-Identifier: Apache-2.0
"""The devices of a run: their mesh, what is put on them, and the programs compiled for them.

Programs are compiled ahead of time, from shapes alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import exact_sums
import train_lib
from train_lib import AXIS, Model, Task

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)


class Programs(NamedTuple):
    """A run's compiled programs.

    `train(state, batch)`, `evaluate(variables, batch)` and `fingerprint(train_lib.to_saved(state))`
    take and give arrays on the mesh: state and results replicated, batches split along their first
    axis.
    """

    mesh: Mesh
    train: jax.stages.Compiled
    evaluate: jax.stages.Compiled
    fingerprint: jax.stages.Compiled


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def split(mesh: Mesh, local: Any) -> Any:
    """Puts this process's part of a batch on its devices (asynchronous)."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a tree of host arrays, the same in every process, on all devices."""
    sharding = NamedSharding(mesh, REPLICATED)
    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x, np.shape(x)), tree
        )


def lifted(step: Callable, mesh: Mesh, **options: Any) -> jax.stages.Wrapped:
    """A step for one device's slice, as a program for the whole mesh.

    The replication checker of `shard_map` is off: with it, the gradient by a replicated weight is
    summed over the devices implicitly, and here it is summed explicitly, as integers.
    """
    over_all = jax.shard_map(
        step, mesh=mesh, in_specs=(REPLICATED, SHARDED), out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(over_all, **options)


def _placed(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def trace_train(model: Model, micro_batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The training step for so many examples a device, uncompiled."""
    state = _placed(mesh, REPLICATED, train_lib.abstract_state(model))
    batch = _placed(mesh, SHARDED, model.task.abstract_batch(mesh.size * micro_batch_size))

    @jax.enable_x64(jax.enable_x64.value)
    def train_step(state, batch):
        return train_lib.train_step(state, batch, model=model)

    with jax.enable_x64(True):  # Else 64-bit integers would be cut to 32 bits.
        return lifted(train_step, mesh, donate_argnums=0).trace(state, batch)


def trace_evaluate(task: Task, micro_batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The evaluation step for so many examples a device, uncompiled."""
    variables = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    return lifted(functools.partial(train_lib.eval_step, task=task), mesh).trace(
        _placed(mesh, REPLICATED, dict(variables)),
        _placed(mesh, SHARDED, task.abstract_batch(mesh.size * micro_batch_size)),
    )


def _trace_fingerprint(model: Model, mesh: Mesh) -> jax.stages.Traced:
    saved = train_lib.to_saved(train_lib.abstract_state(model))
    return jax.jit(exact_sums.fingerprint).trace(_placed(mesh, REPLICATED, saved))


def compile_steps(model: Model, micro_batch_size: int, mesh: Mesh) -> Programs:
    """Compiles a run's programs for so many examples a device."""
    return Programs(
        mesh,
        trace_train(model, micro_batch_size, mesh).lower().compile(),
        trace_evaluate(model.task, micro_batch_size, mesh).lower().compile(),
        _trace_fingerprint(model, mesh).lower().compile(),
    )
