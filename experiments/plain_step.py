# SPDX-License-Identifier: Apache-2.0
"""A training step with averages in floating point, to compare the exact one with."""

from typing import Any, NamedTuple

import jax
import optax
from jax import lax

import train_lib


class Plain(NamedTuple):
    """The state of `plain_step`."""

    variables: train_lib.Variables
    opt_state: Any


def plain_step(
    state: Plain, batch: Any, *, task: train_lib.Task, optimizer: optax.GradientTransformation
) -> tuple[Plain, jax.Array]:
    """A micro-step with averages in floating point, as it is mostly written; and its loss."""
    params, running = state.variables['params'], state.variables['batch_stats']

    def loss_of(params):
        return task.train_loss({'params': params, 'batch_stats': running}, batch)

    gradient, (metrics, found) = jax.grad(loss_of, has_aux=True)(params)
    gradient, loss = lax.pmean(({'params': gradient, **found}, metrics['loss']), train_lib.AXIS)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables)
    return Plain(optax.apply_updates(state.variables, updates), opt_state), loss
