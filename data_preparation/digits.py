# SPDX-License-Identifier: Apache-2.0
"""The 1,797 real handwritten digits that scikit-learn carries, as a TFDS dataset of PNG records.

In: `sklearn.datasets.load_digits`, 8×8 pixels with 17 grey values, part of the package itself, so
that nothing is downloaded. Out: `DATA_DIR/digits/1.0.0` in ArrayRecord format, with the features
`id` (text), `image` (greyscale PNG, 8×8, 0..255) and `label` (0..9).

The split is fixed: of the n digits of a class, in scikit-learn's order, those numbered
floor(j·n / 36) for j = 0..35 are the test set. That is 36 of each class, 360 in all, spread evenly
over the collection (and so over its writers); the other 1,437 are the training set.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_preparation import dataset

TEST_EXAMPLES_PER_CLASS = 36


def test_mask(labels: np.ndarray) -> np.ndarray:
    """Which of the digits with these labels, int[N], belong to the test set, as bool[N]."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = np.arange(TEST_EXAMPLES_PER_CLASS) * len(members) // TEST_EXAMPLES_PER_CLASS
        mask[members[chosen]] = True
    return mask


def encode_png(image: np.ndarray) -> bytes:
    """One digit, float[8,8] in 0..16, as an 8-bit greyscale PNG over the full range 0..255.

    The PNG is stored without compression, so that its bytes do not depend on a library's version.
    """
    pixels = np.rint(image * (255 / 16)).astype(np.uint8)
    return cv2.imencode('.png', pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()


def examples(split: str) -> Iterator[tuple[int, str, bytes, int]]:
    """The examples of a split as `dataset.prepare` takes them."""
    from sklearn.datasets import load_digits  # It takes half a second.

    images, labels = load_digits().images, load_digits().target
    for i in np.flatnonzero(test_mask(labels) == (split == 'test')).tolist():
        yield i, f'{i:04d}', encode_png(images[i]), int(labels[i])


def prepare(data_dir: Path) -> Path:
    """Writes `data_dir/digits/1.0.0` and returns it; raises as `dataset.prepare`."""
    return dataset.prepare(
        'digits',
        '1.0.0',
        data_dir,
        lambda: {split: examples(split) for split in ('train', 'test')},
        tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
        tfds.features.ClassLabel(num_classes=10),
        description='1,797 handwritten digits of 8x8 pixels, as carried by scikit-learn.',
        homepage='https://archive.ics.uci.edu/dataset/80',
    )
