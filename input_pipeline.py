# SPDX-License-Identifier: Apache-2.0
"""From positions to batches: which examples a batch holds, made ahead of the training loop.

Training reads an endless sequence of positions. Which example stands at one, and what is random
about it, is drawn from (seed, position) alone. Micro-step i of a run is positions [i·D·G,
(i + 1)·D·G), and device d has the d-th G of them. So a batch is a pure function of the seed and its
number: there is no iterator state, and neither processes, threads nor restarts change what is in
it. Grain runs that function ahead of the training loop, in threads or in processes.

What an example is, and which comes when, a `Source` knows; `shuffled` has the usual order. None is
read before the first batch is asked for.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import numpy as np
from absl import flags

from settings.errors import DataError

Batch = dict[str, np.ndarray]

# Purposes of random streams; no (seed, purpose, counter) is used twice.
ORDER, AUGMENTATION = 0, 1
# Batches that are made at the same time, or wait to be used, in a process.
BATCHES_AHEAD = 2


def generator(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Philox with (seed, purpose) as its key: streams of different counters never meet."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


@functools.lru_cache(maxsize=3)
def example_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Epoch `epoch`'s permutation of the training set (epochs from 0 here), int [num_examples]."""
    return generator(seed, ORDER, epoch).permutation(num_examples)


def shuffled(positions: np.ndarray, num_examples: int, seed: int) -> np.ndarray:
    """The examples at some positions when every epoch has an order of its own, int [n].

    At position p stands example π(p mod N), π being the `example_order` of epoch p // N.

    Args:
      positions: int [n], consecutive.
      num_examples: N, of the training set.
      seed: the run's.
    """
    epochs, places = np.divmod(positions, num_examples)
    return np.concatenate([
        example_order(seed, int(epoch), num_examples)[places[epochs == epoch]]
        for epoch in range(epochs[0], epochs[-1] + 1)
    ])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch over all devices: examples [start, start + size)."""

    start: int
    size: int
    whole: int


class Source(Protocol):
    """The examples of a split, by index. It is copied into other processes by pickling it."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def train(self, positions: np.ndarray, seed: int) -> Batch:
        """The examples at some positions of the training.

        Args:
          positions: int [n], consecutive.
          seed: the run's; randomness comes from generator(seed, AUGMENTATION, position) alone.

        Returns:
          Arrays of n examples each.

        Raises:
          DataError: an example cannot be used.
        """
        ...

    def evaluation(self, indices: np.ndarray, size: int) -> Batch:
        """Examples to evaluate, int [n]; padded to `size` ≥ n with what counts for nothing."""
        ...


class Pipeline:
    """The batches of a run, for one process.

    Args:
      train: the examples to train on.
      evaluation: the examples to evaluate.
      seed: the run's; None where nothing is trained.
      share: this process's part of a micro-batch.
      processes: how many processes make batches; 0 for threads of this process.
    """

    def __init__(
        self,
        train: Source,
        evaluation: Source,
        *,
        seed: int | None,
        share: Share,
        processes: int,
    ):
        self._load_train = functools.partial(_load_train, source=train, seed=seed, share=share)
        self._load_evaluation = functools.partial(_load_evaluation, source=evaluation, share=share)
        self._evaluation_batches = -(-len(evaluation) // share.whole)
        self._processes = processes

    def train(self, first: int, stop: int) -> Iterator[Batch]:
        """This process's share of micro-steps [first, stop), in order."""
        return _ahead(self._load_train, first, stop, self._processes)

    def evaluation(self) -> Iterator[Batch]:
        """This process's share of all examples to evaluate, once and in order."""
        return _ahead(self._load_evaluation, 0, self._evaluation_batches, self._processes)


def _load_train(micro_step: int, *, source: Source, seed: int | None, share: Share) -> Batch:
    """This process's share of a micro-step: a pure function of (seed, micro_step)."""
    assert seed is not None
    positions = micro_step * share.whole + share.start + np.arange(share.size)
    return source.train(positions, seed)


def _load_evaluation(number: int, *, source: Source, share: Share) -> Batch:
    """This process's share of evaluation batch `number`; past the set's end it is padding."""
    first = number * share.whole + share.start
    indices = np.arange(first, max(min(first + share.size, len(source)), first))
    return source.evaluation(indices, share.size)


def _ahead(load: Callable[[int], Batch], first: int, stop: int, processes: int) -> Iterator[Batch]:
    """Yields load(first), …, load(stop - 1) in order, computed ahead in threads or processes."""
    batches = grain.MapDataset.range(first, stop).map(load)
    options = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    ahead = batches.to_iter_dataset(options)
    if not processes:
        return iter(ahead)
    if not flags.FLAGS.is_parsed():  # Grain's worker processes insist on absl's flags.
        flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(processes, per_worker_buffer_size=1)
    return _from_processes(iter(ahead.mp_prefetch(workers, _end_with_parent)))


def _end_with_parent(worker: int, workers: int) -> None:
    """Makes this worker process end when its parent has ended, even by SIGKILL, and not before."""
    del worker, workers
    os.setpgid(0, 0)  # Ctrl-C reaches a whole group, but a run needs batches until it has saved.

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name='watch the parent', daemon=True).start()


def _from_processes(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields what the worker processes make.

    Raises:
      DataError: a worker was killed, which Grain reports as a bare RuntimeError.
    """
    try:
        yield from batches
    except RuntimeError as error:
        raise DataError(
            f'a decoding process ended ({error}); if it was killed for want of memory, which '
            '/dev/shm is part of, use fewer: --config.data_processes'
        ) from error
