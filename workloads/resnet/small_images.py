# SPDX-License-Identifier: Apache-2.0
"""Images of one size: decoded, shifted by some pixels and flipped, not resized.

Decoded images are kept in memory, which saves CPU time that training on a CPU needs itself: an
example of CIFAR-10 takes 23 instead of 224 µs of a core, one of the digits 20 instead of 94.
(AMD EPYC, 2 cores, load 10, 2026-11-25: medians of 9 rounds in turns of `Pipeline.train` with
cache_gib=1, when all were kept, and cache_gib=0.)
"""

import numpy as np

from workloads.resnet.image_decoding import decode
from workloads.resnet.records import Records


class SmallImages:
    """Reads images of one size, an `images.Reader`.

    Args:
      records: encoded images and labels, by index.
      size: height and width of all of them, pixels.
      augmentation: pad_crop_flip, pad_crop or none.
      keep: whether what has been decoded stays in memory, one copy in every process that reads.
    """

    def __init__(self, records: Records, size: int, augmentation: str, keep: bool):
        self._records, self._size, self._keep = records, size, keep
        self._padding = 0 if augmentation == 'none' else size // 8
        self._flip = augmentation == 'pad_crop_flip'
        self._kept: dict[int, tuple[np.ndarray, int]] = {}

    def train(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The example, shifted and flipped."""
        image, label = self.evaluation(index)
        return pad_and_random_crop(image, rng, padding=self._padding, flip=self._flip), label

    def evaluation(self, index: int) -> tuple[np.ndarray, int]:
        """The example, uint8 [size, size, 3] and label.

        Raises:
          ValueError: its image cannot be decoded or has another size.
        """
        if index in self._kept:
            return self._kept[index]
        encoded, label = self._records[index]
        image = decode(encoded)
        image.flags.writeable = False
        if image.shape[:2] != (self._size, self._size):
            raise ValueError(
                f'it is {image.shape[1]}×{image.shape[0]}, not image_size={self._size}'
            )
        if self._keep:
            self._kept[index] = image, label
        return image, label


def pad_and_random_crop(
    image: np.ndarray, rng: np.random.Generator, *, padding: int, flip: bool
) -> np.ndarray:
    """Zero padding, a random crop of the old size, maybe a flip.

    Args:
      image: uint8 [H, W, 3].
      rng: where the crop's two offsets and the flip come from.
      padding: rows and columns of zeros on each side; the crop starts anywhere in 0..2·padding.
      flip: whether to mirror left and right with probability 1/2.

    Returns:
      uint8 [H, W, 3].
    """
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)  # np.pad is slower
    padded[padding : padding + height, padding : padding + width] = image
    y, x = (int(rng.random() * (2 * padding + 1)) for _ in range(2))
    crop = padded[y : y + height, x : x + width]
    return crop[:, ::-1] if flip and rng.random() < 0.5 else crop
