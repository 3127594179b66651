# SPDX-License-Identifier: Apache-2.0
"""Files of tokens in Megatron's format."""

import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from settings.errors import DatasetError
from workloads.llama31_8b import token_files
from workloads.llama31_8b.token_files import TokenFile

GOLDEN = Path(__file__).parents[2] / 'golden' / 'llama31_8b' / 'data'
NAMES = sorted(path.stem for path in GOLDEN.glob('*.idx'))
DOCUMENTS = [np.arange(5), np.array([7]), np.arange(3) + 100]


@pytest.mark.parametrize('name', NAMES)
def test_official_files_are_read_and_written_as_they_are(name, tmp_path):
    file = TokenFile(GOLDEN / name)
    documents = [file.document(i) for i in range(len(file.lengths))]
    assert sum(d.size for d in documents) == file.tokens
    narrow = name == 'tiny_u16'
    token_files.write(tmp_path / name, iter(documents), vocabulary=512 if narrow else 128_256)
    for suffix in ('.bin', '.idx'):
        written = (tmp_path / f'{name}{suffix}').read_bytes()
        assert written == (GOLDEN / f'{name}{suffix}').read_bytes()


@pytest.fixture
def pair(tmp_path):
    prefix = tmp_path / 'some'
    token_files.write(prefix, DOCUMENTS, vocabulary=256)
    return prefix


def test_documents_and_their_parts_are_read(pair):
    for file in (TokenFile(pair), pickle.loads(pickle.dumps(TokenFile(pair)))):
        np.testing.assert_array_equal(file.lengths, [5, 1, 3])
        for number, tokens in enumerate(DOCUMENTS):
            np.testing.assert_array_equal(file.document(number), tokens)
        np.testing.assert_array_equal(file.document(2, 1), [101, 102])
        np.testing.assert_array_equal(file.document(0, 1, 3), [1, 2])
        np.testing.assert_array_equal(file.document(0, 3, 30), [3, 4])


@pytest.mark.parametrize('document', [[], [256], [-1]])
def test_a_document_that_is_not_of_the_vocabulary_is_not_written(tmp_path, document):
    with pytest.raises(ValueError, match='document 1 is empty, or has a token not in 0..255'):
        token_files.write(tmp_path / 'some', [np.arange(3), np.array(document, int)], 256)
    assert not list(tmp_path.glob('some.bin'))
    assert not list(tmp_path.glob('some.idx'))


def change(offset, form, value):
    def apply(prefix):
        path = Path(f'{prefix}.idx')
        content = bytearray(path.read_bytes())
        struct.pack_into('<' + form, content, offset, value)
        path.write_bytes(content)

    return apply


def shorten(suffix):
    def apply(prefix):
        path = Path(f'{prefix}.{suffix}')
        path.write_bytes(path.read_bytes()[:-1])

    return apply


LENGTHS, FIRST, BOUNDARIES = 34, 34 + 12, 34 + 36


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (change(0, 'B', 0), 'no index of a Megatron data set'),
        (change(9, 'Q', 2), 'of version 2, not 1'),
        (change(17, 'B', 7), 'code 7 is of no type of integers'),
        (change(17, 'B', 4), 'documents do not follow one another'),
        (change(18, 'Q', 4), 'bytes, and should have'),
        (change(18, 'Q', 2**62), 'bytes, and should have'),
        (change(LENGTHS, 'i', -5), 'a length is negative'),
        (change(LENGTHS, 'i', 4), 'documents do not follow one another'),
        (change(FIRST + 8, 'q', 12), 'documents do not follow one another'),
        (change(BOUNDARIES + 8, 'q', 2), 'a document has several sequences, or none'),
        (shorten('idx'), 'bytes, and should have'),
        (shorten('bin'), 'describes 18 bytes of tokens, but some.bin has 17'),
        (lambda prefix: Path(f'{prefix}.idx').write_bytes(b'MMIDIDX'), 'is truncated'),
        (lambda prefix: Path(f'{prefix}.bin').unlink(), 'some.bin cannot be read: No such file'),
        (lambda prefix: Path(f'{prefix}.idx').unlink(), 'some.idx cannot be read: No such file'),
    ],
)
def test_what_is_damaged_is_named(pair, damage, said):
    damage(pair)
    with pytest.raises(DatasetError, match=said):
        TokenFile(pair)


def test_an_index_of_other_tokens_is_an_error(pair):
    token_files.write(f'{pair}2', DOCUMENTS[:2], vocabulary=256)
    shutil.copy(f'{pair}2.idx', f'{pair}.idx')
    with pytest.raises(DatasetError, match=r'some.idx cannot be used: .* 12 bytes'):
        TokenFile(pair)
