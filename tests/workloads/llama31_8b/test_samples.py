# SPDX-License-Identifier: Apache-2.0
"""Samples and their order are those of Megatron-LM."""

import json
from pathlib import Path

import numpy as np
import pytest

from settings.errors import DatasetError
from workloads.llama31_8b import samples
from workloads.llama31_8b.token_files import TokenFile, write

GOLDEN = Path(__file__).parents[2] / 'golden' / 'llama31_8b' / 'data'
CASES = json.loads((GOLDEN / 'manifest.json').read_text())['cases']
TRAINING = (
    'train_1epoch', 'train_multi_sep', 'train_multi_nosep', 'train_seq32_seed7', 'train_eod_docs',
    'train_uint16', 'valid_shuffled_1epoch', 'valid_shuffled_multi',
)  # fmt: skip


def load(name):
    """A case, its file of tokens and the official arrays."""
    case = CASES[name]
    return case, TokenFile(GOLDEN / case['paths'][-1]), np.load(GOLDEN / f'{name}.npz')


def assert_samples(file, order, length, golden):
    found = samples.Samples(file, order, length)
    for number, tokens, labels in zip(
        golden['sample_ids'], golden['tokens'], golden['labels'], strict=True
    ):
        np.testing.assert_array_equal(found[number][:-1], tokens)
        np.testing.assert_array_equal(found[number][1:], labels)


@pytest.mark.parametrize('at_a_time', [7, samples.DOCUMENTS_AT_A_TIME])
@pytest.mark.parametrize('name', TRAINING)
def test_order_and_samples_are_the_official_ones(name, at_a_time, monkeypatch):
    monkeypatch.setattr(samples, 'DOCUMENTS_AT_A_TIME', at_a_time)
    case, file, golden = load(name)
    order = samples.training_order(file.lengths, case['seqlen'], case['num_samples'], case['seed'])
    np.testing.assert_array_equal(order.documents, golden['document_index'])
    np.testing.assert_array_equal(order.starts, golden['sample_index'])
    np.testing.assert_array_equal(order.shuffled, golden['shuffle_index'])
    assert_samples(file, order, case['seqlen'], golden)


def test_what_is_evaluated_is_in_the_order_of_the_file():
    case, file, golden = load('valid_unshuffled_first')
    assert case['result']['num_epochs'] == 1
    order = samples.file_order(file.lengths, case['seqlen'], len(golden['sample_index']) - 1)
    np.testing.assert_array_equal(order.starts, golden['sample_index'])
    assert_samples(file, order, case['seqlen'], golden)


def test_a_file_that_is_too_small_to_evaluate_is_an_error():
    lengths = np.array([3, 5, 2])
    assert len(samples.file_order(lengths, 3, 3)) == 3
    with pytest.raises(DatasetError, match=r'3 sequences of 4 tokens, and one .* 10 tokens'):
        samples.file_order(lengths, 4, 3)


def test_the_token_after_the_last_sample_is_counted():
    """Ten samples of 4 tokens read 41: an epoch of 40 is not enough for them, nor for a file."""
    lengths = np.full(8, 5)
    assert len(samples.training_order(lengths, 4, 9, seed=1).documents) == 8
    assert len(samples.training_order(lengths, 4, 10, seed=1).documents) == 16
    assert len(samples.file_order(lengths, 4, 9)) == 9
    with pytest.raises(DatasetError, match='has 40 tokens'):
        samples.file_order(lengths, 4, 10)


def test_an_order_is_kept(tmp_path):
    order = samples.training_order(np.array([3, 5, 2, 7]), 4, 20, seed=1)
    order.save(tmp_path)
    again = samples.load_order(tmp_path)
    for name in ('documents', 'starts', 'shuffled'):
        np.testing.assert_array_equal(getattr(again, name), getattr(order, name))


def test_every_seed_has_an_order_of_its_own():
    lengths = np.full(100, 10)
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63 - 1)
    orders = {samples.training_order(lengths, 5, 50, s).shuffled.tobytes() for s in seeds}
    assert len(orders) == len(seeds)


def test_every_token_of_an_epoch_is_read_once(tmp_path):
    """All samples of one epoch together, in their stream's order, are the shuffled documents."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 70_000, rng.integers(1, 30)) for _ in range(50)]
    write(tmp_path / 'some', documents, vocabulary=70_000)
    file = TokenFile(tmp_path / 'some')
    order = samples.training_order(file.lengths, 8, samples=10, seed=4)
    found = samples.Samples(file, order, 8)
    stream = np.concatenate([documents[i] for i in order.documents])
    positions = np.argsort(order.shuffled)
    joined = np.concatenate([found[int(p)][:-1] for p in positions])
    np.testing.assert_array_equal(joined, stream[: joined.size])
    assert sorted(order.documents) == list(range(50))
    assert stream.size - joined.size <= 8
