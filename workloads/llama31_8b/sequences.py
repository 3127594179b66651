# SPDX-License-Identifier: Apache-2.0
"""Sequences of tokens as an `input_pipeline.Source`, and a run's pipeline of them."""

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from input_pipeline import Batch, Pipeline, Share
from settings.errors import DataError
from workloads.llama31_8b import samples
from workloads.llama31_8b.corpora import Corpus
from workloads.llama31_8b.samples import Samples
from workloads.llama31_8b.token_files import TokenFile


class Sequences:
    """The samples of a split, {'tokens': int32 [n, length + 1], 'is_real': bool [n]}.

    Args:
      load: the samples in the order in which they are used, which a run's seed has shaped already;
        called once in every process.
      count: how many they are.
      vocabulary: number of tokens that the network knows.
    """

    def __init__(self, load: Callable[[], Samples], count: int, vocabulary: int):
        self._load, self._count, self._vocabulary = load, count, vocabulary

    @functools.cached_property
    def _samples(self) -> Samples:
        return self._load()

    def __reduce__(self):  # Files are mapped, and so not copied, by every process.
        return Sequences, (self._load, self._count, self._vocabulary)

    def __len__(self) -> int:
        return self._count

    def train(self, positions: np.ndarray, seed: int) -> Batch:
        """The samples at some positions."""
        del seed
        return self._batch(positions, len(positions))

    def evaluation(self, indices: np.ndarray, size: int) -> Batch:
        """Samples, then some that are not real."""
        return self._batch(indices, size)

    def _batch(self, numbers: np.ndarray, size: int) -> Batch:
        tokens = np.zeros((size, self._samples.length + 1), np.int32)
        for row, number in enumerate(numbers):
            tokens[row] = self._samples[int(number)]
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise DataError(
                f'{self._samples.file.prefix}.bin has a token that is not in '
                f'0..{self._vocabulary - 1}: it was made for another tokenizer, or is damaged'
            )
        return {'tokens': tokens, 'is_real': np.arange(size) < len(numbers)}


def _make_order(folder: Path, lengths: np.ndarray, length: int, count: int, seed: int) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        temporary.chmod(0o755)  # Others may train on the same data.
        samples.training_order(lengths, length, count, seed).save(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # Another process was faster.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kept_order(prefix: Path, length: int, count: int, seed: int) -> Path:
    """The folder of `samples.training_order`, which one process makes if it is not there.

    It is in the folder "orders" beside the documents, and can be deleted at any time: another run
    with this seed makes it again.
    """
    lengths = TokenFile(prefix).lengths
    documents = hashlib.sha256(np.ascontiguousarray(lengths).data).hexdigest()
    what = json.dumps([documents, length, count, seed])
    folder = prefix.parent / 'orders' / hashlib.sha256(what.encode()).hexdigest()[:32]
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # Where there are no locks, each process makes it.
                lock = stack.enter_context((folder.parent / 'lock').open('w'))
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _make_order(folder, lengths, length, count, seed)
    except OSError as error:
        raise DataError(
            f'the order of the training sequences cannot be written to {folder.parent}: '
            f'{error.strerror}'
        ) from error
    return folder


def _training(prefix: Path, folder: Path, length: int) -> Samples:
    return Samples(TokenFile(prefix), samples.load_order(folder), length)


def _evaluation(prefix: Path, length: int, count: int) -> Samples:
    file = TokenFile(prefix)
    return Samples(file, samples.file_order(file.lengths, length, count), length)


def pipeline(
    corpus: Corpus,
    *,
    length: int,
    vocabulary: int,
    samples_to_train: int,
    seed: int | None,
    share: Share,
    processes: int,
) -> Pipeline:
    """The batches of a run.

    The order of its training sequences is computed here, once for a seed; no token is read.

    Args:
      corpus: the data set.
      length: of a sequence.
      vocabulary: number of tokens that the network knows.
      samples_to_train: as many as the longest allowed run takes.
      seed: the run's; None where nothing is trained.
      share: this process's part of a micro-batch.
      processes: see `Pipeline`.

    Raises:
      DataError: the order cannot be kept, or one that was kept is damaged.
    """
    load = functools.partial(_evaluation, corpus.validation, length, corpus.num_eval)
    train = evaluation = Sequences(load, corpus.num_eval, vocabulary)
    if seed is not None:
        folder = _kept_order(corpus.train, length, samples_to_train, seed)
        samples.load_order(folder)  # Fails here, and not in a worker.
        load = functools.partial(_training, corpus.train, folder, length)
        train = Sequences(load, samples_to_train, vocabulary)
    return Pipeline(train, evaluation, seed=seed, share=share, processes=processes)
