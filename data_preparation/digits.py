# SPDX-License-Identifier: Apache-2.0
"""The 1,797 real handwritten digits that scikit-learn carries, as a TFDS dataset of PNG records.

In: `sklearn.datasets.load_digits`, 8×8 pixels with 17 grey values, part of the package itself, so
that nothing is downloaded. Out: `DATA_DIR/digits/1.0.0` in ArrayRecord format, with the features
`id` (text), `image` (greyscale PNG, 8×8, 0..255) and `label` (0..9).

The split is fixed: of the n digits of a class, in scikit-learn's order, those numbered
floor(j·n / 36) for j = 0..35 are the test set. That is 36 of each class, 360 in all, spread evenly
over the collection (and so over its writers); the other 1,437 are the training set.
"""

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


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The TFDS builder; it hands over encoded bytes, so TensorFlow is not needed."""

    name = 'digits'
    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='1,797 handwritten digits of 8x8 pixels, as carried by scikit-learn.',
            homepage='https://archive.ics.uci.edu/dataset/80',
            features=tfds.features.FeaturesDict({
                'id': tfds.features.Text(),
                'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(num_classes=10),
            }),
            supervised_keys=('image', 'label'),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples('train'), 'test': self._generate_examples('test')}

    def _generate_examples(self, split: str):
        from sklearn.datasets import load_digits  # needed to prepare the data, never to train

        images, labels = load_digits().images, load_digits().target
        in_split = test_mask(labels) == (split == 'test')
        for index in np.flatnonzero(in_split).tolist():
            yield (
                index,
                {
                    'id': f'{index:04d}',
                    'image': encode_png(images[index]),
                    'label': int(labels[index]),
                },
            )


def prepare(data_dir: Path) -> Path:
    """Writes `data_dir/digits/1.0.0` and returns it; returns at once when it is there.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    version = str(Digits.VERSION)
    if dataset.is_prepared(Digits.name, data_dir, version):
        return data_dir / Digits.name / version
    return dataset.write(Digits(data_dir=data_dir, file_format='array_record'))
