# SPDX-License-Identifier: Apache-2.0
"""The pure core of training: the state, one training step, one evaluation step.

Steps are written for one device's slice of a batch and lifted over all devices by `shard_map` on
a mesh of one axis, "data". `compile_steps` makes the two programs of a run ahead of time, from
shapes alone. Nothing here touches a file, a clock or a log.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'data'
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)

# Dynamic loss scaling (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2), float16 only.
INITIAL_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**15, 2.0**24
STEPS_TO_DOUBLE_LOSS_SCALE = 2000


class LossScale(NamedTuple):
    """The factor on the loss, and how many optimizer steps in a row it has not overflowed."""

    value: jax.Array
    good_steps: jax.Array


@flax.struct.dataclass
class TrainState:
    """All that a training step changes. Replicated over the devices.

    Attributes:
      variables: {'params': …, 'batch_stats': …}, fp32; batch_stats are the running statistics.
      opt_state: of `optax.MultiSteps`; between optimizer steps its accumulator is zero, and with
        one micro-step to a step there is none.
      loss_scale: 1 and constant unless the dtype is float16.
    """

    variables: Any
    opt_state: optax.MultiStepsState
    loss_scale: LossScale

    @property
    def step(self) -> jax.Array:
        """Optimizer steps done, int32."""
        return self.opt_state.gradient_step


def init_key(seed: int) -> jax.Array:
    """The key that a run's weights are drawn from; all 63 bits of the seed count."""
    return jax.random.fold_in(jax.random.key(seed >> 32), seed & 0xFFFFFFFF)


def create_train_state(key: jax.Array, task: Any, optimizer: optax.MultiSteps) -> TrainState:
    """The state at step 0. Pure: the same key gives the same state, bit for bit."""
    variables = task.init(key)
    half = task.config['dtype'] == 'float16'
    scale = LossScale(jnp.float32(INITIAL_LOSS_SCALE if half else 1.0), jnp.int32(0))
    return TrainState(dict(variables), optimizer.init(dict(variables)), scale)


def initial_state(seed: int, task: Any, optimizer: optax.MultiSteps) -> TrainState:
    """The state at step 0 as host arrays, computed on this process's first device."""
    create = functools.partial(create_train_state, task=task, optimizer=optimizer)
    # It runs once. Fully optimised, it would take a third of the time that a run takes to compile.
    program = jax.jit(create, compiler_options={'xla_backend_optimization_level': 1})
    return jax.device_get(program(init_key(seed)))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _until_finite(attempt: Callable[[jax.Array], Any], scale: jax.Array):
    """Runs `attempt(scale)`, halving the scale while the result overflows and the scale is > 1.

    The micro-batch is tried again on the device, so a run never skips an example, and its position
    in the data stays the step.
    """

    def body(carry):
        scale = carry[0] / 2
        return scale, attempt(scale)

    def overflowed(carry):
        scale, result = carry
        return ~_all_finite(result) & (scale > 1)

    nothing = jax.tree.map(
        lambda s: jnp.full(s.shape, jnp.nan, s.dtype), jax.eval_shape(attempt, scale)
    )
    return lax.while_loop(overflowed, body, (scale * 2, nothing))


def train_step(
    state: TrainState, batch: Any, stop: jax.Array, *, task: Any, optimizer: optax.MultiSteps
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One micro-step; every `accumulation_steps`-th one moves the weights.

    Args:
      state: replicated; donated when compiled.
      batch: one device's slice of the micro-batch.
      task: the loss and its metrics (see `ImageClassification`).
      optimizer: of weights and running statistics (see `optimizers.create`).
      stop: int32 [1], whether this device's process was asked to stop. It rides along so that all
        processes learn of it at the same step.

    Returns:
      The new state, and metrics averaged over all devices: the task's, `finite` (bool: if false,
      no weight was moved), `loss_scale` and `stop` (int32, devices that were asked to).
    """
    params, running = state.variables['params'], state.variables['batch_stats']

    def attempt(scale):
        def scaled_loss(params):
            loss, aux = task.train_loss({'params': params, 'batch_stats': running}, batch)
            return loss * scale, aux

        grads, (metrics, batch_stats) = jax.grad(scaled_loss, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        # The optimizer moves the running statistics by this "gradient" (see optimizers.create).
        drift = jax.tree.map(jnp.subtract, running, batch_stats)
        return lax.pmean(({'params': grads, 'batch_stats': drift}, metrics), AXIS)

    scale, good_steps = state.loss_scale
    if task.config['dtype'] == 'float16':
        new_scale, (gradient, metrics) = _until_finite(attempt, scale)
    else:
        new_scale, (gradient, metrics) = scale, attempt(scale)

    updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables)
    finite = _all_finite((updates, metrics))
    variables = jax.tree.map(
        lambda w, u: w + jnp.where(finite, u, jnp.zeros_like(u)), state.variables, updates
    )

    if task.config['dtype'] == 'float16':
        whole = (opt_state.mini_step == 0).astype(jnp.int32)
        good_steps = jnp.where(new_scale < scale, 0, good_steps + whole)
        double = good_steps >= STEPS_TO_DOUBLE_LOSS_SCALE
        new_scale = jnp.where(double, jnp.minimum(2 * new_scale, LARGEST_LOSS_SCALE), new_scale)
        good_steps = jnp.where(double, 0, good_steps)
    metrics = metrics | {
        'finite': finite,
        'loss_scale': new_scale,
        'stop': lax.psum(stop[0], AXIS),
    }
    return TrainState(variables, opt_state, LossScale(new_scale, good_steps)), metrics


def eval_step(variables: Any, batch: Any, stop: jax.Array, *, task: Any) -> tuple[Any, jax.Array]:
    """The task's sums over one evaluation batch of all devices, and `stop` as in `train_step`."""
    return lax.psum((task.evaluate(variables, batch), stop[0]), AXIS)


@dataclasses.dataclass(frozen=True)
class Programs:
    """A run's compiled programs and where their arguments live.

    `train(state, batch, stop)` and `evaluate(variables, batch, stop)` take and give arrays on the
    mesh: state and results replicated, batches split along their first axis.
    """

    mesh: Mesh
    train: Callable
    evaluate: Callable
    replicated: NamedSharding
    sharded: NamedSharding

    def to_devices(self, local: Any) -> Any:
        """Puts this process's part of a batch on its devices (asynchronous)."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.sharded, x), local
        )

    def to_all(self, tree: Any) -> Any:
        """Puts a tree of host arrays, the same in every process, on all devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.replicated, x, x.shape), tree
        )


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def lower_steps(
    task: Any, optimizer: optax.MultiSteps, micro_batch: int, mesh: Mesh
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Training and evaluation for batches of `micro_batch` examples, uncompiled.

    The replication checker of `shard_map` is off: with it, the gradient by a replicated weight is
    summed over the devices implicitly, and here the average is taken explicitly.
    """
    replicated, sharded = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, SHARDED)

    def lifted(step, in_specs, out_specs):
        return jax.shard_map(
            step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    create = functools.partial(create_train_state, task=task, optimizer=optimizer)
    state = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)))

    def placed(tree, sharding):
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    batch = placed(task.abstract_batch(micro_batch), sharded)
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=sharded)
    train = jax.jit(
        lifted(
            functools.partial(train_step, task=task, optimizer=optimizer),
            (REPLICATED, SHARDED, SHARDED),
            REPLICATED,
        ),
        donate_argnums=0,
    )
    evaluate = jax.jit(
        lifted(functools.partial(eval_step, task=task), (REPLICATED, SHARDED, SHARDED), REPLICATED)
    )
    return (
        train.lower(placed(state, replicated), batch, stop),
        evaluate.lower(placed(state.variables, replicated), batch, stop),
    )


def compile_steps(task: Any, optimizer: optax.MultiSteps, micro_batch: int, mesh: Mesh) -> Programs:
    """Compiles a run's programs for batches of `micro_batch` examples; see `lower_steps`."""
    train, evaluate = lower_steps(task, optimizer, micro_batch, mesh)
    return Programs(
        mesh=mesh,
        train=train.compile(),
        evaluate=evaluate.compile(),
        replicated=NamedSharding(mesh, REPLICATED),
        sharded=NamedSharding(mesh, SHARDED),
    )
