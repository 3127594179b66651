# SPDX-License-Identifier: Apache-2.0
"""Images as batches: the same however they are read, augmented anew, and named when broken."""

import math
import shutil

import numpy as np
import pytest

from input_pipeline import AUGMENTATION, Share, example_order, generator
from settings.errors import ConfigError, DataError
from tests.harness import resolve
from workloads.resnet import images, small_images
from workloads.resnet.image_decoding import decode
from workloads.resnet.records import Records, find_dataset
from workloads.resnet.small_images import SmallImages, pad_and_random_crop

N_TRAIN = 1437
BATCHES = -(-N_TRAIN // 64)  # Hold every example once.
WHOLE = Share(0, 64, 64)


def pipeline(data_dir, share=WHOLE, **overrides):
    config = resolve('digits', data_dir, **overrides)
    return images.pipeline(find_dataset('digits', str(data_dir)), config, 5, share)


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a['image'].dtype == b['image'].dtype == np.uint8
        assert a['label'].dtype == b['label'].dtype == np.int32
        np.testing.assert_array_equal(a['image'], b['image'])
        np.testing.assert_array_equal(a['label'], b['label'])


def test_images_of_another_size_are_rejected_by_the_metadata(digits_dir):
    dataset = find_dataset('digits', str(digits_dir))
    images.check(resolve('digits', digits_dir), dataset)
    with pytest.raises(ConfigError, match='image_size=16: the images of digits are of 8'):
        images.check(resolve('digits', digits_dir, image_size=16), dataset)
    with pytest.raises(ConfigError, match='image_size=9: the images of digits are of 8'):
        pipeline(digits_dir, image_size=9)


@pytest.mark.parametrize(
    'overrides',
    [
        {'augmentation': 'crop_resize', 'data_threads': 7},
        {'cache_gib': 0},
        pytest.param({'data_processes': 2}, marks=pytest.mark.slow),
    ],
)
def test_workers_and_cache_change_nothing(digits_dir, overrides):
    plain = overrides | {'data_threads': 1, 'data_processes': 0, 'cache_gib': 1}
    expected, found = pipeline(digits_dir, **plain), pipeline(digits_dir, **overrides)
    assert_equal(found.train(20, 30), expected.train(20, 30))
    assert_equal(found.evaluation(), expected.evaluation())


@pytest.mark.parametrize('augmentation', ['none', 'pad_crop', 'pad_crop_flip'])
def test_batches_are_the_records_shifted_and_flipped_by_position(digits_dir, augmentation):
    records = Records(find_dataset('digits', str(digits_dir)), 'train')
    padding, flip = int(augmentation != 'none'), augmentation == 'pad_crop_flip'
    first = BATCHES - 1  # Into the second epoch.
    found = list(pipeline(digits_dir, augmentation=augmentation).train(first, first + 2))
    order = np.concatenate([example_order(5, epoch, N_TRAIN) for epoch in range(2)])
    for i, position in enumerate(range(first * 64, (first + 2) * 64)):
        encoded, label = records[int(order[position])]
        padded = np.pad(decode(encoded), ((padding, padding), (padding, padding), (0, 0)))
        drawn = generator(5, AUGMENTATION, position).random(3)
        y, x = (drawn[:2] * (2 * padding + 1)).astype(int)
        expected = padded[y : y + 8, x : x + 8]
        if flip and drawn[2] < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(found[i // 64]['image'][i % 64], expected)
        assert found[i // 64]['label'][i % 64] == label


def test_padding_and_cropping_shifts_and_flips_uniformly():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3) + 1
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    possible = [w.tobytes() for w in windows] + [w[:, ::-1].tobytes() for w in windows]
    rng = np.random.default_rng(0)
    draws = 3600
    counts = np.zeros(18)
    for _ in range(draws):
        drawn = pad_and_random_crop(image, rng, padding=1, flip=True)
        counts[possible.index(drawn.tobytes())] += 1
    assert np.abs(counts - draws / 18).max() < 4.5 * math.sqrt(draws / 18)
    for _ in range(50):
        drawn = pad_and_random_crop(image, rng, padding=1, flip=False)
        assert possible.index(drawn.tobytes()) < 9


def test_an_example_is_augmented_anew_in_every_epoch(digits_dir):
    source = pipeline(digits_dir, Share(0, 479, 479))
    views = [{}, {}]
    for epoch in range(2):
        batches = source.train(3 * epoch, 3 * epoch + 3)
        pixels = np.concatenate([batch['image'] for batch in batches])
        for place, index in enumerate(example_order(5, epoch, N_TRAIN)):
            views[epoch][index] = pixels[place].tobytes()
    changed = sum(views[0][index] != views[1][index] for index in range(N_TRAIN))
    assert changed > 0.8 * N_TRAIN  # Nine shifts, of which one is drawn each time.


@pytest.mark.parametrize('augmentation', ['pad_crop', 'crop_resize'])
def test_an_evaluation_ends_with_padding(digits_dir, augmentation):
    *_, last = pipeline(digits_dir, augmentation=augmentation).evaluation()
    rest = 360 % 64
    assert last['image'].shape == (64, 8, 8, 3)
    assert (last['label'][:rest] >= 0).all()
    assert last['image'][:rest].any(axis=(1, 2, 3)).all()
    assert (last['label'][rest:] == images.PADDING_LABEL).all()
    assert not last['image'][rest:].any()


def count_decoded(monkeypatch) -> list[bytes]:
    """What small images are decoded from here on."""
    decoded = []

    def counting(encoded):
        decoded.append(encoded)
        return decode(encoded)

    monkeypatch.setattr(small_images, 'decode', counting)
    return decoded


@pytest.mark.parametrize(('cache_gib', 'times'), [(1, 1), (0, 2)])
def test_a_second_epoch_decodes_nothing_if_images_are_kept(
    digits_dir, monkeypatch, cache_gib, times
):
    decoded = count_decoded(monkeypatch)
    source = pipeline(digits_dir, Share(0, 479, 479), cache_gib=cache_gib)
    for _ in range(2):
        list(source.train(0, 3))
        list(source.evaluation())
    assert len(decoded) == times * (N_TRAIN + 360)


def test_kept_images_stay_as_they_are(digits_dir):
    records = Records(find_dataset('digits', str(digits_dir)), 'train')
    image, _ = SmallImages(records, 8, 'none', keep=True).evaluation(3)
    with pytest.raises(ValueError, match='read-only'):
        image[:] = 0


@pytest.mark.parametrize('processes', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_is_read_before_the_first_batch_is_asked_for(digits_dir, tmp_path, processes):
    shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
    batches = pipeline(tmp_path, data_processes=processes).train(0, 100)
    for shard in tmp_path.glob('digits/**/*array_record*'):
        shard.write_bytes(b'x' * shard.stat().st_size)
    pipeline(tmp_path)
    with pytest.raises(DataError, match=r'digits-train.*verify_dataset.sh digits'):
        next(batches)


@pytest.mark.parametrize('augmentation', ['pad_crop', 'crop_resize'])
def test_a_broken_record_stops_with_its_name(digits_dir, augmentation, monkeypatch):
    number = int(example_order(5, 0, N_TRAIN)[100])
    whole = Records.__getitem__

    def damaged(records, index):
        encoded, label = whole(records, index)
        return (encoded[:40] if index == number else encoded), label

    monkeypatch.setattr(Records, '__getitem__', damaged)
    batches = pipeline(digits_dir, augmentation=augmentation).train(0, 10)
    next(batches)
    named = (
        rf'at training position 100: record {number} of .*digits-train.*verify_dataset.sh digits'
    )
    with pytest.raises(DataError, match=named):
        next(batches)
