# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a checkpoint, other weights, or nothing; judged before it writes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import checkpointing
import optimizers
import train_lib
from image_classification import ImageClassification
from input_pipeline import Dataset
from mlperf_log import EventLog
from plan import Plan
from train_lib import TrainState


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


def read(
    config: Mapping[str, Any], plan: Plan, dataset: Dataset, workdir: Path, log: EventLog
) -> Start:
    """Reads and judges what a run starts from; writes nothing.

    Raises:
      LogError: when the log is not that of this run up to the newest checkpoint.
      CheckpointError: when no checkpoint can be used, or `init_from` cannot.
    """
    task = ImageClassification(config, dataset.num_classes)
    state = template(task, optimizers.create(config, plan))
    found = checkpointing.find(workdir / 'checkpoints', state)
    log.check(config, plan, found.step)
    if found.tree is not None or config['init_from'] is None:
        return Start(found)
    path = Path(config['init_from'])
    weights = checkpointing.read_weights(path)
    checkpointing.with_weights(path, weights, state.variables)
    return Start(found, weights)
