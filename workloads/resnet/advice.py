# SPDX-License-Identifier: Apache-2.0
"""What is legal in a configuration and likely a mistake, in words for the person who runs it.

A configuration and its overrides go in, sentences come out. The reference convergence points are
read from mlperf-logging, which carries them for its checker.
"""

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from workloads.resnet.fields import ResNetConfig

BENCHMARK = {'model': 'resnet50', 'dataset': 'imagenet2012', 'optimizer': 'lars'}
POINTS = 'rcp_checker/training_4.0.0/rcps_resnet.json'
# As the points call them, and the fields here.
NAMES = {
    'opt_base_learning_rate': 'learning_rate',
    'opt_learning_rate_warmup_epochs': 'warmup_epochs',
    'opt_learning_rate_decay_steps': 'decay_steps',
    'opt_momentum': 'momentum',
    'opt_weight_decay': 'weight_decay',
    'model_bn_span': 'bn_span',
}
# What must be chosen anew for another batch.
DEPEND_ON_BATCH = ('learning_rate', 'decay_steps')


def warnings(
    base: Mapping[str, Any], overrides: Mapping[str, str], config: ResNetConfig
) -> list[str]:
    """Sentences about fields that do not fit each other.

    Args:
      base: the configuration file's values.
      overrides: texts by name, from flags.
      config: what `hyperparameters.resolve` made of both.
    """
    ours, theirs = config.global_batch_size, base['global_batch_size']
    stale = [name for name in DEPEND_ON_BATCH if name not in overrides]
    if ours == theirs or not stale:
        return []
    fields = ' and '.join(f'{name}={getattr(config, name)}' for name in stale)
    verb = 'are' if len(stale) > 1 else 'is'
    text = f'{fields} {verb} meant for global_batch_size={theirs}, not {ours}'
    if all(getattr(config, name) == value for name, value in BENCHMARK.items()):
        return [f'{text}; {_points(ours)}']
    if 'decay_steps' in stale:
        text += f'; as many epochs of decay are {round(config.decay_steps * theirs / ours)} steps'
    return [text]


def reference_points() -> dict[int, dict[str, Any]]:
    """The official reference convergence points' hyperparameters, by batch; one for each batch."""
    file = importlib.resources.files('mlperf_logging') / POINTS
    points = json.loads(file.read_text()).values()
    return {
        point['BS']: {
            NAMES[key]: value for key, value in point['Hyperparams'].items() if key in NAMES
        }
        for point in points
    }


def _points(batch: int) -> str:
    points = reference_points()
    if batch not in points:
        return f'reference points exist for batches of {", ".join(map(str, sorted(points)))}'
    flags = ' '.join(f'--config.{name}={value}' for name, value in points[batch].items())
    return f'the reference point for {batch} uses {flags}'
