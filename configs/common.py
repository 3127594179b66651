# SPDX-License-Identifier: Apache-2.0
"""Settings that the configurations share: fixed by the rules, about hardware, about the log."""

from ml_collections import ConfigDict


def base(benchmark: str) -> ConfigDict:
    """A configuration that lacks what a benchmark must choose for itself."""
    config = ConfigDict()

    config.benchmark = benchmark
    config.dtype = 'float32'
    config.seed = None
    config.init_from = None

    config.data_threads = None
    config.data_processes = 0
    config.deterministic = True

    config.data_dir = 'data'
    config.checkpoint_every_steps = None
    config.stall_seconds = 1800
    config.log_every_steps = 10
    config.drop_page_cache = False
    config.division = 'open'
    config.org = 'reference'
    config.platform = 'unknown'
    config.status = 'research'
    return config


def resnet() -> ConfigDict:
    """A configuration of ResNet that lacks its model, its data and what is tuned."""
    config = base('resnet')

    # Fixed by the rules.
    config.end_learning_rate = 0.0001
    config.decay_power = 2
    config.lars_epsilon = 0.0
    config.momentum = 0.9

    config.padding = 'symmetric'
    config.truncated_init = True
    config.cache_gib = 1.0
    return config


def llama() -> ConfigDict:
    """A configuration of Llama that lacks its model, its data and what is tuned."""
    config = base('llama31_8b')
    config.optimizer = 'adamw'

    # Fixed by the rules.
    config.decay_schedule = 'cosine with linear warmup'
    config.beta_1 = 0.9
    config.beta_2 = 0.95
    config.epsilon = 1e-5
    config.weight_decay = 0.1
    config.gradient_clip_norm = 1.0

    config.decay_norms = False
    config.ruleset = '6.1.0'
    return config
