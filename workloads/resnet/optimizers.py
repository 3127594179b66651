# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule, LARS, SGD, and the optimizer that is put together of them.

The optimizer moves all of the model's variables, {'params': …, 'batch_stats': …}: weights by their
gradient, BatchNorm's running statistics by the batch's own. So both see the average over the whole
global batch, however many devices and micro-steps it was computed on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from settings.plan import Plan
from training.workload import Optimizer
from workloads.resnet.fields import ResNetConfig

LARS_COEFFICIENT = 0.001
BATCH_NORM_MOMENTUM = 0.9


def warmup_steps(config: ResNetConfig, num_train: int) -> int:
    """Optimizer steps of warm-up: `warmup_epochs` times the steps of an epoch, rounded up.

    The official code rounds up where it keeps an epoch's last examples, as this program does; by
    default it drops them and rounds down (at a batch of 4096: 313 and 312 steps, a warm-up of 1565
    and 1560).
    """
    return round(config.warmup_epochs * math.ceil(num_train / config.global_batch_size))


def learning_rate_schedule(config: ResNetConfig, num_train: int) -> optax.Schedule:
    """Linear warm-up, then polynomial decay, over optimizer steps t from 0.

    η·t/W for t ≤ W; then (η - η_end)·(1 - min(t - W, D)/D)^power + η_end, with W = warm-up steps
    and D = decay steps (MLPerf training v4.0, ResNet).
    """
    base, end = config.learning_rate, config.end_learning_rate
    warmup = float(warmup_steps(config, num_train))
    decay = float(config.decay_steps)

    def schedule(step):
        t = jnp.asarray(step, float)  # fp32, but for tests in fp64
        rising = base * t / max(warmup, 1)
        done = jnp.clip((t - warmup) / max(decay, 1), 0.0, 1.0)
        if decay == 0:  # Allowed for SGD: the decay is over where it begins.
            done = jnp.where(t > warmup, 1.0, 0.0)
        falling = (base - end) * (1.0 - done) ** config.decay_power + end
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


def moving_average(momentum: float) -> optax.GradientTransformation:
    """running ← momentum·running + (1 - momentum)·batch, where the updates are the batch's own."""

    def update(batch, state, running):
        return jax.tree.map(lambda b, r: (1 - momentum) * (b - r), batch, running), state

    return optax.GradientTransformation(lambda running: optax.EmptyState(), update)


def of_weights(config: ResNetConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The configured optimizer of the weights alone."""
    if config.optimizer == 'lars':
        return lars(schedule, config.momentum, config.weight_decay, config.lars_epsilon)
    return sgd(schedule, config.momentum, config.weight_decay)


def with_statistics(weights: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of all variables, from that of the weights."""
    return optax.partition(
        {'weights': weights, 'statistics': moving_average(BATCH_NORM_MOMENTUM)},
        {'params': 'weights', 'batch_stats': 'statistics'},
    )


def create(config: ResNetConfig, plan: Plan) -> Optimizer:
    """The optimizer of a run, of weights and running statistics."""
    schedule = learning_rate_schedule(config, plan.num_train)
    return Optimizer(with_statistics(of_weights(config, schedule)), schedule)
