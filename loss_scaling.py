# SPDX-License-Identifier: Apache-2.0
"""Dynamic loss scaling for float16 (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

Every micro-batch searches its own scale, from one that depends on the step alone; the next step's
follows from the smallest. So it does not depend on how many devices there are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import exact_sums

INITIAL_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**15, 2.0**24
STEPS_TO_DOUBLE_LOSS_SCALE = 2000


class LossScale(NamedTuple):
    """The factor on the loss.

    Attributes:
      value: that every micro-batch of this optimizer step tries first.
      lowest: that one of them needed.
      good_steps: optimizer steps in a row in which none needed a smaller one.
    """

    value: jax.Array
    lowest: jax.Array
    good_steps: jax.Array


def initial(dtype: str) -> LossScale:
    """The scale at step 0 for a dtype of activations."""
    value = jnp.float32(INITIAL_LOSS_SCALE if dtype == 'float16' else 1.0)
    return LossScale(value, value, jnp.int32(0))


def until_finite(
    attempt: Callable[[jax.Array], Any], scale: jax.Array, axis: str
) -> tuple[jax.Array, Any]:
    """Runs `attempt(scale)`, halving the scale while the result overflows and the scale is > 1.

    The micro-batch is tried again on the device, so a run never skips an example, and its position
    in the data stays the step. Devices try together, for `attempt` may add up over them; those
    whose own result is finite keep to their scale.

    Returns:
      The last scale, and what `attempt` returned for it.
    """

    def body(carry):
        scale, overflowed, _, _ = carry
        scale = jnp.where(overflowed, scale / 2, scale)
        result = attempt(scale)
        overflowed = ~exact_sums.are_finite(result) & (scale > 1)
        return scale, overflowed, lax.pmax(overflowed.astype(jnp.int32), axis), result

    shapes = jax.eval_shape(attempt, scale)
    with jax.enable_x64(True):  # For sums.
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (scale * 2, jnp.bool_(True), jnp.int32(1), nothing)
    scale, _, _, result = lax.while_loop(lambda carry: carry[2] > 0, body, start)
    return scale, result


def following(old: LossScale, used: jax.Array, is_whole: jax.Array) -> LossScale:
    """The loss scale after a micro-step that used `used`, and may have ended an optimizer step."""
    lowest = jnp.minimum(old.lowest, used)
    good_steps = jnp.where(lowest < old.value, 0, old.good_steps + 1)
    double = good_steps >= STEPS_TO_DOUBLE_LOSS_SCALE
    next_value = jnp.where(double, jnp.minimum(2 * lowest, LARGEST_LOSS_SCALE), lowest)
    ended = LossScale(next_value, next_value, jnp.where(double, 0, good_steps))
    under_way = old._replace(lowest=lowest)
    return jax.tree.map(lambda a, b: jnp.where(is_whole, a, b), ended, under_way)
