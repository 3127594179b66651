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

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags

from image_classification import PADDING_LABEL
from image_preprocessing import (
    decode,
    decode_and_center_crop,
    decode_and_random_crop,
    pad_and_random_crop,
    sample_crop,
)
from records import EVAL_SPLIT, DataError, Dataset, DatasetError, Records, find_dataset

__all__ = [
    'DataError',
    'Dataset',
    'DatasetError',
    'Pipeline',
    'Share',
    'decode_and_center_crop',
    'decode_and_random_crop',
    'example_order',
    'find_dataset',
    'sample_crop',
]

# The evaluation's central crop is this share of the resized image's shorter side (224 / 256).
CENTRAL_FRACTION = 0.875

# A decoding thread takes so many examples of a batch at a time.
EXAMPLES_AT_A_TIME = 16
# Batches that are decoded at the same time, or wait decoded, in a process.
BATCHES_AHEAD = 2

# Purposes of random numbers; no (seed, purpose, counter) is used twice.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch over all devices: examples [start, start + size)."""

    start: int
    size: int
    whole: int


class Images:
    """A split's examples as pixels and labels, decoded once if all of them fit into the memory."""

    def __init__(self, records: Records, count: int, config: Mapping[str, Any]):
        self._records, self._count = records, count
        self._size, self._augmentation = config['image_size'], config['augmentation']
        self._lock = threading.Lock()
        self._cache: tuple[np.ndarray, np.ndarray] | None = None
        self._keep = (
            self._augmentation != 'crop_resize'
            and count * self._size**2 * 3 <= config['cache_gib'] * 2**30
        )

    def __getstate__(self):
        return self.__dict__ | {'_lock': None, '_cache': None}

    def __setstate__(self, state):
        self.__dict__ = state | {'_lock': threading.Lock()}

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        encoded, label = self._records[index]
        image = decode(encoded)
        if image.shape[:2] != (self._size, self._size):
            raise ValueError(
                f'it is {image.shape[1]}×{image.shape[0]}, not image_size={self._size}'
            )
        return image, label

    def _decoded(self, index: int) -> tuple[np.ndarray, int]:
        if not self._keep:
            return self._decode(index)
        with self._lock:
            if self._cache is None:
                pairs = [self._guarded(self._decode, i) for i in range(self._count)]
                self._cache = (
                    np.stack([image for image, _ in pairs]),
                    np.array([label for _, label in pairs], np.int32),
                )
        images, labels = self._cache
        return images[index], labels[index]

    def _guarded(self, function, index: int, *args):
        try:
            return function(index, *args)
        except Exception as error:
            raise DataError(
                f'{self._records.name(index)} cannot be used: {error}; find all such records '
                'with: scripts/verify_dataset.sh --full'
            ) from error

    def train(self, index: int, rng: np.random.Generator, out: np.ndarray) -> int:
        """Writes example `index`, augmented by `rng`, into `out` (uint8 [H, W, 3]); its label."""
        return self._guarded(self._train, index, rng, out)

    def _train(self, index: int, rng: np.random.Generator, out: np.ndarray) -> int:
        if self._augmentation == 'crop_resize':
            encoded, label = self._records[index]
            decode_and_random_crop(encoded, rng, size=self._size, out=out)
            return label
        image, label = self._decoded(index)
        if self._augmentation == 'none':
            out[...] = image
        else:
            flip = self._augmentation == 'pad_crop_flip'
            pad_and_random_crop(image, rng, padding=self._size // 8, flip=flip, out=out)
        return label

    def evaluation(self, index: int, out: np.ndarray) -> int:
        """Writes example `index` as it is evaluated into `out`; its label."""
        return self._guarded(self._evaluation, index, out)

    def _evaluation(self, index: int, out: np.ndarray) -> int:
        if self._augmentation == 'crop_resize':
            encoded, label = self._records[index]
            resize_min = round(self._size / CENTRAL_FRACTION)
            decode_and_center_crop(encoded, size=self._size, resize_min=resize_min, out=out)
            return label
        out[...], label = self._decoded(index)
        return label


def _generator(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Philox with (seed, purpose) as its key: streams of different counters never meet."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


@functools.lru_cache(maxsize=3)
def example_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Epoch `epoch`'s permutation of the training set (epochs from 0 here), int [num_examples]."""
    return _generator(seed, _ORDER, epoch).permutation(num_examples)


@functools.cache
def _decoders(threads: int) -> ThreadPoolExecutor:
    """This process's decoding threads."""
    return ThreadPoolExecutor(threads, 'decode')


def _fill(fill_one: Callable[[int], None], count: int, threads: int) -> None:
    """Calls fill_one(0), …, fill_one(count - 1), in this process's decoding threads."""

    def fill_some(first: int) -> None:
        for i in range(first, min(first + EXAMPLES_AT_A_TIME, count)):
            fill_one(i)

    for _ in _decoders(threads).map(fill_some, range(0, count, EXAMPLES_AT_A_TIME)):
        pass


def _load_train(
    micro_step: int,
    *,
    images: Images,
    num_examples: int,
    size: int,
    seed: int,
    share: Share,
    threads: int,
) -> dict[str, np.ndarray]:
    """This process's share of a micro-step: a pure function of (seed, micro_step)."""
    image = np.empty((share.size, size, size, 3), np.uint8)
    label = np.empty((share.size,), np.int32)
    first = micro_step * share.whole + share.start

    def fill_one(i: int) -> None:
        position = first + i
        epoch, place = divmod(position, num_examples)
        index = int(example_order(seed, epoch, num_examples)[place])
        rng = _generator(seed, _AUGMENTATION, position)
        try:
            label[i] = images.train(index, rng, image[i])
        except DataError as error:
            raise DataError(f'at training position {position}: {error}') from error

    _fill(fill_one, share.size, threads)
    return {'image': image, 'label': label}


def _load_eval(
    number: int, *, images: Images, num_examples: int, size: int, share: Share, threads: int
) -> dict[str, np.ndarray]:
    """This process's share of evaluation batch `number`; past the set's end it is padding."""
    image = np.zeros((share.size, size, size, 3), np.uint8)
    label = np.full((share.size,), PADDING_LABEL, np.int32)
    first = number * share.whole + share.start

    def fill_one(i: int) -> None:
        label[i] = images.evaluation(first + i, image[i])

    _fill(fill_one, min(share.size, max(num_examples - first, 0)), threads)
    return {'image': image, 'label': label}


def _ahead(load, first: int, stop: int, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields load(first), …, load(stop - 1) in order, computed ahead in threads or processes."""
    batches = grain.MapDataset.range(first, stop).map(load)
    options = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    ahead = batches.to_iter_dataset(options)
    if config['data_processes']:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes insist on absl's flags.
            flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(
            grain.MultiprocessingOptions(config['data_processes'], per_worker_buffer_size=1)
        )
    return iter(ahead)


class Pipeline:
    """The batches of a run, for one process.

    Args:
      dataset: from `find_dataset`.
      config: resolved.
      seed: the run's.
      share: this process's part of a micro-batch.
    """

    def __init__(self, dataset: Dataset, config: Mapping[str, Any], seed: int, share: Share):
        self._config = dict(config)
        evaluation = EVAL_SPLIT[dataset.name]
        threads = config['data_threads'] or len(os.sched_getaffinity(0))
        shared = {'size': config['image_size'], 'share': share, 'threads': threads}
        self._load_train = functools.partial(
            _load_train,
            images=Images(Records(dataset, 'train'), dataset.num_train, config),
            num_examples=dataset.num_train,
            seed=seed,
            **shared,
        )
        self._load_eval = functools.partial(
            _load_eval,
            images=Images(Records(dataset, evaluation), dataset.num_eval, config),
            num_examples=dataset.num_eval,
            **shared,
        )
        self._eval_batches = -(-dataset.num_eval // share.whole)

    def train(self, first: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Micro-steps [first, stop): {'image': uint8 [n, H, W, 3], 'label': int32 [n]}."""
        return _ahead(self._load_train, first, stop, self._config)

    def evaluation(self) -> Iterator[dict[str, np.ndarray]]:
        """The whole evaluation set once, in order; labels of -1 mark padding at its end."""
        return _ahead(self._load_eval, 0, self._eval_batches, self._config)
