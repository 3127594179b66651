# SPDX-License-Identifier: Apache-2.0
"""Batches of sequences: what is at a position does not depend on how it is reached."""

import functools
import pickle

import numpy as np
import pytest

from input_pipeline import Pipeline, Share
from settings.errors import DataError
from workloads.llama31_8b.samples import Samples, file_order, training_order
from workloads.llama31_8b.sequences import Sequences
from workloads.llama31_8b.token_files import TokenFile, write

LENGTH, VOCABULARY = 16, 300


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(6)
    documents = [rng.integers(0, VOCABULARY, rng.integers(1, 40)) for _ in range(60)]
    write(tmp_path / 'some', documents, VOCABULARY)
    return TokenFile(tmp_path / 'some')


@pytest.fixture
def sources(file):
    train = training_order(file.lengths, LENGTH, 300, seed=8)
    evaluation = file_order(file.lengths, LENGTH, 10)
    return tuple(
        Sequences(functools.partial(Samples, file, order, LENGTH), len(order), VOCABULARY)
        for order in (train, evaluation)
    )


def batches(sources, micro_steps, size, processes=0):
    pipeline = Pipeline(*sources, seed=8, share=Share(0, size, size), processes=processes)
    return [batch['tokens'] for batch in pipeline.train(*micro_steps)]


@pytest.mark.parametrize('processes', [0, 2])
def test_a_position_has_one_sequence(sources, processes):
    whole = np.concatenate(batches(sources, (0, 6), 4, processes))
    np.testing.assert_array_equal(whole, np.concatenate(batches(sources, (0, 12), 2)))
    np.testing.assert_array_equal(whole[8:], np.concatenate(batches(sources, (2, 6), 4)))
    assert whole.shape == (24, LENGTH + 1)


def test_shares_make_a_batch(sources):
    parts = [
        next(iter(Pipeline(*sources, seed=8, share=Share(i, 2, 4), processes=0).train(3, 4)))
        for i in (0, 2)
    ]
    joined = np.concatenate([part['tokens'] for part in parts])
    np.testing.assert_array_equal(joined, batches(sources, (3, 4), 4)[0])


def test_the_last_batch_of_an_evaluation_is_padded(sources):
    pipeline = Pipeline(*sources, seed=8, share=Share(0, 4, 4), processes=0)
    *_, last = pipeline.evaluation()
    np.testing.assert_array_equal(last['is_real'], [True, True, False, False])
    assert not last['tokens'][2:].any()


def test_sources_are_copied_into_other_processes(sources):
    again = pickle.loads(pickle.dumps(sources[0]))
    positions = np.arange(5)
    for name, array in sources[0].train(positions, 8).items():
        np.testing.assert_array_equal(again.train(positions, 8)[name], array)


def test_a_token_of_another_vocabulary_is_an_error(file):
    order = file_order(file.lengths, LENGTH, 10)
    source = Sequences(lambda: Samples(file, order, LENGTH), 10, 290)
    with pytest.raises(DataError, match=r'some.bin has a token that is not in 0..289'):
        source.train(np.arange(10), 8)
