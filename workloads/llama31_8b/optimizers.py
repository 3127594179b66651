# SPDX-License-Identifier: Apache-2.0
"""AdamW as MLPerf has it for this benchmark, with its clipping and its schedule."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import exact_sums
from train_lib import AXIS
from training.workload import Optimizer
from workloads.llama31_8b.fields import LlamaConfig
from workloads.llama31_8b.task import SPLIT

CLIP_EPSILON = 1e-6


def learning_rate_schedule(
    base: float, end: float, warmup_steps: int, last_step: int
) -> optax.Schedule:
    """Linear warm-up, then half a cosine, over optimizer steps k from 0.

    η·(k + 1)/(W + 1) for k ≤ W, then η_end + (η - η_end)·(1 + cos(π·(k - W)/(T - W)))/2 up to
    k = T, and η_end from there (NeMo 2.1.0, `CosineAnnealing`).
    """

    def schedule(step):
        k = jnp.asarray(step, float)  # fp32, but for tests in fp64
        rising = base * (k + 1) / (warmup_steps + 1)
        done = jnp.clip((k - warmup_steps) / (last_step - warmup_steps), 0.0, 1.0)
        falling = end + (base - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(k <= warmup_steps, rising, falling)

    return schedule


def is_matrix(params: Any) -> Any:
    """Which weights decay: all but those of norms, embedding and head included.

    NVIDIA's Megatron-Bridge and NeMo from 2.3.0 on do the same. NeMo 2.1.0, which the official
    reference pins, decays all.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ('scale', 'norm'), params
    )


def clip(
    largest: float, norm: Callable[[Any], jax.Array] = exact_sums.norm
) -> optax.GradientTransformation:
    """Scales the gradient by `largest`/(‖g‖ + 1e-6) where that is below 1.

    `optax.clip_by_global_norm` has no 1e-6 (Megatron-LM, `clip_grads.py`).
    """

    def update(gradient, state, params=None):
        del params
        factor = jnp.minimum(largest / (norm(gradient) + CLIP_EPSILON), 1.0)
        return jax.tree.map(lambda g: g * factor, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
    schedule: optax.Schedule,
    *,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    decays: Callable[[Any], Any] | None = is_matrix,
) -> optax.GradientTransformation:
    """w ← w - η·(m̂/(√v̂ + ε) + λ·w) (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Args:
      schedule: η by step.
      beta_1, beta_2, epsilon, weight_decay: β of m and of v, ε, λ.
      decays: which weights have a λ, by the tree of parameters; None: all.
    """
    return optax.chain(
        optax.scale_by_adam(beta_1, beta_2, epsilon),
        optax.add_decayed_weights(weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )


def create(config: LlamaConfig) -> Optimizer:
    """The optimizer of a run."""
    schedule = learning_rate_schedule(
        config.learning_rate, config.end_learning_rate, config.warmup_steps, config.max_steps
    )
    weights = adamw(
        schedule,
        beta_1=config.beta_1,
        beta_2=config.beta_2,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        decays=None if config.decay_norms else is_matrix,
    )
    norm = functools.partial(exact_sums.norm, axis=AXIS, split=SPLIT)
    return Optimizer(optax.chain(clip(config.gradient_clip_norm, norm), weights), schedule)
