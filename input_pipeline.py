# SPDX-License-Identifier: Apache-2.0
"""From records to uint8 batches, by position.

Training reads an endless sequence of positions. Position p is example π_e(p mod N) of the training
set, π_e a permutation drawn from (seed, epoch e = p // N), augmented by a generator drawn from
(seed, p). Micro-step i of a run is positions [i·D·M, (i + 1)·D·M), and device d has the d-th M of
them. So a batch is a pure function of the seed and its number: there is no iterator state, and
neither processes, threads nor restarts change what is in it. Grain runs that function ahead of
the training loop, in threads or in processes.

No byte of a data set is read before the first batch is asked for.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags

from settings.hyperparameters import ConfigError
from workloads.resnet import random_streams
from workloads.resnet.image_cache import ImageCache
from workloads.resnet.image_decoding import decode
from workloads.resnet.image_preprocessing import (
    decode_and_center_crop,
    decode_and_random_crop,
    pad_and_random_crop,
)
from workloads.resnet.random_streams import AUGMENTATION
from workloads.resnet.records import (
    EVAL_SPLIT,
    DataError,
    Dataset,
    DatasetError,
    Records,
    find_dataset,
)
from workloads.resnet.task import PADDING_LABEL

__all__ = [
    'DataError',
    'Dataset',
    'DatasetError',
    'Pipeline',
    'Share',
    'check',
    'find_dataset',
]

# The evaluation's central crop is this share of the resized image's shorter side (224 / 256).
CENTRAL_FRACTION = 0.875

# A decoding thread takes so many examples of a batch at a time.
EXAMPLES_AT_A_TIME = 16
# Batches that are decoded at the same time, or wait decoded, in a process.
BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch over all devices: examples [start, start + size)."""

    start: int
    size: int
    whole: int


class Images:
    """A split's examples as pixels and labels; decoded once if all of them fit into the memory."""

    def __init__(self, records: Records, count: int, config: Mapping[str, Any], threads: int):
        self._records, self._threads = records, threads
        self._size, self._augmentation = config['image_size'], config['augmentation']
        if self._augmentation == 'crop_resize':
            from workloads.resnet import resampling  # noqa: F401  # Compiled, or loaded, before the clock starts.
        self._padding = self._size // 8 if self._augmentation.startswith('pad_crop') else 0
        self._flip = self._augmentation == 'pad_crop_flip'
        room = (count, self._size, self._padding)
        fits = self._augmentation != 'crop_resize' and ImageCache.gib(*room) <= config['cache_gib']
        self._cache = ImageCache(*room) if fits else None

    def train(self, indices: np.ndarray, positions: np.ndarray, seed: int):
        """Examples `indices`, augmented as those at `positions`, both int [n].

        Returns:
          (uint8 [n, H, W, 3], int32 [n]): images and labels.
        """

        def where(i: int) -> str:
            return f'at training position {positions[i]}: '

        def write(i: int, out: np.ndarray) -> int:
            rng = random_streams.generator(seed, AUGMENTATION, positions[i])
            return self._train(int(indices[i]), rng, out)

        if self._cache is None:
            return self._one_by_one(indices, write, where)
        self._decode_missing(self._cache, indices, where)
        drawn = random_streams.first_three(seed, AUGMENTATION, positions)
        y, x = (drawn[:, :2] * (2 * self._padding + 1)).astype(np.int64).T
        return self._cache.cut(indices, y, x, (drawn[:, 2] < 0.5) & self._flip)

    def evaluation(self, indices: np.ndarray):
        """Examples `indices`, int [n], as they are evaluated; returns as `train`."""

        def where(i: int) -> str:
            return 'in evaluation: '

        def write(i: int, out: np.ndarray) -> int:
            return self._evaluation(int(indices[i]), out)

        if self._cache is None:
            return self._one_by_one(indices, write, where)
        self._decode_missing(self._cache, indices, where)
        middle = np.full(len(indices), self._padding)
        return self._cache.cut(indices, middle, middle, np.zeros(len(indices), bool))

    def _one_by_one(self, indices: np.ndarray, write: Callable, where: Callable):
        images = _recycled((len(indices), self._size, self._size, 3))
        labels = np.empty(len(indices), np.int32)

        def fill_one(i: int) -> None:
            with self._blaming(indices[i], where(i)):
                labels[i] = write(i, images[i])

        _fill(fill_one, range(len(indices)), self._threads)
        return images, labels

    def _decode_missing(self, cache: ImageCache, indices: np.ndarray, where: Callable) -> None:
        def fill_one(i: int) -> None:
            index = int(indices[i])
            with self._blaming(index, where(i)):
                cache.put(index, *self._decode(index))

        _fill(fill_one, np.flatnonzero(~cache.has(indices)).tolist(), self._threads)

    @contextlib.contextmanager
    def _blaming(self, index: int, where: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f'{where}{self._records.name(int(index))} cannot be used: {error}; '
                f'{self._records.remedy}'
            ) from error

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        encoded, label = self._records[index]
        image = decode(encoded)
        if image.shape[:2] != (self._size, self._size):
            raise ValueError(
                f'it is {image.shape[1]}×{image.shape[0]}, not image_size={self._size}'
            )
        return image, label

    def _train(self, index: int, rng: np.random.Generator, out: np.ndarray) -> int:
        if self._augmentation == 'crop_resize':
            encoded, label = self._records[index]
            decode_and_random_crop(encoded, rng, size=self._size, out=out)
            return label
        image, label = self._decode(index)
        pad_and_random_crop(image, rng, padding=self._padding, flip=self._flip, out=out)
        return label

    def _evaluation(self, index: int, out: np.ndarray) -> int:
        if self._augmentation == 'crop_resize':
            encoded, label = self._records[index]
            resize_min = round(self._size / CENTRAL_FRACTION)
            decode_and_center_crop(encoded, size=self._size, resize_min=resize_min, out=out)
            return label
        out[...], label = self._decode(index)
        return label


_free_memory: dict[int, list[bytearray]] = {}


def _recycled(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array in the memory of one that nothing refers to any more, if there is one.

    Fresh memory costs a batch of photographs some of its time, in page faults. All views of an
    array keep alive the one at their bottom, `flat`, and with it the memory.
    """
    size = math.prod(shape)
    free = _free_memory.setdefault(size, [])
    try:
        memory = free.pop()
    except IndexError:
        memory = bytearray(size)
    flat = np.frombuffer(memoryview(memory), np.uint8)
    weakref.finalize(flat, free.append, memory)
    return flat.reshape(shape)


@functools.cache
def _decoders(threads: int) -> ThreadPoolExecutor:
    """This process's decoding threads."""
    return ThreadPoolExecutor(threads, 'decode')


def _fill(fill_one: Callable[[int], None], which: Sequence[int], threads: int) -> None:
    """Calls fill_one for each number in `which`, in this process's decoding threads."""

    def fill_some(first: int) -> None:
        for i in which[first : first + EXAMPLES_AT_A_TIME]:
            fill_one(i)

    for _ in _decoders(threads).map(fill_some, range(0, len(which), EXAMPLES_AT_A_TIME)):
        pass


def _load_train(
    micro_step: int, *, images: Images, num_examples: int, seed: int, share: Share
) -> dict[str, np.ndarray]:
    """This process's share of a micro-step: a pure function of (seed, micro_step)."""
    positions = micro_step * share.whole + share.start + np.arange(share.size)
    epochs, places = np.divmod(positions, num_examples)
    indices = np.concatenate([
        random_streams.example_order(seed, int(epoch), num_examples)[places[epochs == epoch]]
        for epoch in range(epochs[0], epochs[-1] + 1)
    ])  # fmt: skip
    image, label = images.train(indices, positions, seed)
    return {'image': image, 'label': label}


def _load_eval(
    number: int, *, images: Images, num_examples: int, share: Share
) -> dict[str, np.ndarray]:
    """This process's share of evaluation batch `number`; past the set's end it is padding."""
    first = number * share.whole + share.start
    indices = np.arange(first, max(min(first + share.size, num_examples), first))
    image, label = images.evaluation(indices)
    absent = share.size - len(indices)
    return {
        'image': np.pad(image, ((0, absent), (0, 0), (0, 0), (0, 0))),
        'label': np.pad(label, (0, absent), constant_values=PADDING_LABEL),
    }


def _ahead(load, first: int, stop: int, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields load(first), …, load(stop - 1) in order, computed ahead in threads or processes."""
    batches = grain.MapDataset.range(first, stop).map(load)
    options = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    ahead = batches.to_iter_dataset(options)
    if not config['data_processes']:
        return iter(ahead)
    if not flags.FLAGS.is_parsed():  # Grain's worker processes insist on absl's flags.
        flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(config['data_processes'], per_worker_buffer_size=1)
    return _from_processes(iter(ahead.mp_prefetch(processes, _end_with_parent)))


def _end_with_parent(worker: int, workers: int) -> None:
    """Makes this worker process end when its parent has ended, even by SIGKILL."""
    del worker, workers

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name='watch the parent', daemon=True).start()


def _from_processes(batches: Iterator[Any]) -> Iterator[Any]:
    """Yields what the worker processes make.

    Raises:
      DataError: a worker was killed, which Grain reports as a bare RuntimeError.
    """
    try:
        yield from batches
    except DataError:
        raise
    except RuntimeError as error:
        raise DataError(
            f'a decoding process ended ({error}); if it was killed for want of memory, which '
            '/dev/shm is part of, use fewer: --config.data_processes'
        ) from error


def check(config: Mapping[str, Any], dataset: Dataset) -> None:
    """Checks that a configuration can use a data set, from its metadata alone.

    Raises:
      ConfigError: when the images would have to be resized and are not.
    """
    if config['augmentation'] != 'crop_resize' and dataset.image_size != config['image_size']:
        raise ConfigError(
            f'image_size={config["image_size"]}: the images of {dataset.name} are of '
            f'{dataset.image_size or "several sizes"}, and augmentation='
            f'{config["augmentation"]} does not resize'
        )


class Pipeline:
    """The batches of a run, for one process.

    Args:
      dataset: from `find_dataset`.
      config: resolved.
      seed: the run's.
      share: this process's part of a micro-batch.

    Raises:
      ConfigError: from `check`.
    """

    def __init__(self, dataset: Dataset, config: Mapping[str, Any], seed: int, share: Share):
        check(config, dataset)
        self._config = dict(config)
        evaluation = EVAL_SPLIT[dataset.name]
        threads = config['data_threads'] or len(os.sched_getaffinity(0))
        self._load_train = functools.partial(
            _load_train,
            images=Images(Records(dataset, 'train'), dataset.num_train, config, threads),
            num_examples=dataset.num_train,
            seed=seed,
            share=share,
        )
        self._load_eval = functools.partial(
            _load_eval,
            images=Images(Records(dataset, evaluation), dataset.num_eval, config, threads),
            num_examples=dataset.num_eval,
            share=share,
        )
        self._eval_batches = -(-dataset.num_eval // share.whole)

    def train(self, first: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Micro-steps [first, stop): {'image': uint8 [n, H, W, 3], 'label': int32 [n]}."""
        return _ahead(self._load_train, first, stop, self._config)

    def evaluation(self) -> Iterator[dict[str, np.ndarray]]:
        """The whole evaluation set once, in order; labels of -1 mark padding at its end."""
        return _ahead(self._load_eval, 0, self._eval_batches, self._config)
