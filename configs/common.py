# SPDX-License-Identifier: Apache-2.0
"""Settings that the configurations share: fixed by the rules, about hardware, about the log."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """A configuration that lacks what a benchmark must choose for itself."""
    config = ConfigDict()

    config.benchmark = 'resnet'

    # Fixed by the rules.
    config.end_learning_rate = 0.0001
    config.decay_power = 2
    config.lars_epsilon = 0.0
    config.momentum = 0.9

    config.padding = 'symmetric'
    config.truncated_init = True
    config.dtype = 'float32'
    config.seed = None
    config.init_from = None

    config.data_threads = None
    config.data_processes = 0
    config.cache_gib = 1.0
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
