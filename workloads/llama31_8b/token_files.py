# SPDX-License-Identifier: Apache-2.0
r"""Tokenised documents in Megatron's format: NAME.bin holds the tokens, NAME.idx where each begins.

The index is little-endian: nine bytes `MMIDIDX\0\0`, a version (1, u64), the code of the tokens'
dtype (u8), the number of sequences n (u64) and of document boundaries m (u64), then the sequences'
lengths in tokens (i32 [n]), their first bytes in the .bin (i64 [n]), and the documents' boundaries
as numbers of sequences (i64 [m]); nothing is aligned. Here every document is one sequence, as the
official preparation writes them.
"""

import array
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from settings.errors import DatasetError

MAGIC = b'MMIDIDX\x00\x00'
VERSION = 1
# By the code in the index; those of floating-point numbers hold no tokens.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Vocabularies below it are stored in 16 bits.
SMALLEST_WIDE_VOCABULARY = 65500
BLOCK = 1 << 24  # bytes that are copied at a time
_HEADER = struct.Struct('<9sQBQQ')


def _read_index(path: Path, bin_bytes: int) -> tuple[np.dtype, np.ndarray]:
    """The tokens' dtype and the documents' lengths; ValueError says what is wrong."""
    content = np.memmap(path, np.uint8, 'r')
    if content.size < _HEADER.size:
        raise ValueError('it is truncated')
    magic, version, code, sequences, boundaries = _HEADER.unpack(bytes(content[: _HEADER.size]))
    if magic != MAGIC:
        raise ValueError('it is no index of a Megatron data set')
    if version != VERSION:
        raise ValueError(f'it is of version {version}, not {VERSION}')
    if code not in DTYPES:
        raise ValueError(f'its code {code} is of no type of integers')
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if content.size != expected:
        raise ValueError(f'it has {content.size} bytes, and should have {expected}')
    lengths, first, documents = (
        np.frombuffer(content, dtype, count, offset)
        for dtype, count, offset in (
            ('<i4', sequences, _HEADER.size),
            ('<i8', sequences, _HEADER.size + 4 * sequences),
            ('<i8', boundaries, _HEADER.size + 12 * sequences),
        )
    )
    dtype = np.dtype(DTYPES[code])
    if sequences == 0 or lengths.min() < 0:
        raise ValueError('it has no documents' if sequences == 0 else 'a length is negative')
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if first[0] != 0 or not np.array_equal(first[1:], ends[:-1]):
        raise ValueError('documents do not follow one another')
    if not np.array_equal(documents, np.arange(sequences + 1)):
        raise ValueError('a document has several sequences, or none')
    if ends[-1] != bin_bytes:
        raise ValueError(
            f'it describes {ends[-1]} bytes of tokens, but {path.stem}.bin has {bin_bytes}'
        )
    return dtype, lengths


def _opened(prefix: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The documents' lengths and all tokens, mapped; DatasetError names the file that is wrong."""
    index, tokens = (Path(f'{prefix}.{suffix}') for suffix in ('idx', 'bin'))
    try:
        dtype, lengths = _read_index(index, tokens.stat().st_size)
        return lengths, np.memmap(tokens, dtype.newbyteorder('<'), 'r')
    except OSError as error:
        raise DatasetError(f'{error.filename} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise DatasetError(f'{index} cannot be used: {error}') from error


class TokenFile:
    """The documents of a pair of files; tokens are read when they are asked for.

    Args:
      prefix: the path of both files without .bin and .idx.

    Attributes:
      prefix: as given.
      lengths: of the documents, in tokens, int32 [documents].
      tokens: in all documents together.

    Raises:
      DatasetError: a file is missing, or they are no such pair.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.lengths, self._tokens = _opened(prefix)
        self._first = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        self.tokens = int(self._first[-1])

    def __reduce__(self):  # Each process maps the files itself.
        return TokenFile, (self.prefix,)

    def document(self, number: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, in the dtype of the file."""
        first, end = self._first[number], self._first[number + 1]
        return self._tokens[first + start : end if stop is None else min(first + stop, end)]


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes an .idx for documents of so many tokens of a dtype, int [documents]."""
    code = next(code for code, of_code in DTYPES.items() if dtype == of_code)
    with path.open('wb') as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        lengths.astype('<i4', copy=False).tofile(file)
        first = np.cumsum(lengths, dtype='<i8')
        first -= lengths
        first *= dtype.itemsize
        first.tofile(file)
        del first
        np.arange(len(lengths) + 1, dtype='<i8').tofile(file)


def write(prefix: str | Path, documents: Iterable[np.ndarray], vocabulary: int) -> None:
    """Writes documents of tokens in [0, vocabulary) as a pair of files.

    Both appear under their names only when they are complete, the .idx last.

    Raises:
      ValueError: a document is empty, or has a token outside of the vocabulary.
    """
    dtype = np.dtype('<u2' if vocabulary < SMALLEST_WIDE_VOCABULARY else '<i4')
    lengths = array.array('i')
    with _incomplete(prefix, 'bin').open('wb') as file:
        for number, document in enumerate(documents):
            if not document.size or document.min() < 0 or document.max() >= vocabulary:
                raise ValueError(
                    f'document {number} is empty, or has a token not in 0..{vocabulary - 1}'
                )
            lengths.append(document.size)
            file.write(document.astype(dtype).tobytes())
    _complete(prefix, dtype, np.array(lengths, np.int32))


def join(prefix: str | Path, parts: Sequence[Path]) -> None:
    """Writes the documents of other pairs of files, of one vocabulary, in their order, as one pair.

    As `write` it completes the files. Memory: 12 bytes a document.

    Raises:
      DatasetError: a part is missing or damaged, or has tokens of another dtype.
    """
    lengths, tokens = zip(*map(_opened, parts), strict=True)
    if len({x.dtype for x in tokens}) > 1:
        raise DatasetError(f'the parts of {prefix} have tokens of more than one dtype')
    with _incomplete(prefix, 'bin').open('wb') as file:
        for part in parts:
            with Path(f'{part}.bin').open('rb') as content:
                shutil.copyfileobj(content, file, BLOCK)
    _complete(prefix, tokens[0].dtype, np.concatenate(lengths))


def _incomplete(prefix: str | Path, suffix: str) -> Path:
    return Path(f'{prefix}.{suffix}.incomplete')


def _complete(prefix: str | Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Writes the index of documents with so many tokens, int32, and names both files."""
    write_index(_incomplete(prefix, 'idx'), lengths, dtype)
    for suffix in ('bin', 'idx'):
        path = _incomplete(prefix, suffix)
        with path.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(path, f'{prefix}.{suffix}')
