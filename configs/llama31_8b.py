# SPDX-License-Identifier: Apache-2.0
"""The benchmark: Llama 3.1 8B from random weights on C4, MLPerf Training, closed division.

The hyperparameters are those of the official reference convergence points for a global batch of 32.

Run: scripts/run_and_time.sh configs/llama31_8b.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The configuration; `python main.py --config=configs/llama31_8b.py --help` has the fields."""
    config = common.llama()

    config.model = 'llama31_8b'
    config.dataset = 'c4'
    config.sequence_length = 8192
    config.dtype = 'bfloat16'

    config.global_batch_size = 32
    config.micro_batch_size = 1
    config.learning_rate = 8e-4
    config.end_learning_rate = 8e-5
    config.warmup_steps = 128
    config.max_steps = 1_200_000
    config.decay_steps = config.max_steps - config.warmup_steps

    config.eval_every_samples = 12_288
    config.eval_samples = 1024
    config.target_loss = 3.3

    config.drop_page_cache = True
    config.checkpoint_every_steps = 384  # At every evaluation there is one, too.
    config.division = 'closed'
    return config
