# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of the seed and the position."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import Share, example_order
from settings.errors import DataError
from tests.numbered_examples import PADDING, Numbers, pipeline

N_TRAIN, N_EVAL = 1437, 360
ROOT = Path(__file__).parents[1]


def joined(batches) -> dict[str, np.ndarray]:
    """All batches as one."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(ours, theirs) -> None:
    ours, theirs = joined(ours), joined(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_epochs_are_permutations_and_differ():
    orders = [example_order(5, epoch, N_TRAIN) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(N_TRAIN))
    assert len({tuple(order) for order in orders}) == 3
    assert tuple(example_order(6, 0, N_TRAIN)) != tuple(orders[0])


def test_an_epoch_holds_every_example_once_and_its_last_batch_is_mixed():
    whole = pipeline(share=Share(0, 479, 479))
    first_epoch, second_epoch = (joined(whole.train(i, i + 3))['example'] for i in (0, 3))
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(N_TRAIN))
    mixed = joined(pipeline().train(0, 23))
    np.testing.assert_array_equal(mixed['example'][:N_TRAIN], first_epoch)
    np.testing.assert_array_equal(mixed['example'][N_TRAIN:], second_epoch[: 23 * 64 - N_TRAIN])
    np.testing.assert_array_equal(mixed['position'], np.arange(23 * 64))


def test_a_batch_larger_than_an_epoch_goes_round():
    batch = joined(pipeline(Numbers(10), share=Share(3, 22, 30)).train(1, 2))
    order = np.concatenate([example_order(5, epoch, 10) for epoch in range(6)])
    np.testing.assert_array_equal(batch['example'], order[33:55])


def test_any_batch_can_be_had_without_those_before_it():
    straight = list(pipeline().train(0, 40))
    assert_equal(straight[33:], pipeline().train(33, 40))


@pytest.mark.slow
def test_processes_change_nothing():
    assert_equal(pipeline(processes=2).train(20, 30), pipeline().train(20, 30))
    assert_equal(pipeline(processes=2).evaluation(), pipeline().evaluation())


def test_shares_are_parts_of_the_same_batches():
    whole = joined(pipeline().train(3, 5))
    parts = [joined(pipeline(share=Share(i * 16, 16, 64)).train(3, 5)) for i in range(4)]
    for name in whole:
        together = np.concatenate([part[name].reshape(2, 16) for part in parts], axis=1)
        np.testing.assert_array_equal(together.ravel(), whole[name])


def test_the_seed_decides_order_and_augmentation():
    five, six = (joined(pipeline(seed=seed).train(0, 4)) for seed in (5, 6))
    assert (five['example'] != six['example']).any()
    assert not (five['drawn'] == six['drawn']).any()


def test_an_example_is_augmented_anew_at_every_position():
    drawn = joined(pipeline().train(0, 50))['drawn']
    assert len({*drawn}) == len(drawn)


@pytest.mark.parametrize('whole', [1, 7, 64, 359, 360, 361, 1000])
@pytest.mark.parametrize('processes', [1, 3])
def test_evaluation_counts_every_example_once(whole, processes):
    found = []
    for process in range(processes):
        share = Share(process * whole, whole, whole * processes)
        batches = list(pipeline(share=share, num_eval=N_EVAL).evaluation())
        assert {len(batch['example']) for batch in batches} == {whole}
        found += [i for batch in batches for i in batch['example'] if i != PADDING]
    assert sorted(found) == list(range(N_EVAL))


def test_nothing_is_read_before_the_first_batch_is_asked_for():
    source = Numbers(N_TRAIN)
    batches = pipeline(source).train(0, 10)
    time.sleep(0.1)
    assert not source.has_been_read
    next(batches)
    assert source.has_been_read


def is_running(pid: int) -> bool:
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != 'Z'


@pytest.mark.slow
def test_decoding_processes_end_with_the_training_process():
    before = set(os.listdir('/dev/shm'))
    command = [sys.executable, '-m', 'tests.numbered_examples']
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
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
def test_a_killed_decoding_process_is_named():
    batches = pipeline(processes=2).train(0, 10**9)
    next(batches)
    before = time.monotonic()
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r'exit code -9.*memory.*config.data_processes'):
        list(itertools.islice(batches, 100_000))
    assert time.monotonic() - before < 10


@pytest.mark.slow
def test_an_error_comes_through_from_another_process():
    source = Numbers(N_TRAIN, broken=int(example_order(5, 0, N_TRAIN)[100]))
    batches = pipeline(source, processes=2).train(0, 100)
    next(batches)
    with pytest.raises(DataError, match=f'example {source.broken} cannot be used'):
        next(batches)
