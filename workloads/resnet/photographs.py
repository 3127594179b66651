# SPDX-License-Identifier: Apache-2.0
"""Images of any size: cropped and resized while they are read."""

import numpy as np

from workloads.resnet.image_preprocessing import (
    CENTRAL_FRACTION,
    decode_and_center_crop,
    decode_and_random_crop,
)
from workloads.resnet.records import Records


class Photographs:
    """Reads images of any size, an `images.Reader`.

    Args:
      records: encoded images and labels, by index.
      size: height and width of what is returned, pixels.
    """

    def __init__(self, records: Records, size: int):
        self._records, self._size = records, size

    def train(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A random crop of the image, uint8 [size, size, 3], and the label."""
        encoded, label = self._records[index]
        return decode_and_random_crop(encoded, rng, size=self._size), label

    def evaluation(self, index: int) -> tuple[np.ndarray, int]:
        """The central crop of the image, uint8 [size, size, 3], and the label."""
        encoded, label = self._records[index]
        resize_min = round(self._size / CENTRAL_FRACTION)
        return decode_and_center_crop(encoded, size=self._size, resize_min=resize_min), label
