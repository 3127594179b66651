# SPDX-License-Identifier: Apache-2.0
"""AdamW as MLPerf has it for this benchmark, with its clipping and its schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import exact_sums

BETA_1, BETA_2, EPSILON = 0.9, 0.95, 1e-5
WEIGHT_DECAY, CLIP_NORM, CLIP_EPSILON = 0.1, 1.0, 1e-6
LAST_STEP = 1_200_000  # of the decay, whatever the batch
END_PART = 0.1  # of the base learning rate, where the decay ends


def learning_rate_schedule(base: float, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to a tenth, over optimizer steps k from 0.

    η·(k + 1)/(W + 1) for k ≤ W, then η_end + (η - η_end)·(1 + cos(π·(k - W)/(T - W)))/2 up to
    T = 1,200,000, and η_end from there (NeMo 2.1.0, `CosineAnnealing`).
    """
    end = END_PART * base

    def schedule(step):
        k = jnp.asarray(step, float)  # fp32, but for tests in fp64
        rising = base * (k + 1) / (warmup_steps + 1)
        done = jnp.clip((k - warmup_steps) / (LAST_STEP - warmup_steps), 0.0, 1.0)
        falling = end + (base - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(k <= warmup_steps, rising, falling)

    return schedule


def is_matrix(params: Any) -> Any:
    """Which weights decay: all but those of norms, embedding and head included.

    So NVIDIA's Megatron-Bridge and NeMo from 2.3.0 on. NeMo 2.1.0, of the official reference, means
    to, and decays all.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ('scale', 'norm'), params
    )


def clip(norm: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    """Scales the gradient by 1/(‖g‖ + 1e-6) where that is below 1.

    `optax.clip_by_global_norm` has no 1e-6 (Megatron-LM, `clip_grads.py`).
    """

    def update(gradient, state, params=None):
        del params
        factor = jnp.minimum(CLIP_NORM / (norm(gradient) + CLIP_EPSILON), 1.0)
        return jax.tree.map(lambda g: g * factor, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
    schedule: optax.Schedule,
    decays: Any = is_matrix,
    norm: Callable[[Any], jax.Array] = exact_sums.norm,
) -> optax.GradientTransformation:
    """w ← w - η·(m̂/(√v̂ + ε) + λ·w) with clipped gradients.

    Loshchilov & Hutter 2019, arXiv:1711.05101.

    Args:
      schedule: η by step.
      decays: which weights have a λ, by the tree of parameters.
      norm: of a tree.
    """
    return optax.chain(
        clip(norm),
        optax.scale_by_adam(BETA_1, BETA_2, EPSILON),
        optax.add_decayed_weights(WEIGHT_DECAY, decays),
        optax.scale_by_learning_rate(schedule),
    )
