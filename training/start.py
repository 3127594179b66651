# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a checkpoint, other weights, or nothing; judged before it writes."""

import dataclasses
from pathlib import Path
from typing import Any

import train_lib
from run_files import log_check
from run_files.mlperf_log import EventLog
from settings.hyperparameters import Config
from settings.plan import Plan
from train_lib import Model, TrainState, Variables
from training import checkpointing


@dataclasses.dataclass(frozen=True)
class Start:
    """What process 0 has read.

    Attributes:
      found: the newest checkpoint.
      weights: of `init_from`, if the run needs them, with the head that fits this model.
    """

    found: checkpointing.Found
    weights: Variables | None = None

    def saved(self, config: Config, model: Model, head: tuple[str, ...]) -> dict[str, Any]:
        """The checkpoint's state, or the one at step 0, as host arrays (train_lib.to_saved)."""
        if self.found.tree is not None:
            return self.found.tree
        assert config.seed is not None
        tree = train_lib.initial_state(config.seed, model)
        if self.weights is not None:
            path = Path(config.init_from or '')
            tree['variables'], _ = checkpointing.replace_weights(
                path, self.weights, tree['variables'], head
            )
        return tree


def read_weights(
    config: Config, template: TrainState, head: tuple[str, ...]
) -> dict[str, Any] | None:
    """The weights of `init_from`; None without it.

    Raises:
      CheckpointError: when it is no whole checkpoint of this model.
    """
    if config.init_from is None:
        return None
    path = Path(config.init_from)
    weights = checkpointing.read_weights(path)
    checkpointing.replace_weights(path, weights, template.variables, head)
    return weights


def read(
    config: Config,
    plan: Plan,
    template: TrainState,
    head: tuple[str, ...],
    workdir: Path,
    log: EventLog,
    weights: Variables | None,
) -> Start:
    """Reads and judges what a run starts from; writes nothing.

    Args:
      config, plan, workdir, log: the run's.
      template: the run's state, as shapes and dtypes.
      head: see `Workload`.
      weights: of `init_from`, if they have been read already.

    Raises:
      LogError: when the log is not that of this run up to the newest checkpoint.
      CheckpointError: when no checkpoint can be used, or `init_from` cannot.
    """
    found = checkpointing.find(workdir / 'checkpoints', template)
    log_check.check(log, config, plan, found.step)
    if found.tree is None and weights is None:
        weights = read_weights(config, template, head)
    return Start(found, weights)


NOTHING = Start(checkpointing.Found(None))
