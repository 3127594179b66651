# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits: the whole benchmark in seconds, on any machine.

Data: the 1,797 8×8 greyscale digits that scikit-learn carries (Alpaydin & Kaynak 1998), 1,437 to
train on and 360 to evaluate. Model: a bottleneck ResNet v1.5 with one block a stage.

Run: scripts/run_and_time.sh
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The configuration; python main.py --help says what each field means."""
    config = common.resnet()

    config.model = 'resnet_digits'
    config.dataset = 'digits'
    config.image_size = 8
    config.augmentation = 'pad_crop'

    config.global_batch_size = 256
    config.micro_batch_size = 32
    config.bn_span = 32
    config.optimizer = 'lars'
    config.learning_rate = 5.0
    config.warmup_epochs = 5
    config.decay_steps = 195  # With the warm-up, 40 epochs.
    config.weight_decay = 0.0002
    config.label_smoothing = 0.1

    config.eval_every_epochs = 1
    config.eval_offset_epochs = 0
    config.max_epochs = 40
    config.target_top1 = 0.98
    return config
