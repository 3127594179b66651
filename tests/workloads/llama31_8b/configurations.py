# SPDX-License-Identifier: Apache-2.0
"""A configuration of the benchmark that keeps the rules of the closed division."""

from typing import Any

import pytest

from configs import common
from settings.hyperparameters import resolve
from workloads.llama31_8b.fields import LlamaConfig

RULESETS = ('5.1.0', '6.0.0', '6.1.0')
# For what takes seconds: the newest is enough of a fast test.
EACH_RULESET = [*(pytest.param(v, marks=pytest.mark.slow) for v in RULESETS[:-1]), RULESETS[-1]]

# At a batch of 16, as in the official reference convergence points.
CLOSED: dict[str, Any] = {
    'benchmark': 'llama31_8b',
    'model': 'llama31_8b',
    'dataset': 'c4',
    'sequence_length': 8192,
    'global_batch_size': 16,
    'micro_batch_size': 1,
    'optimizer': 'adamw',
    'learning_rate': 4e-4,
    'end_learning_rate': 4e-5,
    'warmup_steps': 16,
    'decay_steps': 1_199_984,
    'decay_schedule': 'cosine with linear warmup',
    'beta_1': 0.9,
    'beta_2': 0.95,
    'epsilon': 1e-5,
    'weight_decay': 0.1,
    'decay_norms': False,
    'gradient_clip_norm': 1.0,
    'max_steps': 1_200_000,
    'eval_every_samples': 12_288,
    'eval_samples': 1024,
    'target_loss': 3.3,
    'division': 'closed',
}


def base() -> dict[str, Any]:
    """Values by name, as of a configuration file."""
    return dict(common.llama()) | CLOSED


def configure(**fields: Any) -> LlamaConfig:
    """The configuration with other values."""
    return resolve(LlamaConfig, base(), {name: str(value) for name, value in fields.items()})
