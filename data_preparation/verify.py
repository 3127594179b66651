# SPDX-License-Identifier: Apache-2.0
"""Checks a prepared dataset record by record against its metadata and its manifest.

Every shard is there and opens, every record can be read (ArrayRecord keeps a checksum of each),
labels are in range, no identifier occurs twice, image headers (or with `full` the whole images)
decode to the size that the metadata states, and counts, class counts and content digest are those
of the manifest: the published one, and the one that was written beside the data when it was
prepared. All errors are named at once.
"""

import concurrent.futures
import dataclasses
import threading
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from data_preparation import dataset, files, manifest
from data_preparation.archives import progress
from data_preparation.images import check_header
from data_preparation.manifest import Manifest, Record, Split, Summary
from workloads.resnet.image_decoding import decode
from workloads.resnet.records import EVAL_SPLIT, newest_version

NAMED_ERRORS = 20
MAX_LABELS_BYTES = 1 << 20
# What becomes in Python of the C++ exceptions that ArrayRecord throws on damaged files.
READER_ERRORS = (ValueError, RuntimeError, IndexError, OverflowError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `dataset_info.json`, `features.json` and the label names say.

    `image_size` is height and width in pixels, None where images differ; `shards` are the split,
    file and number of records of each shard.
    """

    encoding: str
    label_names: list[str]
    image_size: tuple[int | None, int | None]
    shards: list[tuple[str, Path, int]]


@dataclasses.dataclass
class Shard:
    """What was found in one shard."""

    split: str
    path: Path
    errors: list[str] = dataclasses.field(default_factory=list)
    summary: Summary = dataclasses.field(default_factory=Summary)
    names: list[bytes] = dataclasses.field(default_factory=list)


def verify(
    name: str, data_dir: Path, *, full: bool, manifest_file: Path | None, workers: int
) -> str:
    """Checks `data_dir/name` and returns a line that says so.

    Raises:
        DatasetError: there is no such dataset.
        FileNotFoundError: there is no such manifest.
        ValueError: the dataset has errors, or the manifest is damaged; the text names them.
        OSError: the manifest cannot be written beside the data.
    """
    data_dir = data_dir.expanduser().absolute()
    directory = newest_version(name, data_dir)
    remedy = dataset.prepare_again(name, data_dir, directory)
    if manifest_file:
        manifest.read(manifest_file)
    try:
        metadata = read_metadata(directory)
    except (FileNotFoundError, ValueError) as error:
        raise _failure(directory, [str(error)], remedy) from error
    shards = _read_all(metadata, full, workers)
    errors = [error for shard in shards for error in shard.errors]
    errors += _stray_files(directory, shards)
    errors += _duplicates(shards)
    found: dict[str, dict[str, Summary]] = {split: {} for split in ('train', EVAL_SPLIT[name])}
    for shard in shards:
        found.setdefault(shard.split, {})[shard.path.name] = shard.summary
    errors += [f'{split} has no shards in the metadata' for split in found if not found[split]]

    written = directory / manifest.FILE_NAME
    known = manifest_file or manifest.published(name, directory.name, metadata.encoding)
    expected: dict[Path, Manifest] = {}
    for path in (known, written):
        if not path.exists():
            continue
        try:
            expected[path] = manifest.read(path)
            errors += _differences(path, expected[path], found, metadata.label_names)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise _failure(directory, errors, remedy)
    verdict = f'as in {" and ".join(map(str, expected))}'
    digested = any(s.digest for known in expected.values() for s in known.splits.values())
    if not digested or written not in expected:  # Runs record the digest that is beside the data.
        manifest.write(directory, found, metadata.label_names)
    if not digested:
        verdict = f'no digest is published for this data, so theirs are now in {written}'
    counts = ', '.join(
        f'{sum(s.examples for s in of_split.values()):,} {split}'
        for split, of_split in found.items()
    )
    read = 'every image decoded' if full else 'the headers of the images read'
    return f'verified: {directory}: {counts} examples, {read}, {verdict}'


def _failure(directory: Path, errors: list[str], remedy: str) -> ValueError:
    more = [f'… and {len(errors) - NAMED_ERRORS} more'] if len(errors) > NAMED_ERRORS else []
    lines = '\n  '.join(errors[:NAMED_ERRORS] + more)
    count = '1 error' if len(errors) == 1 else f'{len(errors)} errors'
    return ValueError(
        f'{directory} has {count}:\n  {lines}\n'
        'Do not train on it. To prepare it again (with the options that you used, if any):\n'
        f'  {remedy}'
    )


def read_metadata(directory: Path) -> Metadata:
    """Reads the files beside the shards of a dataset.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is damaged; the text names it, where that is known.
    """
    for name in ('dataset_info.json', 'features.json'):
        files.read_json(directory / name)
    for path in directory.glob('*.labels.txt'):
        files.read(path, MAX_LABELS_BYTES)
    try:
        info = tfds.builder_from_directory(directory).info
        image, label = info.features['image'], info.features['label']
        height, width, _ = image.shape
        shards = [
            (split, Path(path), length)
            for split, of_split in info.splits.items()
            for path, length in zip(of_split.filepaths, of_split.shard_lengths, strict=True)
        ]
        labels = label.names if label.num_classes else []
        metadata = Metadata(image.encoding_format or 'png', labels, (height, width), shards)
    except Exception as error:  # TFDS and protobuf raise anything, their own errors included
        reason = (str(error).splitlines() or [''])[0]
        raise ValueError(
            f'dataset_info.json or features.json is damaged: {type(error).__name__}: {reason}'
        ) from error
    if not labels:
        raise ValueError('the metadata names no classes: label.labels.txt is missing or empty')
    if str(info.version) != directory.name:
        raise ValueError(f'dataset_info.json is damaged: it has version {info.version}')
    outside = [path for _, path, _ in shards if path.parent != directory]
    if outside:
        raise ValueError(f'dataset_info.json is damaged: it has a shard {outside[0]}')
    return metadata


def _read_all(metadata: Metadata, full: bool, workers: int) -> list[Shard]:
    """Reads every shard, several at a time; returns what was found."""
    shards = [Shard(split, path) for split, path, _ in metadata.shards]
    lengths = [length for *_, length in metadata.shards]
    stop = threading.Event()
    with (
        progress('verifying', sum(lengths), ' records') as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        reads = [
            pool.submit(_read_shard, shard, length, metadata, full, stop, bar)
            for shard, length in zip(shards, lengths, strict=True)
        ]
        try:
            for read in reads:
                read.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return shards


def _read_shard(
    shard: Shard, length: int, metadata: Metadata, full: bool, stop: threading.Event, bar: tqdm
) -> None:
    """Reads the records of a shard into `shard`, until `stop` is set."""
    if not shard.path.is_file():
        shard.errors.append(f'{shard.path.name} is missing or not a regular file')
        return
    try:
        shard.path.open('rb').close()
    except OSError as error:
        shard.errors.append(f'{shard.path.name} cannot be read: {error.strerror}')
        return
    try:
        reader = ArrayRecordReader(str(shard.path), 'readahead_buffer_size:0,max_parallelism:0')
        is_readable = reader.ok()
    except READER_ERRORS:
        is_readable = False
    if not is_readable:
        shard.errors.append(f'{shard.path.name} is truncated or no ArrayRecord file')
        return
    if reader.num_records() != length:
        shard.errors.append(
            f'{shard.path.name} has {reader.num_records()} records, the metadata says {length}'
        )
    for i in range(min(reader.num_records(), length)):
        if stop.is_set():
            return
        where = f'record {i} of {shard.path.name}'
        try:
            record = Record.parse(reader.read([i])[0])
            where += f' ({record.name.decode()})' * bool(record.name)
            _check_record(record, metadata, full)
        except READER_ERRORS as error:
            shard.errors.append(f'{where}: {error}')
        else:
            shard.summary.add(record)
            shard.names.append(record.name or record.digest.to_bytes(32, 'big'))
        bar.update()


def _check_record(record: Record, metadata: Metadata, full: bool) -> None:
    """Checks a record's label and image; ValueError says what is wrong."""
    num_classes = len(metadata.label_names)
    if not 0 <= record.label < num_classes:
        raise ValueError(f'label {record.label} is not in 0..{num_classes - 1}')
    size = decode(record.image).shape[:2] if full else check_header(record.image)
    for actual, stated in zip(size, metadata.image_size, strict=True):
        if stated not in (None, actual):
            raise ValueError(
                f'the image is {size[1]}×{size[0]} pixels, features.json says '
                f'{metadata.image_size[1]}×{metadata.image_size[0]}'
            )


def _stray_files(directory: Path, shards: list[Shard]) -> list[str]:
    expected = {shard.path.name for shard in shards}
    return [
        f'{path.name} is a shard that the metadata does not have'
        for path in sorted(directory.glob('*.array_record*'))
        if path.name not in expected
    ]


def _duplicates(shards: list[Shard]) -> list[str]:
    """Names the identifiers, or where there are none the contents, that a split has twice."""
    errors = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        counts = Counter(name for shard in members for name in shard.names)
        places: dict[bytes, dict[str, None]] = {n: {} for n, count in counts.items() if count > 1}
        for shard in members:
            for name in shard.names:
                if name in places:
                    places[name][shard.path.name] = None
        for name, paths in places.items():
            text = name.decode() if len(name) < 32 else name.hex()[:16]
            errors.append(f'{split} has {text} {counts[name]} times, in {", ".join(paths)}')
    return errors


def _differences(
    path: Path, expected: Manifest, found: dict[str, dict[str, Summary]], label_names: list[str]
) -> list[str]:
    """Compares with the manifest in `path`; one may leave out what is not published."""
    errors = []
    if expected.label_names != label_names:
        errors.append(f'the class names are not those of {path}: a label file of another dataset?')
    for split in sorted(expected.splits.keys() | found.keys()):
        if split not in found or split not in expected.splits:
            where = 'missing' if split in expected.splits else 'unknown'
            errors.append(f'split {split} is {where}, compared with {path}')
        else:
            errors += _differences_of_split(path, split, expected.splits[split], found[split])
    return errors


def _differences_of_split(
    path: Path, split: str, expected: Split, found: dict[str, Summary]
) -> list[str]:
    actual = sum(found.values(), Summary())
    digest = actual.to_json()['digest']
    errors = []
    if actual.examples != expected.examples:
        errors.append(
            f'{split} has {actual.examples:,} examples, {path} says {expected.examples:,}'
        )
    for label, count in enumerate(expected.class_counts or []):
        if actual.class_counts[label] != count:
            errors.append(
                f'{split} has {actual.class_counts[label]:,} examples of class {label}, {path} '
                f'says {count:,}'
            )
            break  # One is enough to see that classes differ.
    if expected.digest and digest != expected.digest:
        errors.append(f'{split} has the content digest {digest}, {path} says {expected.digest}')
    if not errors:
        return []
    return errors + [
        f'{name} does not have the content it was written with'
        for name, summary in found.items()
        if name in expected.shards and expected.shards[name] != summary.to_json()['digest']
    ]
