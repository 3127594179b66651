# SPDX-License-Identifier: Apache-2.0
"""Samples of equal length from documents of any length, in the order of the official reference.

The documents of as many epochs as are needed are shuffled and joined to one stream of tokens.
Sample j is the stream's tokens j·S to (j + 1)·S, the last of which is the first of the next
sample: it is only predicted here, and only read there. Samples are shuffled once more. It is
Megatron-LM's GPTDataset (branch core_r0.11.0, megatron/core/datasets/gpt_dataset.py), array by
array, for the same seed.
"""

import dataclasses
from pathlib import Path

import numpy as np

from settings.errors import DataError, DatasetError
from workloads.llama31_8b.token_files import TokenFile

# The last epoch is shuffled by itself when less than this part of it is used.
PART_THAT_IS_SHUFFLED_WITH_THE_REST = 0.80
# Documents whose lengths are added up at a time, so that no array of 64-bit sums is as long as
# that of all documents of all epochs.
DOCUMENTS_AT_A_TIME = 2**22


@dataclasses.dataclass(frozen=True)
class Order:
    """Where samples are.

    Attributes:
      documents: numbers of the documents that the stream is made of, int32.
      starts: for every sample and for the end of the last one, a place in `documents` and the
        token of that document, int64 [samples + 1, 2].
      shuffled: the sample at every position, uint32 [samples].
    """

    documents: np.ndarray
    starts: np.ndarray
    shuffled: np.ndarray

    def __len__(self) -> int:
        return len(self.shuffled)

    def save(self, folder: Path) -> None:
        """Writes one .npy file for each array."""
        for field in dataclasses.fields(self):
            np.save(folder / f'{field.name}.npy', getattr(self, field.name))


def load_order(folder: Path) -> Order:
    """The inverse of `Order.save`; arrays are read when they are used.

    Raises:
      DataError: a file is missing or truncated, or is no array.
    """
    names = (field.name for field in dataclasses.fields(Order))
    try:
        return Order(*(np.load(folder / f'{name}.npy', mmap_mode='r') for name in names))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f'the order of the training sequences in {folder} cannot be read ({error}); delete the '
            'folder, and the same command makes it again'
        ) from error


def _starts(lengths: np.ndarray, documents: np.ndarray, length: int, samples: int) -> np.ndarray:
    """`Order.starts` for samples of `length` tokens."""
    starts = np.empty((samples + 1, 2), np.int64)
    tokens = done = 0
    for first in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        part = lengths[documents[first : first + DOCUMENTS_AT_A_TIME]]
        begins = tokens + np.concatenate(([0], np.cumsum(part, dtype=np.int64)))
        tokens = int(begins[-1])
        wanted = np.arange(done, min(-(-tokens // length), samples + 1)) * length
        places = np.searchsorted(begins[:-1], wanted, side='right') - 1
        starts[done : done + len(wanted), 0] = first + places
        starts[done : done + len(wanted), 1] = wanted - begins[places]
        done += len(wanted)
    return starts


def training_order(lengths: np.ndarray, length: int, samples: int, seed: int) -> Order:
    """The order of at least so many samples to train on.

    Args:
      lengths: of the documents, in tokens, int [documents].
      length: of a sample, S: it reads S tokens and predicts S.
      samples: that a run of the greatest length would use. It decides how many epochs of documents
        are shuffled together, and with it the order of all samples.
      seed: below 2^63; those of Megatron-LM are below 2^32.
    """
    per_epoch = int(lengths.sum(dtype=np.int64))
    epochs = -(-(samples * length + 1) // per_epoch)
    total = (epochs * per_epoch - 1) // length
    before_last = ((epochs - 1) * per_epoch - 1) // length
    whole_epoch = (per_epoch - 1) // length
    apart = epochs > 1 and samples - before_last < int(
        PART_THAT_IS_SHUFFLED_WITH_THE_REST * whole_epoch
    )
    state = np.random.RandomState(seed if seed < 2**32 else [seed % 2**32, seed >> 32])

    def shuffled(array: np.ndarray, border: int) -> np.ndarray:
        """In place: what is before a border, then what is behind it."""
        state.shuffle(array[:border])
        state.shuffle(array[border:])
        return array

    numbers = np.arange(len(lengths), dtype=np.int32)
    documents = shuffled(np.tile(numbers, epochs), (epochs - 1) * len(lengths) if apart else 0)
    order = shuffled(np.arange(total, dtype=np.uint32), before_last if apart else 0)
    return Order(documents, _starts(lengths, documents, length, total), order)


def file_order(lengths: np.ndarray, length: int, samples: int) -> Order:
    """The first samples of the documents as they stand, unshuffled: what is evaluated.

    Raises:
      DatasetError: there are not so many.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    if (tokens - 1) // length < samples:
        raise DatasetError(
            f'the evaluation takes {samples} sequences of {length} tokens, and one token more, '
            f'from a file that has {tokens} tokens in all'
        )
    documents = np.arange(len(lengths), dtype=np.int32)
    starts = _starts(lengths, documents, length, samples)
    return Order(documents, starts, np.arange(samples, dtype=np.uint32))


class Samples:
    """The samples of a file in an order.

    Args:
      file: has the documents.
      order: of the samples.
      length: of a sample, S.

    Attributes: `file` and `length`, as given.
    """

    def __init__(self, file: TokenFile, order: Order, length: int):
        self.file, self.length = file, length
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> np.ndarray:
        """The S + 1 tokens of the sample at a position, int32."""
        place, start = map(int, self._order.starts[self._order.shuffled[position]])
        sample = np.empty(self.length + 1, np.int32)
        filled = 0
        while filled < sample.size:
            number = self._order.documents[place]
            piece = self.file.document(number, start, start + sample.size - filled)
            sample[filled : filled + piece.size] = piece
            filled += piece.size
            place, start = place + 1, 0
        return sample
