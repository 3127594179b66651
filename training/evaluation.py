# SPDX-License-Identifier: Apache-2.0
"""Evaluation over the whole set: the one loop, for training and for `--mode=eval`."""

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import train_lib
from settings.errors import CheckpointError, ConfigError
from settings.hyperparameters import Config
from settings.plan import Dataset
from training import compilation, metrics, processes, restoring
from training.device_feed import Clock, on_devices
from training.workload import Workload, check_split


def _nothing() -> bool:
    return False


def total(
    program: Callable[[Any, Any], dict[str, jax.Array]],
    variables: train_lib.Variables,
    batches: Iterator[Any],
    mesh: Mesh,
    *,
    poll: Callable[[], Any] = _nothing,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Adds up what the evaluation step gives over all batches.

    Args:
      program: the compiled evaluation step.
      variables: of the model, on the devices.
      batches: of host arrays, this process's part.
      mesh: of the devices.
      poll: asks all processes whether to stop, as `StopRequest.poll`.
      beat: is called after every batch.

    Returns:
      The sums; None if the run was asked to stop.
    """
    totals: list[dict[str, Any]] = []
    pending: collections.deque = collections.deque()

    def read() -> bool:
        sums, stop = jax.device_get(pending.popleft())
        totals.append(sums)
        beat()
        return bool(stop)

    for batch in on_devices(batches, mesh, Clock()):
        pending.append((program(variables, batch), poll()))
        if len(pending) > 2 and read():
            return None
    while pending:
        if read():
            return None
    return metrics.evaluated(totals)


def evaluate(workload: Workload, config: Config, dataset: Dataset) -> dict[str, float]:
    """Evaluates the checkpoint `init_from`; writes nothing.

    Nothing of training is compiled or judged: a global batch that does not fit the devices does not
    matter here.

    Returns:
      The task's quality and 'examples': every example of the set counts once.

    Raises:
      ConfigError: when `init_from` names no checkpoint.
      CheckpointError: when it is damaged, of another model or number of classes, or diverged: an
        array or the loss is not finite.
    """
    if config.init_from is None:
        raise ConfigError(
            'evaluation needs --config.init_from=PATH, a checkpoint (WORKDIR/checkpoints/STEP)'
        )
    path, task, mesh = (
        Path(config.init_from),
        workload.task(config, dataset),
        compilation.make_mesh(),
    )
    check_split(task, mesh.size)
    shapes = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    like = compilation.placed_shapes(mesh, dict(shapes), task.split)

    def check() -> None:
        replaced = restoring.check_weights(path, like, workload.head)
        if replaced:
            raise CheckpointError(
                f'{path} is not for {dataset.name}: {", ".join(replaced)} have another shape; '
                'there is nothing to evaluate'
            )

    processes.run_on_lead(check)
    share = processes.local_share(mesh, mesh.size * config.micro_batch_size)
    sums = total(
        compilation.trace_evaluate(task, config.micro_batch_size, mesh).lower().compile(),
        restoring.weights(path, like),
        workload.pipeline(config, dataset, None, share).evaluation(),
        mesh,
    )
    assert sums is not None
    quality = task.quality(sums)
    non_finite = [f'{name} = {value}' for name, value in quality.items() if not np.isfinite(value)]
    if non_finite:
        raise CheckpointError(
            f'init_from={path} has diverged: {", ".join(non_finite)} is not finite'
        )
    return quality | {'examples': sums['examples']}
