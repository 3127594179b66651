# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of the seed and the position."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import DataError, DatasetError, Pipeline, Share, check, find_dataset
from settings.hyperparameters import ConfigError
from tests.harness import resolve
from workloads.resnet.random_streams import example_order

N_TRAIN, N_EVAL = 1437, 360


WHOLE = Share(0, 64, 64)


def pipeline(data_dir, share=WHOLE, seed=5, **overrides):
    config = resolve('digits', data_dir, **overrides)
    return Pipeline(find_dataset('digits', str(data_dir)), config, seed, share)


def images(batches):
    return np.concatenate([batch['image'] for batch in batches])


def labels(batches):
    return np.concatenate([batch['label'] for batch in batches])


def test_epochs_are_permutations_and_differ():
    orders = [example_order(5, epoch, N_TRAIN) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(N_TRAIN))
    assert len({tuple(order) for order in orders}) == 3
    assert tuple(example_order(6, 0, N_TRAIN)) != tuple(orders[0])


def test_an_epoch_holds_every_example_once_and_its_last_batch_is_mixed(digits_dir):
    one_by_one = pipeline(digits_dir, Share(0, 479, 479), augmentation='none')
    first_epoch, second_epoch = images(one_by_one.train(0, 3)), images(one_by_one.train(3, 6))
    assert len(first_epoch) == N_TRAIN
    for_sure = sorted(image.tobytes() for image in first_epoch)
    assert for_sure == sorted(image.tobytes() for image in second_epoch)
    mixed = pipeline(digits_dir, augmentation='none')
    assert (images(mixed.train(0, 23))[:N_TRAIN] == first_epoch).all()
    assert (images(mixed.train(0, 23))[N_TRAIN:] == second_epoch[: 23 * 64 - N_TRAIN]).all()


def test_images_of_another_size_are_rejected_by_the_metadata(digits_dir):
    dataset = find_dataset('digits', str(digits_dir))
    check(resolve('digits', digits_dir), dataset)
    with pytest.raises(ConfigError, match='image_size=16: the images of digits are of 8'):
        check(resolve('digits', digits_dir, image_size=16), dataset)
    with pytest.raises(ConfigError, match='image_size=9: the images of digits are of 8'):
        pipeline(digits_dir, image_size=9)


def test_any_batch_can_be_had_without_those_before_it(digits_dir):
    source = pipeline(digits_dir)
    straight, jumped = list(source.train(0, 40)), list(source.train(33, 40))
    assert images(straight[33:]).tobytes() == images(jumped).tobytes()
    assert labels(straight[33:]).tobytes() == labels(jumped).tobytes()


@pytest.mark.parametrize(
    'overrides',
    [
        {'data_threads': 1},
        {'data_threads': 7},
        {'cache_gib': 0},
        pytest.param({'data_processes': 2}, marks=pytest.mark.slow),
    ],
)
def test_workers_and_cache_change_nothing(digits_dir, overrides):
    expected, found = pipeline(digits_dir), pipeline(digits_dir, **overrides)
    ours, theirs = list(expected.train(20, 30)), list(found.train(20, 30))
    assert images(ours).tobytes() == images(theirs).tobytes()
    assert labels(ours).tobytes() == labels(theirs).tobytes()


def test_processes_share_the_same_batches(digits_dir):
    whole = images(pipeline(digits_dir).train(3, 5))
    parts = [images(pipeline(digits_dir, Share(i * 16, 16, 64)).train(3, 5)) for i in range(4)]
    together = np.concatenate([part.reshape(2, 16, 8, 8, 3) for part in parts], axis=1)
    assert together.reshape(whole.shape).tobytes() == whole.tobytes()


def test_the_seed_decides_order_and_augmentation(digits_dir):
    plain = {'augmentation': 'none'}
    a, b = (labels(pipeline(digits_dir, seed=seed, **plain).train(0, 4)) for seed in (5, 6))
    assert a.tobytes() != b.tobytes()
    augmented, same_order = pipeline(digits_dir), pipeline(digits_dir, **plain)
    first, second = images(augmented.train(0, 4)), images(same_order.train(0, 4))
    assert labels(augmented.train(0, 4)).tobytes() == labels(same_order.train(0, 4)).tobytes()
    assert first.tobytes() != second.tobytes()


def test_an_example_is_augmented_anew_in_every_epoch(digits_dir):
    source = pipeline(digits_dir, Share(0, 479, 479))
    views = [{}, {}]
    for epoch in range(2):
        pixels = images(source.train(3 * epoch, 3 * epoch + 3))
        for place, index in enumerate(example_order(5, epoch, N_TRAIN)):
            views[epoch][index] = pixels[place].tobytes()
    changed = sum(views[0][index] != views[1][index] for index in range(N_TRAIN))
    assert changed > 0.8 * N_TRAIN  # Nine shifts, of which one is drawn each time.


@pytest.mark.parametrize('whole', [1, 7, 64, 359, 360, 361, 1000])
@pytest.mark.parametrize('processes', [1, 3])
def test_evaluation_counts_every_example_once(digits_dir, whole, processes):
    everything = pipeline(digits_dir, Share(0, N_EVAL, N_EVAL)).evaluation()
    expected = sorted(image.tobytes() for image in images(everything))
    found = []
    for process in range(processes):
        share = Share(process * whole, whole, whole * processes)
        for batch in pipeline(digits_dir, share).evaluation():
            found += [image.tobytes() for image in batch['image'][batch['label'] >= 0]]
    assert sorted(found) == expected


def copy_of(digits_dir, tmp_path) -> Path:
    shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
    return tmp_path


def test_no_data_set_tells_how_to_prepare_it(tmp_path):
    with pytest.raises(DatasetError, match=r'download_dataset.sh digits'):
        find_dataset('digits', str(tmp_path))


def test_a_missing_or_empty_shard_is_named(digits_dir, tmp_path):
    data_dir = copy_of(digits_dir, tmp_path)
    shard = next(data_dir.glob('digits/**/*train*array_record*'))
    shard.write_bytes(b'')
    with pytest.raises(DatasetError, match=shard.name):
        find_dataset('digits', str(data_dir))
    shard.unlink()
    with pytest.raises(DatasetError, match='incomplete'):
        find_dataset('digits', str(data_dir))


def test_nothing_is_read_before_the_first_batch_is_asked_for(digits_dir, tmp_path):
    data_dir = copy_of(digits_dir, tmp_path)
    source = pipeline(data_dir)
    for shard in data_dir.glob('digits/**/*array_record*'):
        shard.write_bytes(b'x' * shard.stat().st_size)  # Unreadable from here on.
    pipeline(data_dir)
    with pytest.raises(Exception, match=r'(?i)digits|record|riegeli'):
        next(source.train(0, 1))


def test_a_broken_record_stops_with_its_name(digits_dir, tmp_path, monkeypatch):
    import input_pipeline

    whole = input_pipeline.decode

    def decode(encoded):
        image = whole(encoded)
        if image.sum() % 97 == 0:  # Some record of the set.
            raise ValueError('cannot decode')
        return image

    monkeypatch.setattr(input_pipeline, 'decode', decode)
    with pytest.raises(DataError, match=r'(?s)record \d+.*train.*verify_dataset'):
        list(pipeline(digits_dir).train(0, 23))


TRAINING = """
import multiprocessing, sys, time
from input_pipeline import Pipeline, Share, find_dataset
from tests.harness import resolve

if __name__ == '__main__':
    config = resolve('digits', sys.argv[1], data_processes=2)
    source = Pipeline(find_dataset('digits', sys.argv[1]), config, 5, Share(0, 64, 64))
    batches = source.train(0, 10**9)
    for _ in range(4):
        next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != 'Z'


@pytest.mark.slow
def test_decoding_processes_end_with_the_training_process(digits_dir, tmp_path):
    script = tmp_path / 'training.py'
    script.write_text(TRAINING)
    before = set(os.listdir('/dev/shm'))
    training = subprocess.Popen(
        [sys.executable, script, digits_dir],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])},
    )
    workers = [int(pid) for pid in training.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_running, workers))
    shared_memory = set(os.listdir('/dev/shm')) - before
    training.kill()
    training.wait()
    time.sleep(1)
    assert not any(map(is_running, workers))
    deadline = time.monotonic() + 10  # Python cleans shared memory up in a process of its own.
    while (left := shared_memory & set(os.listdir('/dev/shm'))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
def test_a_killed_decoding_process_is_named(digits_dir):
    batches = pipeline(digits_dir, data_processes=2).train(0, 10**9)
    next(batches)
    before = time.monotonic()
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r'exit code -9.*memory.*config.data_processes'):
        list(itertools.islice(batches, 1000))
    assert time.monotonic() - before < 10


@pytest.mark.slow
def test_a_broken_record_is_named_from_another_process(digits_dir, tmp_path):
    data_dir = copy_of(digits_dir, tmp_path)
    source = pipeline(data_dir, data_processes=2)
    next(data_dir.glob('digits/**/*train*array_record*')).write_bytes(b'x' * 100_000)
    with pytest.raises(DataError, match=r'digits-train.*verify_dataset.sh digits'):
        next(source.train(0, 100))
