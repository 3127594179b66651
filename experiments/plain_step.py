# SPDX-License-Identifier: Apache-2.0
"""A training step with averages in floating point, to compare the exact one with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import train_lib
from exact_sums import FixedPoint


class Plain(NamedTuple):
    """The state of `plain_step`."""

    variables: train_lib.Variables
    opt_state: Any


def plain_step(
    state: Plain, batch: Any, *, task: train_lib.Task, optimizer: optax.GradientTransformation
) -> tuple[Plain, jax.Array]:
    """A micro-step with averages in floating point, as it is mostly written; and its loss."""
    found, metrics = task.gradient(state.variables, batch, jnp.float32(1), FixedPoint(1.0, 1))
    gradient, loss = lax.pmean((found, metrics['loss']), train_lib.AXIS)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables)
    return Plain(optax.apply_updates(state.variables, updates), opt_state), loss
