# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 (Krizhevsky 2009): photographs, minutes on one GPU.

Data: 50,000 32×32 images to train on, 10,000 to evaluate. Model: ResNet-18 with a 3×3 stem. Where
the numbers come from, and which of them are measured: docs/convergence/cifar10.md.

Run: scripts/run_and_time.sh configs/cifar10.py, or with SGD: configs/cifar10.py:sgd
"""

from ml_collections import ConfigDict

from configs import common


def get_config(optimizer: str = 'lars') -> ConfigDict:
    """The configuration; python main.py --help says what each field means.

    Args:
      optimizer: lars or sgd, each with its own learning rate.
    """
    config = common.resnet()

    config.model = 'resnet18_cifar'
    config.dataset = 'cifar10'
    config.image_size = 32
    config.augmentation = 'pad_crop_flip'

    config.global_batch_size = 512
    config.micro_batch_size = 64
    config.bn_span = 32
    config.optimizer = optimizer
    config.learning_rate = {'lars': 6.0, 'sgd': 0.4}[optimizer]
    config.warmup_epochs = 5.0
    config.decay_steps = 2440  # With the warm-up, 30 epochs.
    config.weight_decay = 0.0002
    config.label_smoothing = 0.1

    config.eval_every_epochs = 2
    config.eval_offset_epochs = 0
    config.max_epochs = 30
    config.target_top1 = 0.93

    config.log_every_steps = 20
    return config
