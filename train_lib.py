# SPDX-License-Identifier: Apache-2.0
"""The pure core of training: the state, one training step, one evaluation step.

Steps are written for one device's slice of a batch and lifted over all devices by `shard_map` on
a mesh of one axis, "data". The programs of a run are compiled ahead of time, from shapes alone.
Nothing here touches a file, a clock or a log.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.serialization
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

# Whether loss and gradient are finite (if not, the state has not moved at all), the learning rate
# of the optimizer step, and the loss scale after it.
OWN_METRICS = ('finite', 'learning_rate', 'loss_scale')

Variables = dict[str, Any]  # {'params': …} and the collections of statistics, if there are any.


class Task(Protocol):
    """What is learnt: a model with its loss and its metrics, as pure functions.

    Attributes:
      dtype: of activations; 'float16' has its loss scaled.
    """

    @property
    def dtype(self) -> str: ...  # noqa: D102

    def abstract_batch(self, examples: int) -> Any:
        """Shapes and dtypes of a batch of so many examples; each array's first axis counts them."""

    def init(self, key: jax.Array) -> Variables:
        """The model's variables, drawn from a key."""

    def train_loss(
        self, variables: Variables, batch: Any
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Variables]]:
        """Mean loss over a training batch.

        Returns:
          (loss, (metrics, statistics)): metrics are means over the batch; statistics are the
          batch's own, by collection, for the optimizer to move the running ones by.
        """

    def evaluate(self, variables: Variables, batch: Any) -> dict[str, jax.Array]:
        """Sums over an evaluation batch; examples that only fill it up count for nothing.

        One of them is 'examples': how many counted.
        """

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The evaluation's results from the sums over the whole set."""


class LossScale(NamedTuple):
    """The factor on the loss, and how many optimizer steps in a row it has not overflowed."""

    value: jax.Array
    good_steps: jax.Array


@flax.struct.dataclass
class TrainState:
    """Everything that a training step updates. Replicated over the devices.

    Attributes:
      variables: of the model, fp32; weights and running statistics.
      opt_state: of `optax.MultiSteps`; between optimizer steps its accumulator is zero.
      loss_scale: 1 and constant unless the dtype is float16.
    """

    variables: Variables
    opt_state: optax.MultiStepsState
    loss_scale: LossScale

    @property
    def step(self) -> jax.Array:
        """Optimizer steps done, int32."""
        return self.opt_state.gradient_step


def accumulated(transformation: optax.GradientTransformation, steps: int) -> optax.MultiSteps:
    """An optimizer that is fed micro-batches, and moves the variables at every `steps`-th one."""
    # The accumulator is fp32, but for tests in fp64.
    return optax.MultiSteps(transformation, steps, accumulator_dtype=float)


def init_key(seed: int) -> jax.Array:
    """The key that a run's weights are drawn from; all 63 bits of the seed count."""
    return jax.random.fold_in(jax.random.key(seed >> 32), seed & 0xFFFFFFFF)


def create_train_state(key: jax.Array, task: Task, optimizer: optax.MultiSteps) -> TrainState:
    """The state at step 0. Pure: the same key gives the same state, bit for bit."""
    variables = dict(task.init(key))
    scale = INITIAL_LOSS_SCALE if task.dtype == 'float16' else 1.0
    return TrainState(
        variables, optimizer.init(variables), LossScale(jnp.float32(scale), jnp.int32(0))
    )


def initial_state(seed: int, task: Task, optimizer: optax.MultiSteps) -> TrainState:
    """The state at step 0 as host arrays, computed on this process's first device."""
    create = functools.partial(create_train_state, task=task, optimizer=optimizer)
    # It runs once. Fully optimised, it would take a third of the time that a run takes to compile.
    program = jax.jit(create, compiler_options={'xla_backend_optimization_level': 1})
    return jax.device_get(program(init_key(seed)))


def abstract_state(task: Task, optimizer: optax.MultiSteps) -> TrainState:
    """The state as shapes and dtypes."""
    create = functools.partial(create_train_state, task=task, optimizer=optimizer)
    return jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)))


def to_saved(state: TrainState) -> dict[str, Any]:
    """What is worth keeping of a state between two optimizer steps, as nested dicts.

    The accumulator is left out: it is zero there, and must not tie a checkpoint to a number of
    accumulation steps.
    """
    return {
        'variables': state.variables,
        'opt_state': flax.serialization.to_state_dict(state.opt_state.inner_opt_state),
        'loss_scale': state.loss_scale._asdict(),
        'step': state.step,
    }


def from_saved(saved: Mapping[str, Any], template: TrainState) -> TrainState:
    """The inverse of `to_saved`, for a run whose state has the shapes and dtypes of `template`."""
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), template.opt_state)
    inner = flax.serialization.from_state_dict(zeros.inner_opt_state, saved['opt_state'])
    return TrainState(
        variables=saved['variables'],
        opt_state=zeros._replace(inner_opt_state=inner, gradient_step=saved['step']),
        loss_scale=LossScale(**saved['loss_scale']),
    )


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _until_finite(attempt: Callable[[jax.Array], Any], scale: jax.Array) -> tuple[jax.Array, Any]:
    """Runs `attempt(scale)`, halving the scale while the result overflows and the scale is > 1.

    The micro-batch is tried again on the device, so a run never skips an example, and its position
    in the data stays the step.

    Returns:
      The last scale, and what `attempt` returned for it.
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


def _next_scale(old: LossScale, used: jax.Array, is_whole: jax.Array) -> LossScale:
    """The loss scale after a micro-step that used `used`, and may have ended an optimizer step."""
    good_steps = jnp.where(used < old.value, 0, old.good_steps + is_whole.astype(jnp.int32))
    double = good_steps >= STEPS_TO_DOUBLE_LOSS_SCALE
    return LossScale(
        jnp.where(double, jnp.minimum(2 * used, LARGEST_LOSS_SCALE), used),
        jnp.where(double, 0, good_steps),
    )


def train_step(
    state: TrainState,
    batch: Any,
    *,
    task: Task,
    optimizer: optax.MultiSteps,
    schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One micro-step; every `accumulation_steps`-th one moves the weights.

    Args:
      state: replicated; donated when compiled.
      batch: one device's slice of the micro-batch.
      task: the loss and its metrics.
      optimizer: of weights and running statistics, from `accumulated`.
      schedule: the learning rate that it uses, by optimizer step.

    Returns:
      The new state, and metrics: the task's, averaged over all devices, and those of `OWN_METRICS`.
    """
    params = state.variables['params']
    running = {name: tree for name, tree in state.variables.items() if name != 'params'}

    def attempt(scale):
        def scaled_loss(params):
            loss, aux = task.train_loss({'params': params, **running}, batch)
            return loss * scale, aux

        grads, (metrics, statistics) = jax.grad(scaled_loss, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        return lax.pmean(({'params': grads, **statistics}, metrics), AXIS)

    if task.dtype == 'float16':
        scale, (gradient, metrics) = _until_finite(attempt, state.loss_scale.value)
    else:
        scale, (gradient, metrics) = state.loss_scale.value, attempt(state.loss_scale.value)

    updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables)
    finite = _all_finite((updates, metrics))
    new = TrainState(
        optax.apply_updates(state.variables, updates),
        opt_state,
        _next_scale(state.loss_scale, scale, opt_state.mini_step == 0)
        if task.dtype == 'float16'
        else state.loss_scale,
    )
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    own = (finite, schedule(state.step), new.loss_scale.value)
    return new, metrics | dict(zip(OWN_METRICS, own, strict=True))


def eval_step(variables: Variables, batch: Any, *, task: Task) -> dict[str, jax.Array]:
    """The task's sums over one evaluation batch of all devices."""
    return lax.psum(task.evaluate(variables, batch), AXIS)


class Programs(NamedTuple):
    """A run's compiled programs.

    `train(state, batch)` and `evaluate(variables, batch)` take and give arrays on the mesh: state
    and results replicated, batches split along their first axis.
    """

    mesh: Mesh
    train: jax.stages.Compiled
    evaluate: jax.stages.Compiled


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
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, np.shape(x)), tree
    )


def lifted(step: Callable, mesh: Mesh, **options: Any) -> jax.stages.Wrapped:
    """A step for one device's slice, as a program for the whole mesh.

    The replication checker of `shard_map` is off: with it, the gradient by a replicated weight is
    summed over the devices implicitly, and here the average is taken explicitly.
    """
    over_all = jax.shard_map(
        step, mesh=mesh, in_specs=(REPLICATED, SHARDED), out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(over_all, **options)


def _placed(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def lower_train(
    task: Task,
    optimizer: optax.MultiSteps,
    schedule: optax.Schedule,
    micro_batch: int,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """The training step for batches of `micro_batch` examples, uncompiled."""
    step = functools.partial(train_step, task=task, optimizer=optimizer, schedule=schedule)
    state = _placed(mesh, REPLICATED, abstract_state(task, optimizer))
    batch = _placed(mesh, SHARDED, task.abstract_batch(micro_batch))
    return lifted(step, mesh, donate_argnums=0).lower(state, batch)


def lower_evaluate(task: Task, batch_size: int, mesh: Mesh) -> jax.stages.Lowered:
    """The evaluation step for batches of `batch_size` examples, uncompiled."""
    variables = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    return lifted(functools.partial(eval_step, task=task), mesh).lower(
        _placed(mesh, REPLICATED, dict(variables)),
        _placed(mesh, SHARDED, task.abstract_batch(batch_size)),
    )


def compile_steps(
    task: Task,
    optimizer: optax.MultiSteps,
    schedule: optax.Schedule,
    micro_batch: int,
    mesh: Mesh,
) -> Programs:
    """Compiles a run's programs for batches of `micro_batch` examples."""
    return Programs(
        mesh,
        lower_train(task, optimizer, schedule, micro_batch, mesh).compile(),
        lower_evaluate(task, micro_batch, mesh).compile(),
    )
