# SPDX-License-Identifier: Apache-2.0
"""Decoded images of a small data set, kept in memory, from which whole batches are cut at once.

In: the pixels of each example, once, when it is first asked for. Out: uint8 batches, shifted and
flipped as `image_preprocessing.pad_and_random_crop` does it one by one, bit for bit. No lock is
needed: an example that two threads decode at the same time is written twice with the same bytes,
and its mark is set after them.
"""

import cv2
import numpy as np


class ImageCache:
    """Room for a split's decoded images, each with a border of zeros.

    Its memory is that of the images that are there; a copy in another process starts empty.

    Args:
      count: examples in the split.
      size: height and width of an image, pixels.
      padding: of the border that shifts reach into, pixels.
    """

    def __init__(self, count: int, size: int, padding: int):
        self._arguments = (count, size, padding)
        side = size + 2 * padding
        self._images = np.zeros((count, side, side, 3), np.uint8)
        self._labels = np.zeros(count, np.int32)
        self._has = np.zeros(count, bool)
        # Every row of `size` pixels that a crop can hold, by image, y and x, as one element.
        self._rows = np.ndarray(
            (count, side, 2 * padding + 1),
            np.dtype((np.void, 3 * size)),
            buffer=self._images,
            strides=self._images.strides[:3],
        )

    def __reduce__(self):
        return type(self), self._arguments

    @staticmethod
    def gib(count: int, size: int, padding: int) -> float:
        """What a full cache takes."""
        return count * (3 * (size + 2 * padding) ** 2 + 5) / 2**30

    def has(self, indices: np.ndarray) -> np.ndarray:
        """Which of the indices' images are there already, bool [n]."""
        return self._has[indices]

    def put(self, index: int, image: np.ndarray, label: int) -> None:
        """Keeps an example; image is uint8 [size, size, 3]."""
        _, size, padding = self._arguments
        self._images[index, padding : padding + size, padding : padding + size] = image
        self._labels[index] = label
        self._has[index] = True

    def cut(
        self, indices: np.ndarray, y: np.ndarray, x: np.ndarray, flip: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crops of kept examples.

        Args:
          indices: int [n].
          y, x: int [n], where in the padded image the crop starts, 0..2·padding.
          flip: bool [n], whether the crop is mirrored left and right.

        Returns:
          (uint8 [n, size, size, 3], int32 [n]).
        """
        size = self._arguments[1]
        rows = self._rows[indices[:, None], y[:, None] + np.arange(size), x[:, None]]
        images = rows.view(np.uint8).reshape(-1, size, size, 3)
        for i in np.flatnonzero(flip):
            images[i] = cv2.flip(images[i], 1)
        return images, self._labels[indices]
