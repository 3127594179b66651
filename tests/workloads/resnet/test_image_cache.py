# SPDX-License-Identifier: Apache-2.0
"""Images kept in memory give the same batches as images decoded one by one, and only once."""

import numpy as np
import pytest

import input_pipeline
from input_pipeline import Pipeline, Share, find_dataset
from tests.harness import resolve
from workloads.resnet.image_cache import ImageCache
from workloads.resnet.image_preprocessing import pad_and_random_crop

N_TRAIN = 1437
BATCHES = -(-N_TRAIN // 64)  # Hold every example once.


def pipeline(data_dir, **overrides):
    config = resolve('digits', data_dir, **overrides)
    return Pipeline(find_dataset('digits', str(data_dir)), config, 5, Share(0, 64, 64))


@pytest.mark.parametrize('augmentation', ['none', 'pad_crop', 'pad_crop_flip'])
def test_kept_images_give_the_batches_of_those_decoded_one_by_one(digits_dir, augmentation):
    kept = pipeline(digits_dir, augmentation=augmentation)
    one_by_one = pipeline(digits_dir, augmentation=augmentation, cache_gib=0)
    first = BATCHES - 2  # Into the second epoch.
    for ours, theirs in zip(
        kept.train(first, first + 4), one_by_one.train(first, first + 4), strict=True
    ):
        assert ours['image'].tobytes() == theirs['image'].tobytes()
        assert ours['label'].tobytes() == theirs['label'].tobytes()
    for ours, theirs in zip(kept.evaluation(), one_by_one.evaluation(), strict=True):
        assert ours['image'].tobytes() == theirs['image'].tobytes()
        assert ours['label'].tobytes() == theirs['label'].tobytes()


def test_a_second_epoch_decodes_nothing(digits_dir, monkeypatch):
    source = pipeline(digits_dir)
    assert len(list(source.train(0, BATCHES))) == BATCHES
    assert len(list(source.evaluation())) == 6

    def decode(encoded):
        raise AssertionError('decoded again')

    monkeypatch.setattr(input_pipeline, 'decode', decode)
    assert len(list(source.train(BATCHES, 2 * BATCHES))) == BATCHES
    assert len(list(source.evaluation())) == 6


def test_crops_are_those_of_the_pixel_function():
    rng = np.random.default_rng(0)
    cache, images = ImageCache(6, 32, 4), rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    for i in range(6):
        cache.put(i, images[i], 10 * i)
    assert cache.has(np.arange(6)).all()
    drawn = rng.random((200, 3))
    indices = rng.integers(0, 6, 200)
    y, x = (drawn[:, :2] * 9).astype(int).T
    assert {*y} == {*x} == {*range(9)}
    cut, labels = cache.cut(indices, y, x, drawn[:, 2] < 0.5)
    assert (labels == 10 * indices).all()
    for index, numbers, found in zip(indices, drawn, cut, strict=True):

        class Drawn:
            random = iter(numbers.tolist()).__next__

        expected = pad_and_random_crop(images[index], Drawn, padding=4, flip=True)
        assert found.tobytes() == expected.tobytes()
