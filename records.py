# SPDX-License-Identifier: Apache-2.0
"""Prepared data sets: where they are, and the encoded examples in them, by index.

`find_dataset` reads metadata alone. `Records` opens the shards at its first access, and hands over
the bytes as they were stored; TFDS knows where the shards are, ArrayRecord reads them.
"""

import dataclasses
import json
import shlex
import threading
from pathlib import Path
from typing import Any

EVAL_SPLIT = {'digits': 'test', 'cifar10': 'test', 'imagenet2012': 'validation'}


class DatasetError(RuntimeError):
    """A data set that is missing or incomplete; the text says what to do."""


class DataError(RuntimeError):
    """A record that cannot be used; the text names it."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set, by its metadata alone.

    `digest` is of its content, where known; `image_size` of all its images, if they are square and
    of one size.
    """

    name: str
    directory: str
    num_train: int
    num_eval: int
    num_classes: int
    digest: str | None
    image_size: int | None = None


def _advice(name: str, data_dir: str | Path) -> str:
    return f'prepare it with: scripts/download_dataset.sh {name} {shlex.quote(str(data_dir))}'


def newest_version(name: str, data_dir: str | Path) -> Path:
    """The folder …/NAME/VERSION or …/NAME/CONFIG/VERSION of a prepared data set.

    Raises:
      DatasetError: when there is none.
    """
    root = Path(data_dir).expanduser() / name
    found = [
        path.parent
        for path in root.glob('**/dataset_info.json')
        if not any(part.startswith('incomplete') for part in path.relative_to(root).parts)
    ]
    if not found:
        raise DatasetError(f'the data set {name} is not in {root}; {_advice(name, data_dir)}')
    return max(found, key=lambda path: tuple(map(int, path.name.split('.'))))


def find_dataset(name: str, data_dir: str) -> Dataset:
    """Finds a prepared data set and checks that its files are there.

    Raises:
      DatasetError: when it is missing or incomplete.
    """
    import tensorflow_datasets as tfds

    directory, advice = newest_version(name, data_dir), f'; {_advice(name, data_dir)}'
    try:
        builder = tfds.builder_from_directory(directory)
        train, evaluation = (builder.info.splits[s] for s in ('train', EVAL_SPLIT[name]))
        num_classes = builder.info.features['label'].num_classes
        height, width, _ = builder.info.features['image'].shape
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
    return Dataset(
        name=name,
        directory=str(directory),
        num_train=train.num_examples,
        num_eval=evaluation.num_examples,
        num_classes=num_classes,
        digest=_digest(directory, EVAL_SPLIT[name]),
        image_size=height if height == width else None,
    )


def _digest(directory: Path, eval_split: str) -> str | None:
    """The digest that was recorded beside the data when it was last verified; None before."""
    try:
        recorded = json.loads((directory / 'manifest.json').read_text())
        return '-'.join(recorded[split]['digest'][:16] for split in ('train', eval_split))
    except (OSError, ValueError, KeyError):
        return None


class Records:
    """Random access to the (encoded image, label) pairs of a split; opened at the first access.

    Only the two features that training needs are taken from a record, from the protobuf itself:
    decoding all of them with TFDS would cost more than the crop and the resizing.
    """

    def __init__(self, dataset: Dataset, split: str):
        self._dataset, self._split = dataset, split
        self._lock = threading.Lock()
        self._source: Any = None

    def __getstate__(self):
        return {'dataset': self._dataset, 'split': self._split}

    def __setstate__(self, state):
        self._dataset, self._split = state['dataset'], state['split']
        self._lock, self._source = threading.Lock(), None

    def _features(self, index: int):
        """The record's features, a mapping to `tf.train.Feature`."""
        from tensorflow_datasets.proto import tf_example_pb2

        with self._lock:
            self._source = self._source or self._open()
        return tf_example_pb2.Example.FromString(self._source[index]).features.feature

    def _open(self):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._dataset.directory)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(self._split, deserialize_method=raw)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        features = self._features(index)
        return features['image'].bytes_list.value[0], features['label'].int64_list.value[0]

    @property
    def place(self) -> str:
        """NAME ROOT, as the scripts that prepare and verify data take them."""
        root = next(
            p for p in Path(self._dataset.directory).parents if p.name == self._dataset.name
        )
        return f'{self._dataset.name} {root.parent}'

    def name(self, index: int) -> str:
        """What a person needs to find the record: its number, shard and identifier."""
        import tensorflow_datasets as tfds

        split = tfds.builder_from_directory(self._dataset.directory).info.splits[self._split]
        number, shard = index, 0
        while number >= split.shard_lengths[shard]:
            number -= split.shard_lengths[shard]
            shard += 1
        try:
            features = self._features(index)
            names = [features[k].bytes_list.value[0] for k in ('file_name', 'id') if k in features]
            identifier = f' ({names[0].decode()})' if names else ''
        except Exception:  # it may be just what cannot be read
            identifier = ''
        return f'record {number} of {split.filepaths[shard]}{identifier}'
