# SPDX-License-Identifier: Apache-2.0
"""Prepared data sets: where they are, and the encoded examples in them, by index.

`find_dataset` reads metadata alone. `Records` opens the shards at its first access, and hands over
the bytes as they were stored; TFDS knows where the shards are, ArrayRecord reads them.
"""

import dataclasses
import json
import os
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Here, and not where they are used: threads that read the first records at the same time would
# import them at the same time, and TFDS's lazy imports can then wait for each other for ever.
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

SCRIPTS = Path(__file__).resolve().parents[2] / 'scripts'
# Reading a shard's footer is waiting for the disk, in most of its time.
THREADS = 16
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


def _command(script: str, name: str, data_dir: str | Path, *options: str) -> str:
    """A command for a shell in any folder."""
    root = os.path.abspath(os.path.expanduser(data_dir))
    return shlex.join([str(SCRIPTS / script), name, root, *options])


def _advice(name: str, data_dir: str | Path) -> str:
    return f'prepare it with: {_command("download_dataset.sh", name, data_dir)}'


def newest_version(name: str, data_dir: str | Path) -> Path:
    """The folder …/NAME/VERSION or …/NAME/CONFIG/VERSION of a prepared data set.

    Folders whose name is no version, such as 1.0.0.bak, are passed over.

    Raises:
      DatasetError: when there is none.
    """
    try:
        root = Path(data_dir).expanduser() / name
        found = [
            path.parent
            for path in root.glob('**/dataset_info.json')
            if re.fullmatch(r'[0-9]+(\.[0-9]+)*', path.parent.name)
            and not any(part.startswith('incomplete') for part in path.relative_to(root).parts)
        ]
    except (RuntimeError, ValueError, OSError) as error:  # no such user, NUL, too long a name
        raise DatasetError(f'data_dir={str(data_dir)!r} is not usable: {error}') from error
    if not found:
        raise DatasetError(f'the data set {name} is not in {root}; {_advice(name, data_dir)}')
    return max(found, key=lambda path: tuple(map(int, path.name.split('.'))))


def find_dataset(name: str, data_dir: str) -> Dataset:
    """Finds a prepared data set and checks that its files are there.

    Raises:
      DatasetError: when it is missing or incomplete.
    """
    directory, advice = newest_version(name, data_dir), f'; {_advice(name, data_dir)}'
    try:
        builder = tfds.builder_from_directory(directory)
        train, evaluation = (builder.info.splits[s] for s in ('train', EVAL_SPLIT[name]))
        num_classes = builder.info.features['label'].num_classes
        height, width, _ = builder.info.features['image'].shape
        if not (num_classes and train.num_examples and evaluation.num_examples):
            raise ValueError('no examples or no classes')
        expected = [Path(p) for split in (train, evaluation) for p in split.filepaths]
    except Exception as error:
        raise DatasetError(
            f'the metadata in {directory} cannot be used ({error}){advice}'
        ) from error
    missing = [p.name for p in expected if not p.is_file() or p.stat().st_size == 0]
    if missing or not expected:
        raise DatasetError(
            f'the data set in {directory} is incomplete: {len(missing)} of {len(expected)} shards '
            f'are missing or empty, the first is {missing[0] if missing else "unknown"}{advice}'
        )
    recorded = _manifest(directory)
    for split in (train, evaluation):
        examples = recorded.get(split.name, {}).get('examples')
        if isinstance(examples, int) and examples != split.num_examples:
            raise DatasetError(
                f'the metadata in {directory} has {split.num_examples} examples for {split.name}, '
                f'its manifest.json {examples}; check it with: '
                f'{_command("verify_dataset.sh", name, data_dir)}'
            )
    return Dataset(
        name=name,
        directory=str(directory),
        num_train=train.num_examples,
        num_eval=evaluation.num_examples,
        num_classes=num_classes,
        digest=_digest(recorded, EVAL_SPLIT[name]),
        image_size=height if height == width else None,
    )


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """What was recorded of each split when the data was last verified; empty before."""
    try:
        recorded = json.loads((directory / 'manifest.json').read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(recorded, dict):
        return {}
    return {name: facts for name, facts in recorded.items() if isinstance(facts, dict)}


def _digest(recorded: dict[str, dict[str, Any]], eval_split: str) -> str | None:
    """The recorded digest of the content, where there is one."""
    digests = [str(recorded.get(split, {}).get('digest')) for split in ('train', eval_split)]
    if not all(re.fullmatch('[0-9a-f]{64}', digest) for digest in digests):
        return None
    return '-'.join(digest[:16] for digest in digests)


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
        with self._lock:
            self._source = self._source or self._open()
        return tf_example_pb2.Example.FromString(self._source[index]).features.feature

    def _open(self):
        """Checks each shard's number of records, and returns TFDS's source of serialized ones."""

        def count(path: str) -> int:
            try:
                return ArrayRecordReader(str(path), 'readahead_buffer_size:0').num_records()
            except Exception as error:  # array_record's own
                raise DataError(f'{path} cannot be read: {error}; {self.remedy}') from error

        builder = tfds.builder_from_directory(self._dataset.directory)
        split = builder.info.splits[self._split]
        with ThreadPoolExecutor(THREADS) as pool:
            counts = list(pool.map(count, split.filepaths))
        for path, length, found in zip(split.filepaths, split.shard_lengths, counts, strict=True):
            if found != length:
                raise DataError(
                    f'{path} has {found} records, the metadata says {length}; {self.remedy}'
                )
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(self._split, deserialize_method=raw)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Returns an example's encoded image and label.

        Raises:
          ValueError: it is not there, or the label is of no class.
          DataError: a shard is damaged or is not the metadata's; at the first access.
        """
        features = self._features(index)
        images, labels = features['image'].bytes_list.value, features['label'].int64_list.value
        if not (images and labels):
            raise ValueError('it has no image or no label')
        if not 0 <= labels[0] < self._dataset.num_classes:
            raise ValueError(f'its label {labels[0]} is not in 0..{self._dataset.num_classes - 1}')
        return images[0], labels[0]

    @property
    def remedy(self) -> str:
        """What to do about records that cannot be used."""
        directory, name = Path(self._dataset.directory), self._dataset.name
        data_dir = next(p for p in directory.parents if p.name == name).parent
        command = _command('verify_dataset.sh', name, data_dir, '--full')
        return f'find all that is damaged with: {command}'

    def name(self, index: int) -> str:
        """What a person needs to find the record: its number, shard and identifier."""
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
