# SPDX-License-Identifier: Apache-2.0
"""Prepared data sets: where they are, and the encoded examples in them, by index.

`find_dataset` reads metadata alone. `Records` opens the shards at its first access, and returns the
bytes as they were stored. TFDS knows where the shards are; ArrayRecord reads them.
"""

import dataclasses
import os
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Imported here, not where they are used: if several threads import TFDS's lazy modules at the same
# time, they can wait for each other forever.
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from settings import loading
from settings.errors import DataError, DatasetError
from workloads.resnet.datasets import EVAL_SPLIT

SCRIPTS = Path(__file__).resolve().parents[2] / 'scripts'
THREADS = 16  # that open shards, which is mostly waiting for the disk
# What becomes in Python of the C++ exceptions that ArrayRecord throws on damaged files.
READER_ERRORS = (ValueError, RuntimeError, IndexError, OverflowError, MemoryError)
IDENTIFIERS = ('file_name', 'id')  # features that name a record; ImageNet has the first


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


class Record(NamedTuple):
    """One example as stored: its identifier (empty where it has none), label and encoded image."""

    name: bytes
    label: int
    image: bytes


def parse(serialized: bytes) -> Record:
    """Reads a serialized `tf.train.Example`, which is faster than TFDS's own decoding.

    ValueError if it is none, or has no image or no label.
    """
    try:
        features = tf_example_pb2.Example.FromString(serialized).features.feature
        label = features['label'].int64_list.value[0]
        image = features['image'].bytes_list.value[0]
        names = [features[key].bytes_list.value[0] for key in IDENTIFIERS if key in features]
    except Exception as error:  # protobuf's own class of errors is not public
        raise ValueError('it is no tf.train.Example with an image and a label') from error
    return Record(b''.join(names), label, image)


def check_label(label: int, num_classes: int) -> None:
    """Raises ValueError for the label of no class."""
    if not 0 <= label < num_classes:
        raise ValueError(f'its label {label} is not in 0..{num_classes - 1}')


def command(script: str, name: str, data_dir: str | Path, *options: str) -> str:
    """The command of a script for a data set, to be pasted into a shell in any folder."""
    root = os.path.abspath(os.path.expanduser(data_dir))
    return shlex.join([str(SCRIPTS / script), name, root, *options])


def newest_version(name: str, data_dir: str | Path) -> Path:
    """The folder …/NAME/VERSION or …/NAME/CONFIG/VERSION of a prepared data set.

    Folders whose name is no version, such as 1.0.0.bak, are ignored.

    Raises:
      DatasetError: there is none.
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
        prepare = command('download_dataset.sh', name, data_dir)
        raise DatasetError(f'the data set {name} is not in {root}; prepare it with: {prepare}')
    return max(found, key=lambda path: tuple(map(int, path.name.split('.'))))


class Metadata(NamedTuple):
    """What the files beside the shards say.

    `image_size` is (height, width) in pixels, None where images differ; `shards` has the (file,
    number of records) of each shard by split.
    """

    encoding: str
    label_names: list[str]
    image_size: tuple[int | None, int | None]
    shards: dict[str, list[tuple[Path, int]]]


def read_metadata(directory: Path) -> Metadata:
    """Reads `dataset_info.json`, `features.json` and the label names; ValueError if unusable."""
    try:
        info = tfds.builder_from_directory(directory).info
        image, label = info.features['image'], info.features['label']
        height, width, _ = image.shape
        shards = {
            split: [
                (Path(path), length)
                for path, length in zip(of_split.filepaths, of_split.shard_lengths, strict=True)
            ]
            for split, of_split in info.splits.items()
        }
        names = label.names if label.num_classes else []
        metadata = Metadata(image.encoding_format or 'png', names, (height, width), shards)
    except Exception as error:  # TFDS and protobuf raise anything, their own errors included
        reason = (str(error).splitlines() or [''])[0]
        raise ValueError(
            f'dataset_info.json or features.json is damaged: {type(error).__name__}: {reason}'
        ) from error
    if not names:
        raise ValueError('the metadata names no classes: label.labels.txt is missing or empty')
    if str(info.version) != directory.name:
        raise ValueError(f'dataset_info.json is damaged: it has version {info.version}')
    outside = [p for of_split in shards.values() for p, _ in of_split if p.parent != directory]
    if outside:
        raise ValueError(f'dataset_info.json is damaged: it has a shard {outside[0]}')
    return metadata


def open_shard(path: Path) -> ArrayRecordReader:
    """Opens a shard; ValueError says why it cannot be read."""
    if not path.is_file():
        raise ValueError(f'{path.name} is missing or not a regular file')
    try:
        path.open('rb').close()
        reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0,max_parallelism:0')
        is_readable = reader.ok()
    except OSError as error:
        raise ValueError(f'{path.name} cannot be read: {error.strerror}') from error
    except READER_ERRORS:
        is_readable = False
    if not is_readable:
        raise ValueError(f'{path.name} is truncated or no ArrayRecord file')
    return reader


def find_dataset(name: str, data_dir: str) -> Dataset:
    """Finds a prepared data set and checks that its files are there.

    Raises:
      DatasetError: it is missing or incomplete.
    """
    directory = newest_version(name, data_dir)
    prepare, verify = (
        command(f'{script}_dataset.sh', name, data_dir) for script in ('download', 'verify')
    )
    splits = ('train', EVAL_SPLIT[name])
    try:
        metadata = read_metadata(directory)
        counts = [sum(n for _, n in metadata.shards.get(split, [])) for split in splits]
        if not all(counts):
            raise ValueError(f'no examples in {splits[counts.index(0)]}')
    except ValueError as error:
        raise DatasetError(
            f'the metadata in {directory} cannot be used ({error}); prepare it with: {prepare}'
        ) from error
    expected = [path for split in splits for path, _ in metadata.shards[split]]
    missing = [path.name for path in expected if not path.is_file() or path.stat().st_size == 0]
    if missing:
        raise DatasetError(
            f'the data set in {directory} is incomplete: {len(missing)} of {len(expected)} shards '
            f'are missing or empty, the first is {missing[0]}; prepare it with: {prepare}'
        )
    try:
        manifest = loading.read_object(directory / 'manifest.json')
    except ValueError:  # It is written when the data is first verified.
        manifest = {}
    recorded = [manifest[s] if isinstance(manifest.get(s), dict) else {} for s in splits]
    for split, count, facts in zip(splits, counts, recorded, strict=True):
        stated = facts.get('examples', count)
        if stated != count:
            raise DatasetError(
                f'the metadata in {directory} has {count} examples for {split}, its manifest.json '
                f'{stated!r}; check it with: {verify}'
            )
    digests = [str(facts.get('digest')) for facts in recorded]
    is_known = all(re.fullmatch('[0-9a-f]{64}', digest) for digest in digests)
    height, width = metadata.image_size
    return Dataset(
        name=name,
        directory=str(directory),
        num_train=counts[0],
        num_eval=counts[1],
        num_classes=len(metadata.label_names),
        digest='-'.join(digest[:16] for digest in digests) if is_known else None,
        image_size=height if height == width else None,
    )


class Records:
    """Random access to the (encoded image, label) pairs of a split; opened at the first access."""

    def __init__(self, dataset: Dataset, split: str):
        self._dataset, self._split = dataset, split
        self._lock = threading.Lock()
        self._source: Any = None

    def __reduce__(self):  # Each process opens the shards itself.
        return Records, (self._dataset, self._split)

    def _read(self, index: int) -> Record:
        with self._lock:
            self._source = self._source or self._open()
        return parse(self._source[index])

    def _shards(self) -> list[tuple[Path, int]]:
        return read_metadata(Path(self._dataset.directory)).shards[self._split]

    def _open(self):
        """Checks each shard's number of records, and returns TFDS's source of serialized ones."""

        def check(shard: tuple[Path, int]) -> None:
            path, length = shard
            try:
                found = open_shard(path).num_records()
                if found != length:
                    raise ValueError(f'{path.name} has {found} records, the metadata says {length}')
            except READER_ERRORS as error:
                raise DataError(f'{path.parent}: {error}; {self.remedy}') from error

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(check, self._shards()))
        builder = tfds.builder_from_directory(self._dataset.directory)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(self._split, deserialize_method=raw)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Returns an example's encoded image and label.

        Raises:
          ValueError: it cannot be read, or its label is of no class.
          DataError: a shard is damaged or is not the metadata's; at the first access.
        """
        record = self._read(index)
        check_label(record.label, self._dataset.num_classes)
        return record.image, record.label

    @property
    def remedy(self) -> str:
        """What to do about records that cannot be used."""
        directory, name = Path(self._dataset.directory), self._dataset.name
        data_dir = next(p for p in directory.parents if p.name == name).parent
        verify = command('verify_dataset.sh', name, data_dir, '--full')
        return f'find all that is damaged with: {verify}'

    def name(self, index: int) -> str:
        """How to find the record: its number, shard and identifier."""
        shards, number = iter(self._shards()), index
        path, length = next(shards)
        while number >= length:
            number -= length
            path, length = next(shards)
        try:
            name = self._read(index).name.decode()
        except Exception:  # It may be just what cannot be read.
            name = ''
        return f'record {number} of {path}' + (f' ({name})' if name else '')
