# SPDX-License-Identifier: Apache-2.0
"""The pure core of training: the state, one training step, one evaluation step.

Steps are written for one device's micro-batch, on a mesh of one axis, "data". A micro-batch has the
same number of examples on any hardware, and what it yields is added up over devices and micro-steps
exactly (exact_sums.py), so a step's result depends on neither. Nothing here touches a file, a clock
or a log.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

import accumulation
import exact_sums
import loss_scaling
from accumulation import packed
from exact_sums import FixedPoint
from loss_scaling import LossScale

AXIS = 'data'

# Limits: the loss of one example, and the examples in an evaluation batch over all devices.
EVALUATED = FixedPoint(2.0**16, 2**16)

Variables = dict[str, Any]  # {'params': …} and the collections of statistics, if there are any.


class Task(Protocol):
    """What is learnt: a model with its loss and its metrics, as pure functions.

    Within a step each device holds its shard of the variables in `split`, and all of the others.

    Attributes:
      dtype: of activations; 'float16' has its loss scaled.
      split: the names of variables that are split over the devices, as `exact_sums.named` gives
        them, such as 'params/head', and along which dimension each is.
    """

    @property
    def dtype(self) -> str: ...  # noqa: D102

    @property
    def split(self) -> Mapping[str, int]: ...  # noqa: D102

    def abstract_batch(self, examples: int) -> Any:
        """Shapes and dtypes of a batch of so many examples; each array's first axis counts them."""

    def init(self, key: jax.Array) -> Variables:
        """The model's variables, drawn from a key."""

    def gradient(
        self, variables: Variables, batch: Any, scale: jax.Array, form: FixedPoint
    ) -> tuple[Variables, dict[str, jax.Array]]:
        """The gradient of the mean loss over one device's micro-batch.

        Args:
          variables: of the model.
          batch: the micro-batch.
          scale: what the loss is multiplied by before it is differentiated.
          form: of the sums of gradients.

        Returns:
          ({'params': gradient, COLLECTION: statistics, …}, metrics). The gradient by a variable
          that is split is a `Sum` over the devices, divided by `scale`; by another one it is this
          device's, still times `scale`. Statistics are the batch's own, for the optimizer to move
          the running ones by. Metrics are means over the batch.
        """

    def evaluate(self, variables: Variables, batch: Any) -> dict[str, jax.Array]:
        """What is added up over the evaluation set, for every example of a batch.

        Floating-point numbers, integers or truth values, [N]; those of an example that only fills
        up the batch are 0. One of them is 'examples': whether it counts.
        """

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The evaluation's results from the sums over the whole set: Python's numbers."""


def gradient_of(
    train_loss: Callable[
        [Variables, Any], tuple[jax.Array, tuple[dict[str, jax.Array], Variables]]
    ],
    variables: Variables,
    batch: Any,
    scale: jax.Array,
) -> tuple[Variables, dict[str, jax.Array]]:
    """`Task.gradient` where nothing is split.

    Args:
      train_loss: (variables, batch) → (mean loss, (metrics, statistics)).
      variables, batch, scale: as there.
    """
    running = {name: tree for name, tree in variables.items() if name != 'params'}

    def scaled_loss(params):
        loss, aux = train_loss({'params': params, **running}, batch)
        return loss * scale, aux

    gradient, (metrics, statistics) = jax.grad(scaled_loss, has_aux=True)(variables['params'])
    return {'params': gradient, **statistics}, metrics


class Model(NamedTuple):
    """What is learnt and how.

    Attributes:
      task: the model with its loss and metrics.
      optimizer: of weights and running statistics, from `accumulated`.
      schedule: the learning rate that it uses, by optimizer step.
      micro_batches: in an optimizer step, over all devices and micro-steps.
    """

    task: Task
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    micro_batches: int


@flax.struct.dataclass
class TrainState:
    """Everything that a training step updates.

    Attributes:
      variables: of the model, fp32; weights and running statistics.
      opt_state: of `optax.MultiSteps`; between optimizer steps its accumulator is zero.
      loss_scale: 1 and constant unless the dtype is float16.
      rejected: int32, for the collections of variables by name, and for the metrics: 0 or, if what
        was to be added up was not finite or out of range, the number of such an array, from 1. Then
        nothing else of the state moves any more.
    """

    variables: Variables
    opt_state: optax.MultiStepsState
    loss_scale: LossScale
    rejected: jax.Array

    @property
    def step(self) -> jax.Array:
        """Optimizer steps done, int32."""
        return self.opt_state.gradient_step


def init_key(high: Any, low: Any) -> jax.Array:
    """The key that a run's weights are drawn from: of all bits of its seed, high·2³² + low."""
    return jax.random.fold_in(jax.random.key(high), low)


@functools.partial(jax.jit, static_argnames='task')
def initial_variables(key: jax.Array, *, task: Task) -> Variables:
    """A task's variables at step 0. Traced once for a task, however often it is called."""
    return dict(task.init(key))


@functools.partial(jax.jit, static_argnames='model')
def create_train_state(key: jax.Array, *, model: Model) -> TrainState:
    """The state at step 0. Pure: the same key gives the same state, bit for bit."""
    variables = initial_variables(key, task=model.task)
    return TrainState(
        variables,
        model.optimizer.init(variables),
        loss_scaling.initial(model.task.dtype),
        jnp.zeros(len(variables) + 1, jnp.int32),
    )


def abstract_variables(task: Task) -> Variables:
    """A task's variables as shapes and dtypes."""
    shapes: Variables = initial_variables.eval_shape(_abstract_key(), task=task)
    return shapes


def abstract_state(model: Model) -> TrainState:
    """The state as shapes and dtypes."""
    shapes: TrainState = create_train_state.eval_shape(_abstract_key(), model=model)
    return shapes


def _abstract_key() -> jax.Array:
    key: jax.Array = jax.eval_shape(lambda: jax.random.key(0))
    return key


def to_saved(state: TrainState) -> dict[str, Any]:
    """What is worth keeping of a state between two optimizer steps, as nested dicts.

    What an optimizer step gathers over its micro-steps is left out: it is as at the start, and must
    not tie a checkpoint to a number of accumulation steps.
    """
    scale = state.loss_scale
    return {
        'variables': state.variables,
        'opt_state': flax.serialization.to_state_dict(state.opt_state.inner_opt_state),
        'loss_scale': {'value': scale.value, 'good_steps': scale.good_steps},
        'step': state.step,
    }


def from_saved(saved: Mapping[str, Any], template: TrainState) -> TrainState:
    """The inverse of `to_saved`; what that leaves out stays as in `template`, zero in a state."""
    gathered, scale = template.opt_state, saved['loss_scale']
    inner = flax.serialization.from_state_dict(gathered.inner_opt_state, saved['opt_state'])
    return dataclasses.replace(
        template,
        variables=saved['variables'],
        opt_state=gathered._replace(inner_opt_state=inner, gradient_step=saved['step']),
        loss_scale=LossScale(scale['value'], jnp.copy(scale['value']), scale['good_steps']),
    )


def train_step(
    state: TrainState, batch: Any, *, model: Model
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One micro-step; the last one of an optimizer step moves the weights.

    Args:
      state: this device's parts, and all that is not split; donated when compiled.
      batch: one device's micro-batch.
      model: what is learnt.

    Returns:
      The new state, and metrics for training/metrics.py.
    """
    # Between the barriers is the same program for any number of devices and micro-steps; without
    # them XLA would fuse, and so round, differently.
    variables, batch = lax.optimization_barrier((state.variables, batch))
    split = model.task.split
    form = accumulation.formats(variables, model.micro_batches)['params']

    def attempt(scale):
        found, metrics = model.task.gradient(variables, batch, scale, form)
        addends = {kind: packed(kind, collection, split) for kind, collection in found.items()}
        addends['params'][''] /= scale
        return addends, metrics

    if model.task.dtype == 'float16':
        scale, found = loss_scaling.until_finite(attempt, state.loss_scale.value, AXIS)
    else:
        scale, found = state.loss_scale.value, attempt(state.loss_scale.value)
    addends, metrics = lax.optimization_barrier(found)
    total, metrics, rejected, largest = accumulation.added_up(
        addends, metrics, variables, model.micro_batches, AXIS
    )
    total = lax.optimization_barrier(total)
    rejected = jnp.maximum(state.rejected, rejected)
    updates, opt_state = model.optimizer.update(total, state.opt_state, state.variables)
    moved = TrainState(
        optax.apply_updates(state.variables, updates),
        opt_state,
        loss_scaling.following(state.loss_scale, lax.pmin(scale, AXIS), opt_state.mini_step == 0)
        if model.task.dtype == 'float16'
        else state.loss_scale,
        rejected,
    )
    valid = ~rejected.any()
    new = jax.tree.map(lambda a, b: jnp.where(valid, a, b), moved, state)
    new = dataclasses.replace(new, rejected=rejected)
    return new, {
        'sums': metrics,
        'largest_gradient': largest,
        'learning_rate': model.schedule(state.step),
        'loss_scale': new.loss_scale.value,
        'rejected': rejected,
    }


def eval_step(variables: Variables, batch: Any, *, task: Task) -> dict[str, dict[str, jax.Array]]:
    """The task's sums over one evaluation batch of all devices.

    Returns:
      By name the 'counts' of integers and truth values, the 'amounts' of floating-point numbers in
      the format `EVALUATED`, both int64, and not 0 in 'rejected' if one of these was.
    """
    variables, batch = lax.optimization_barrier((variables, batch))
    found = lax.optimization_barrier(task.evaluate(variables, batch))
    amounts = {n: x for n, x in found.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    sums = {
        'counts': {n: exact_sums.total(x) for n, x in found.items() if n not in amounts},
        'amounts': {n: exact_sums.total(EVALUATED.encode(x)) for n, x in amounts.items()},
        'rejected': {n: EVALUATED.rejected(exact_sums.largest(x)) for n, x in amounts.items()},
    }
    return lax.psum(sums, AXIS)
