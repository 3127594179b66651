# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 with a far smaller network: the same path, in minutes on two CPU cores.

Data: as configs/cifar10.py, all of it. Model: ResNet-8 (He et al. 2015, section 4.2, n = 1) with 8
channels in its first stage instead of 16. Three epochs, so the target is far from what CIFAR-10
allows; guessing gets a tenth.

Run: experiments/study_cifar10.sh --small
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """The configuration; python main.py --help says what each field means."""
    config = cifar10.get_config()

    config.model = 'resnet8_cifar'
    config.global_batch_size = 128
    config.micro_batch_size = 32
    config.learning_rate = 6.0
    config.warmup_epochs = 0.3
    config.decay_steps = 1055  # With the warm-up, 3 epochs.
    config.label_smoothing = 0.0

    config.eval_every_epochs = 1
    config.max_epochs = 3
    config.target_top1 = 0.52
    return config
