# SPDX-License-Identifier: Apache-2.0
"""From records to uint8 batches, by position.

Training reads an endless sequence of positions. Position p is example π_e(p mod N) of the training
set, π_e a permutation drawn from (seed, epoch e = p // N), augmented by a generator drawn from
(seed, p). Micro-step i of a run is positions [i·D·M, (i + 1)·D·M), and device d has the d-th M of
them. So a batch is a pure function of the seed and its number: there is no iterator state, and
neither processes, threads nor restarts change what is in it. Grain runs that function ahead of
the training loop, in threads or in processes.

No byte of a data set is read before the first batch is asked for; `find_dataset` reads metadata.
"""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from image_classification import PADDING_LABEL
from image_preprocessing import (
    decode,
    decode_and_center_crop,
    decode_and_random_crop,
    pad_and_random_crop,
    sample_crop,
)

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

EVAL_SPLIT = {'digits': 'test', 'cifar10': 'test', 'imagenet2012': 'validation'}
# The evaluation's central crop is this share of the resized image's shorter side (224 / 256).
CENTRAL_FRACTION = 0.875

# Purposes of random numbers; no (seed, purpose, counter) is used twice.
_ORDER, _AUGMENTATION = 0, 1


class DatasetError(RuntimeError):
    """A data set that is missing or incomplete; the text says what to do."""


class DataError(RuntimeError):
    """A record that cannot be used; the text names it."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set, by its metadata alone; `digest` is of its content, where known."""

    name: str
    directory: str
    num_train: int
    num_eval: int
    num_classes: int
    digest: str | None


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch over all devices: examples [start, start + size)."""

    start: int
    size: int
    whole: int


def find_dataset(name: str, data_dir: str) -> Dataset:
    """Finds a prepared data set and checks that its files are there.

    Raises:
      DatasetError: when it is missing or incomplete.
    """
    import tensorflow_datasets as tfds

    advice = f'; prepare it with: scripts/download_dataset.sh {name} {data_dir}'
    root = Path(data_dir).expanduser() / name
    versions = sorted(root.glob('**/dataset_info.json'))
    versions = [path for path in versions if 'incomplete' not in str(path)]
    if not versions:
        raise DatasetError(f'the data set {name} is not in {root}{advice}')
    directory = versions[-1].parent
    try:
        builder = tfds.builder_from_directory(directory)
        train, evaluation = (builder.info.splits[s] for s in ('train', EVAL_SPLIT[name]))
        num_classes = builder.info.features['label'].num_classes
    except Exception as error:
        raise DatasetError(
            f'the metadata in {directory} cannot be used ({error}){advice}'
        ) from error
    expected = [Path(p) for split in (train, evaluation) for p in split.filepaths]
    missing = [p.name for p in expected if not p.is_file() or p.stat().st_size == 0]
    if missing or not expected:
        raise DatasetError(
            f'the data set in {directory} is incomplete: {len(missing)} of {len(expected)} shards '
            f'are missing or empty, the first is {missing[0] if missing else "unknown"}{advice}'
        )
    counts = (train.num_examples, evaluation.num_examples, num_classes)
    return Dataset(name, str(directory), *counts, _digest(directory, EVAL_SPLIT[name]))


def _digest(directory: Path, eval_split: str) -> str | None:
    """The digest that was recorded beside the data when it was last verified; None before."""
    try:
        recorded = json.loads((directory / 'manifest.json').read_text())
        return '-'.join(recorded[split]['digest'][:16] for split in ('train', eval_split))
    except (OSError, ValueError, KeyError):
        return None


class Records:
    """Random access to the (encoded image, label) pairs of a split; opened at the first access."""

    def __init__(self, dataset: Dataset, split: str):
        self._dataset, self._split = dataset, split
        self._lock = threading.Lock()
        self._source = None

    def __getstate__(self):
        return {'dataset': self._dataset, 'split': self._split}

    def __setstate__(self, state):
        self.__init__(**state)

    def _open(self):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._dataset.directory)
        return builder.as_data_source(self._split, decoders={'image': tfds.decode.SkipDecoding()})

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with self._lock:
            self._source = self._source or self._open()
        record = self._source[index]
        return record['image'], int(record['label'])

    def name(self, index: int) -> str:
        return f'record {index} of split {self._split} in {self._dataset.directory}'


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
                images, labels = zip(*pairs, strict=True)
                self._cache = np.stack(images), np.array(labels, np.int32)
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


def _load_train(
    micro_step: int, *, images: Images, num_examples: int, size: int, seed: int, share: Share
) -> dict[str, np.ndarray]:
    """This process's share of a micro-step: a pure function of (seed, micro_step)."""
    batch = {
        'image': np.empty((share.size, size, size, 3), np.uint8),
        'label': np.empty((share.size,), np.int32),
    }
    first = micro_step * share.whole + share.start
    for i in range(share.size):
        position = first + i
        epoch, place = divmod(position, num_examples)
        index = int(example_order(seed, epoch, num_examples)[place])
        rng = _generator(seed, _AUGMENTATION, position)
        batch['label'][i] = images.train(index, rng, batch['image'][i])
    return batch


def _load_eval(
    number: int, *, images: Images, num_examples: int, size: int, share: Share
) -> dict[str, np.ndarray]:
    """This process's share of evaluation batch `number`; past the set's end it is padding."""
    batch = {
        'image': np.zeros((share.size, size, size, 3), np.uint8),
        'label': np.full((share.size,), PADDING_LABEL, np.int32),
    }
    first = number * share.whole + share.start
    for i in range(min(share.size, max(num_examples - first, 0))):
        batch['label'][i] = images.evaluation(first + i, batch['image'][i])
    return batch


def _ahead(load, first: int, stop: int, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields load(first), …, load(stop - 1) in order, computed ahead in threads or processes."""
    threads = config['data_threads'] or len(os.sched_getaffinity(0))
    batches = grain.MapDataset.range(first, stop).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ahead = batches.to_iter_dataset(options)
    if config['data_processes']:
        ahead = ahead.mp_prefetch(
            grain.MultiprocessingOptions(config['data_processes'], per_worker_buffer_size=2)
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
        shared = {'size': config['image_size'], 'share': share}
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
