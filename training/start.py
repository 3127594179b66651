# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a checkpoint, other weights, or nothing; judged before it writes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import train_lib
from input_pipeline import Dataset
from run_files import log_check
from run_files.mlperf_log import EventLog
from settings.plan import Plan
from train_lib import TrainState
from training import checkpointing
from workloads.resnet import optimizers
from workloads.resnet.task import ImageClassification


@dataclasses.dataclass(frozen=True)
class Start:
    """What process 0 has read: its newest checkpoint, and the weights of `init_from` if it needs
    them.
    """

    found: checkpointing.Found
    weights: Mapping[str, Any] | None = None

    def tree(self, config: Mapping[str, Any], task: Any, optimizer: Any) -> dict[str, Any]:
        """The checkpoint's state, or the one at step 0, as host arrays (checkpointing.to_tree)."""
        if self.found.tree is not None:
            return self.found.tree
        state = train_lib.initial_state(config['seed'], task, optimizer)
        tree = checkpointing.to_tree(state)
        if self.weights is not None:
            path = Path(config['init_from'])
            tree['variables'] = checkpointing.with_weights(path, self.weights, tree['variables'])
        return tree


NOTHING = Start(checkpointing.Found(None))


def template(task: Any, optimizer: Any) -> TrainState:
    """A run's state as shapes and dtypes."""
    return jax.eval_shape(
        lambda key: train_lib.create_train_state(key, task, optimizer),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def _template(config: Mapping[str, Any], plan: Plan, dataset: Dataset) -> TrainState:
    task = ImageClassification(config, dataset.num_classes)
    return template(task, optimizers.create(config, plan))


def read_weights(
    config: Mapping[str, Any], plan: Plan, dataset: Dataset
) -> Mapping[str, Any] | None:
    """The weights of `init_from`; None without it.

    Raises:
      CheckpointError: when it is no whole checkpoint of this model.
    """
    if config['init_from'] is None:
        return None
    path = Path(config['init_from'])
    weights = checkpointing.read_weights(path)
    checkpointing.with_weights(path, weights, _template(config, plan, dataset).variables)
    return weights


def read(
    config: Mapping[str, Any],
    plan: Plan,
    dataset: Dataset,
    workdir: Path,
    log: EventLog,
    weights: Mapping[str, Any] | None,
) -> Start:
    """Reads and judges what a run starts from; writes nothing.

    Args:
      config, plan, dataset, workdir, log: the run's.
      weights: of `init_from`, if they have been read already.

    Raises:
      LogError: when the log is not that of this run up to the newest checkpoint.
      CheckpointError: when no checkpoint can be used, or `init_from` cannot.
    """
    template = _template(config, plan, dataset)
    found = checkpointing.find(workdir / 'checkpoints', template)
    log_check.check(log, config, plan, found.step)
    if found.tree is None and weights is None:
        weights = read_weights(config, plan, dataset)
    return Start(found, weights)
