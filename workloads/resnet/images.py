# SPDX-License-Identifier: Apache-2.0
"""The examples of an image data set as batches: records in, uint8 pixels and labels out."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from input_pipeline import AUGMENTATION, Batch, Pipeline, Share, generator, shuffled
from settings.errors import ConfigError, DataError
from workloads.resnet.datasets import EVAL_SPLIT
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.records import Dataset, Records
from workloads.resnet.small_images import SmallImages

PADDING_LABEL = -1  # Label of the examples that fill up an evaluation's last batch.

Example = tuple[np.ndarray, int]  # uint8 [H, W, 3] and label


class Reader(Protocol):
    """How one example is read. Its errors say what is wrong with it, not which it is."""

    def train(self, index: int, rng: np.random.Generator) -> Example:
        """The example, augmented with numbers from `rng`."""
        ...

    def evaluation(self, index: int) -> Example:
        """The example as it is evaluated."""
        ...


class Images:
    """A split's images, an `input_pipeline.Source`.

    Its batches are {'image': uint8 [n, size, size, 3], 'label': int32 [n]}.

    Args:
      records: of the split.
      count: how many there are.
      image_size: height and width, pixels.
      augmentation: crop_resize, pad_crop_flip, pad_crop or none.
      cache_gib: decoded images of one size are kept in memory if all of them take no more.
      threads: that decode photographs; Grain's own read small images.
    """

    def __init__(
        self,
        records: Records,
        count: int,
        *,
        image_size: int,
        augmentation: str,
        cache_gib: float,
        threads: int,
    ):
        self._records, self._count, self._size = records, count, image_size
        self._reader: Reader
        if augmentation == 'crop_resize':
            # Imported here: it loads Numba, 0.45 s of CPU time that small images do not need.
            from workloads.resnet.photographs import Photographs

            self._reader, self._threads = Photographs(records, image_size), threads
        else:
            keep = count * 3 * image_size**2 <= cache_gib * 2**30
            # Most of the time of a small image is Python's, which threads would only wait for.
            self._reader, self._threads = SmallImages(records, image_size, augmentation, keep), 0

    def __len__(self) -> int:
        return self._count

    def train(self, positions: np.ndarray, seed: int) -> Batch:
        """The examples at `positions`, int [n], augmented."""
        indices = shuffled(positions, len(self), seed)

        def read(i: int) -> Example:
            with self._naming(indices[i], f'at training position {positions[i]}'):
                rng = generator(seed, AUGMENTATION, positions[i])
                return self._reader.train(int(indices[i]), rng)

        return self._batch(read, len(indices), len(indices))

    def evaluation(self, indices: np.ndarray, size: int) -> Batch:
        """Examples `indices`, int [n ≤ size], then black images with the label PADDING_LABEL."""

        def read(i: int) -> Example:
            with self._naming(indices[i], 'in evaluation'):
                return self._reader.evaluation(int(indices[i]))

        return self._batch(read, len(indices), size)

    def _batch(self, read: Callable[[int], Example], count: int, size: int) -> Batch:
        """A batch of read(0), …, read(count - 1), padded to `size`."""
        images = np.zeros((size, self._size, self._size, 3), np.uint8)
        labels = np.full(size, PADDING_LABEL, np.int32)

        def fill(first: int, step: int) -> None:
            for i in range(first, count, step):
                images[i], labels[i] = read(i)

        if self._threads:  # Each takes every n-th example: a task for each would cost 4 % more.
            tasks = functools.partial(fill, step=self._threads)
            list(_decoders(self._threads).map(tasks, range(self._threads)))
        else:
            fill(0, 1)
        return {'image': images, 'label': labels}

    @contextlib.contextmanager
    def _naming(self, index: int, where: str) -> Iterator[None]:
        """Errors in the body become a DataError that names the record."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f'{where}: {self._records.name(int(index))} cannot be used: {error}; '
                f'{self._records.remedy}'
            ) from error


@functools.cache
def _decoders(threads: int) -> ThreadPoolExecutor:
    """This process's decoding threads."""
    return ThreadPoolExecutor(threads, 'decode')


def check(config: ResNetConfig, dataset: Dataset) -> None:
    """Checks that a configuration can use a data set, from its metadata alone.

    Raises:
      ConfigError: when the images would have to be resized and are not.
    """
    if config.augmentation != 'crop_resize' and dataset.image_size != config.image_size:
        raise ConfigError(
            f'image_size={config.image_size}: the images of {dataset.name} are of '
            f'{dataset.image_size or "several sizes"}, and augmentation={config.augmentation} '
            'does not resize'
        )


def pipeline(dataset: Dataset, config: ResNetConfig, seed: int | None, share: Share) -> Pipeline:
    """The batches of a run, for one process.

    Raises:
      ConfigError: from `check`.
    """
    check(config, dataset)

    def images(split: str, count: int) -> Images:
        return Images(
            Records(dataset, split),
            count,
            image_size=config.image_size,
            augmentation=config.augmentation,
            cache_gib=config.cache_gib,
            threads=config.data_threads or len(os.sched_getaffinity(0)),
        )

    return Pipeline(
        images('train', dataset.num_train),
        images(EVAL_SPLIT[dataset.name], dataset.num_eval),
        seed=seed,
        share=share,
        processes=config.data_processes,
    )
