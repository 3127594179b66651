# SPDX-License-Identifier: Apache-2.0
"""The benchmark: ResNet-50 v1.5 on ImageNet (ILSVRC2012), MLPerf Training v4.0, closed division.

`configs/imagenet.py` is the reference convergence point for a global batch of 4096, with LARS: 39
to 42 epochs to 75.9 % top-1 in its ten official runs. `configs/imagenet.py:sgd` is the other
optimizer that the rules allow, with the rate that Goyal et al. 2017 (arXiv:1706.02677) scale with
the batch, 0.1 for 256, and their weight decay. It has no official reference point, and no run of it
has been made.

Every device computes micro_batch_size images at a time, and the batch is accumulated in as many
steps as it takes. A GPU with more memory is faster with a larger one (docs/performance.md); the
result then differs by rounding.

Run: scripts/run_and_time.sh configs/imagenet.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config(optimizer: str = 'lars') -> ConfigDict:
    """The configuration; python main.py --help says what each field means.

    Args:
      optimizer: 'lars' or 'sgd'.

    Raises:
      ValueError: for another optimizer.
    """
    if optimizer not in ('lars', 'sgd'):
        raise ValueError(f'{optimizer!r} is not one of lars, sgd')
    config = common.resnet()

    config.model = 'resnet50'
    config.dataset = 'imagenet2012'
    config.image_size = 224
    config.augmentation = 'crop_resize'

    config.global_batch_size = 4096
    config.micro_batch_size = 64  # A GPU of 16 GB holds it in fp32.
    config.bn_span = 64
    config.optimizer = 'lars'
    config.learning_rate = 10.0
    config.warmup_epochs = 5
    config.decay_steps = 13137
    config.weight_decay = 0.0002
    config.label_smoothing = 0.1

    config.eval_every_epochs = 4
    config.eval_offset_epochs = 0
    config.max_epochs = 48
    config.target_top1 = 0.759

    if optimizer == 'sgd':
        config.optimizer = 'sgd'
        config.global_batch_size = 1024
        config.learning_rate = 0.4
        config.decay_steps = 83827  # With the warm-up, 72 epochs.
        config.weight_decay = 0.00005  # SGD takes 2λ·w.
        config.max_epochs = 72

    config.drop_page_cache = True
    config.checkpoint_every_steps = -(-1_281_167 // config.global_batch_size)  # One an epoch.
    config.division = 'closed'
    return config
