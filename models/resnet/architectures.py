# SPDX-License-Identifier: Apache-2.0
"""The sizes of the networks, by name; a further one is a line. Imports no JAX."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """What sets one ResNet apart from another.

    Attributes:
      stage_sizes: blocks in each stage; stage i is `width`·2^i wide and halves the image (i > 0).
      bottleneck: whether a block has three convolutions, else two.
      width: channels of the stem and the first stage.
      large_stem: 7×7 stride 2 and a 3×3 max-pool (224×224 images), else 3×3 (small images).
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool
    width: int
    large_stem: bool


ARCHITECTURES = {
    'resnet50': Architecture((3, 4, 6, 3), bottleneck=True, width=64, large_stem=True),
    'resnet18_cifar': Architecture((2, 2, 2, 2), bottleneck=False, width=64, large_stem=False),
    'resnet8_cifar': Architecture((1, 1, 1), bottleneck=False, width=8, large_stem=False),
    'resnet_digits': Architecture((1, 1, 1), bottleneck=True, width=16, large_stem=False),
}
