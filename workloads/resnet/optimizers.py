# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule, LARS, SGD, and their assembly with gradient accumulation.

The optimizer's "weights" are the model's variables, {'params': …, 'batch_stats': …}: the running
statistics are moved by the same transformation as the weights, so that both see the average over
the whole global batch, however many devices and micro-steps it was computed on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from settings.plan import Plan

LARS_COEFFICIENT = 0.001
BATCH_NORM_MOMENTUM = 0.9


def learning_rate_schedule(config: Mapping[str, Any], plan: Plan) -> optax.Schedule:
    """Linear warm-up, then polynomial decay, over optimizer steps t from 0.

    η·t/W for t ≤ W; then (η - η_end)·(1 - min(t - W, D)/D)^power + η_end, with W = warm-up steps
    and D = decay steps (MLPerf training v4.0, ResNet).
    """
    base, end = config['learning_rate'], config['end_learning_rate']
    warmup, decay = float(plan.warmup_steps), float(plan.decay_steps)

    def schedule(step):
        t = jnp.asarray(step, float)  # fp32, but for tests in fp64
        rising = base * t / max(warmup, 1)
        done = jnp.clip((t - warmup) / max(decay, 1), 0.0, 1.0)
        if decay == 0:  # Allowed for SGD: the decay is over where it begins.
            done = jnp.where(t > warmup, 1.0, 0.0)
        falling = (base - end) * (1.0 - done) ** config['decay_power'] + end
        return jnp.where(t < warmup, rising, falling)

    return schedule


def _path(key_path) -> tuple[str, ...]:
    return tuple(entry.key for entry in key_path)


def is_kernel(path: tuple[str, ...]) -> bool:
    """Whether a path in the tree of parameters is that of a convolution or dense kernel."""
    return path[-1] == 'kernel'


def is_batch_norm(path: tuple[str, ...]) -> bool:
    """Whether a path in the tree of parameters is that of a BatchNorm scale or bias."""
    return 'bn' in path[-2]


def _mask(keep: Callable[[tuple[str, ...]], bool]) -> Callable[[Any], Any]:
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda key_path, _: keep(_path(key_path)), params
    )


def scale_by_layer(weight_decay: float, epsilon: float) -> optax.GradientTransformation:
    """LARS's layer-wise rate, with the weight decay inside (You et al. 2017, arXiv:1708.03888).

    g -> r·(g + λ·w), r = 0.001·‖w‖ / (‖g‖ + λ·‖w‖ + ε) where both norms are positive, else 1.
    `optax.lars` is not this: it takes the norm of the sum, ‖g + λ·w‖.
    """

    def update(updates, state, params):
        def scaled(g, w):
            g_norm, w_norm = jnp.linalg.norm(g.ravel()), jnp.linalg.norm(w.ravel())
            both = (g_norm > 0) & (w_norm > 0)
            denominator = jnp.where(both, g_norm + weight_decay * w_norm + epsilon, 1.0)
            ratio = jnp.where(both, LARS_COEFFICIENT * w_norm / denominator, 1.0)
            return ratio * (g + weight_decay * w)

        return jax.tree.map(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lars(
    schedule: optax.Schedule, momentum: float, weight_decay: float, epsilon: float
) -> optax.GradientTransformation:
    """LARS: v ← μ·v - η_t·r·(g + λ·w); w ← w + v. Only kernels are decayed and have r ≠ 1."""
    return optax.chain(
        optax.masked(scale_by_layer(weight_decay, epsilon), _mask(is_kernel)),
        optax.scale_by_learning_rate(schedule),
        optax.trace(momentum),
    )


def sgd(
    schedule: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD: v ← μ·v - η_t·(g + 2λ·w); w ← w + v. Only BatchNorm is not decayed.

    The official reference adds λ·Σw² to the loss; 2λ·w is that term's gradient.
    """
    return optax.chain(
        optax.add_decayed_weights(2 * weight_decay, _mask(lambda path: not is_batch_norm(path))),
        optax.scale_by_learning_rate(schedule),
        optax.trace(momentum),
    )


class SingleStep(optax.MultiSteps):
    """`optax.MultiSteps` for k = 1: the same updates, without an accumulator of the gradient."""

    def __init__(self, transform: optax.GradientTransformation):
        super().__init__(transform, 1)

    def init(self, params: Any) -> optax.MultiStepsState:
        """The state before the first step."""
        zero = jnp.zeros((), jnp.int32)
        return optax.MultiStepsState(zero, zero, self.inner_opt.init(params), acc_grads=())

    def update(self, updates: Any, state: optax.MultiStepsState, params: Any = None, **extra_args):
        """The wrapped transformation's updates, and the next state."""
        updates, inner = self.inner_opt.update(
            updates, state.inner_opt_state, params=params, **extra_args
        )
        step = state.gradient_step + 1
        return updates, state._replace(inner_opt_state=inner, gradient_step=step)


def create(config: Mapping[str, Any], plan: Plan) -> optax.MultiSteps:
    """The optimizer of a run: of weights and running statistics, over k micro-steps.

    `update` takes the gradient of the weights and, as the running statistics' "gradient", the
    difference running - batch: with `optax.sgd(1 - 0.9)` these follow
    running ← 0.9·running + 0.1·batch, once per optimizer step.
    """
    schedule = learning_rate_schedule(config, plan)
    if config['optimizer'] == 'lars':
        weights = lars(schedule, config['momentum'], config['weight_decay'], config['lars_epsilon'])
    else:
        weights = sgd(schedule, config['momentum'], config['weight_decay'])
    both = optax.partition(
        {'weights': weights, 'statistics': optax.sgd(1 - BATCH_NORM_MOMENTUM)},
        {'params': 'weights', 'batch_stats': 'statistics'},
    )
    if plan.accumulation_steps == 1:
        return SingleStep(both)
    # The accumulator is fp32, but for tests in fp64.
    return optax.MultiSteps(both, plan.accumulation_steps, accumulator_dtype=float)
