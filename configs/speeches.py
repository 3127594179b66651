# SPDX-License-Identifier: Apache-2.0
"""A small Llama that learns English from real speeches, byte by byte, on two cores in minutes.

Data: the messages of the presidents of the United States to Congress, 1790 to 2026; the text is in
the public domain. Model: four layers of the benchmark's network, 0.5 million parameters. Where the
target comes from: docs/llama31_8b.md.

Run: scripts/run_and_time.sh configs/speeches.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The configuration; `python main.py --config=configs/speeches.py --help` has the fields."""
    config = common.llama()

    config.model = 'llama_bytes'
    config.dataset = 'speeches'
    config.sequence_length = 128

    config.global_batch_size = 16
    config.micro_batch_size = 4
    config.learning_rate = 0.003
    config.end_learning_rate = 0.0003
    config.warmup_steps = 20
    config.max_steps = 800
    config.decay_steps = config.max_steps - config.warmup_steps

    config.eval_every_samples = 800
    config.eval_samples = 562  # All that is held out.
    config.target_loss = 1.5
    return config
