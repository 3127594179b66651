# SPDX-License-Identifier: Apache-2.0
"""Evaluation alone: the quality of any checkpoint, ours or imported, over the whole set."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

import train_lib
from input_pipeline import Dataset, Pipeline
from settings import hyperparameters
from training import checkpointing, processes
from workloads.resnet.task import ImageClassification


def evaluate(config: Mapping[str, Any], dataset: Dataset) -> dict[str, float]:
    """Evaluates the checkpoint `init_from`; writes nothing.

    Nothing of training is compiled or judged: a global batch that does not fit the devices does not
    matter here.

    Returns:
      {'eval_top1', 'eval_loss', 'examples'}: every example of the set counts once.

    Raises:
      ConfigError: when `init_from` names no checkpoint.
      CheckpointError: when it is damaged, of another model or number of classes, or diverged: an
        array or the loss is not finite.
    """
    if config['init_from'] is None:
        raise hyperparameters.ConfigError(
            'evaluation needs --config.init_from=PATH, a checkpoint (WORKDIR/checkpoints/STEP)'
        )
    task = ImageClassification(config, dataset.num_classes)
    shapes = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(shapes))
    weights = processes.lead_does(lambda: _weights(Path(config['init_from']), zeros, dataset))
    weights = processes.from_lead(zeros if weights is None else weights)
    mesh, place = train_lib.make_mesh(), jax.make_array_from_process_local_data
    replicated = NamedSharding(mesh, train_lib.REPLICATED)
    sharded = NamedSharding(mesh, train_lib.SHARDED)
    sums_of = jax.jit(task.evaluate, out_shardings=replicated)
    variables = jax.tree.map(lambda x: place(replicated, x, x.shape), weights)
    fitting = config['per_device_batch'] or hyperparameters.ACCELERATORS[config['accelerator']]
    per_device_batch = min(fitting, -(-dataset.num_eval // mesh.size))
    share = processes.share_of(mesh, mesh.size * per_device_batch)
    totals: dict[str, Any] = collections.defaultdict(int)
    for batch in Pipeline(dataset, config, 0, share).evaluation():
        sums = sums_of(variables, jax.tree.map(lambda x: place(sharded, x), batch))
        for name, value in jax.device_get(sums).items():
            totals[name] += value.item()
    quality = task.quality(totals)
    wild = [f'{name} = {value}' for name, value in quality.items() if not np.isfinite(value)]
    if wild:
        raise checkpointing.CheckpointError(
            f'init_from={config["init_from"]} has diverged: {", ".join(wild)} is not finite'
        )
    return quality | {'examples': totals['examples']}


def _weights(path: Path, ours: Mapping[str, Any], dataset: Dataset) -> Mapping[str, Any]:
    """The checkpoint's variables, all of them."""
    theirs = checkpointing.initial_weights(path, ours)
    if theirs['params']['fc'] is ours['params']['fc']:
        raise checkpointing.CheckpointError(
            f'{path} has another number of classes than the {dataset.num_classes} of '
            f'{dataset.name}; there is nothing to evaluate'
        )
    return theirs
