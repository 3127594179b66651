# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a checkpoint, other weights, or nothing; judged before it writes."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from run_files import log_check
from run_files.mlperf_log import EventLog
from settings.hyperparameters import Config
from settings.plan import Plan
from train_lib import Model, TrainState
from training import compilation, restoring
from training.restoring import Found


def state(found: Found, config: Config, model: Model, mesh: Mesh) -> TrainState:
    """The checkpoint's state, which is used up, or the one at step 0; on the mesh."""
    if found.tree is not None:
        return compilation.resumed_state(found.tree, model, mesh)
    assert config.seed is not None
    first = compilation.initial_state(config.seed, model, mesh)
    if config.init_from is None:
        return first
    variables = restoring.weights(Path(config.init_from), first.variables)
    return dataclasses.replace(first, variables=variables)


def check_weights(config: Config, template: TrainState, head: tuple[str, ...]) -> None:
    """Judges the weights of `init_from`, if there are any.

    Raises:
      CheckpointError: when it is no whole checkpoint of this model.
    """
    if config.init_from is not None:
        restoring.check_weights(Path(config.init_from), template.variables, head)


def check(
    step: int,
    config: Config,
    plan: Plan,
    template: TrainState,
    head: tuple[str, ...],
    log: EventLog,
    weights_are_checked: bool,
) -> None:
    """Judges what a run starts from; writes nothing.

    Args:
      step: of the newest checkpoint, 0 if there is none.
      config, plan, log: the run's.
      template: the run's state, as shapes and dtypes.
      head: see `Workload`.
      weights_are_checked: those of `init_from`.

    Raises:
      LogError: when the log is not that of this run up to the newest checkpoint.
      CheckpointError: when `init_from` cannot be used.
    """
    log_check.check(log, config, plan, step)
    if step == 0 and not weights_are_checked:
        check_weights(config, template, head)
