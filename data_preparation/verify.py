# SPDX-License-Identifier: Apache-2.0
"""Checks a prepared dataset record by record against its metadata and its manifest.

Every shard is there and opens, every record can be read (ArrayRecord keeps a checksum of each),
labels are in range, no identifier occurs twice, image headers (or with `full` the whole images)
decode to the size that the metadata states, and counts, class counts and content digest are those
of the manifest: the published one, and the one that was written beside the data when it was
prepared. All errors are named at once.
"""

import dataclasses
import itertools
import threading
from collections import Counter
from pathlib import Path

import simplejpeg
from tqdm import tqdm

from data_preparation import dataset, files, manifest
from data_preparation.manifest import Manifest, Summary
from data_preparation.progress import in_threads, progress
from workloads.resnet import records
from workloads.resnet.datasets import EVAL_SPLIT
from workloads.resnet.image_decoding import decode, find_frame
from workloads.resnet.records import Metadata, Record

NAMED_ERRORS = 20
MAX_LABELS_BYTES = 1 << 20


@dataclasses.dataclass
class Shard:
    """A shard as the metadata have it, and what was found in it; `names` counts identifiers."""

    split: str
    path: Path
    length: int
    errors: list[str] = dataclasses.field(default_factory=list)
    summary: Summary = dataclasses.field(default_factory=lambda: Summary.of_records([]))
    names: Counter[bytes] = dataclasses.field(default_factory=Counter)


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
    directory = records.newest_version(name, data_dir)
    remedy = dataset.prepare_again(name, data_dir, directory)
    if manifest_file:
        manifest.read(manifest_file)
    try:
        metadata = read_metadata(directory)
    except (FileNotFoundError, ValueError) as error:
        raise _failure(directory, [str(error)], remedy) from error
    shards = [
        Shard(split, path, length)
        for split, of_split in metadata.shards.items()
        for path, length in of_split
    ]
    with progress('verifying', sum(shard.length for shard in shards), ' records') as bar:
        in_threads(_read_shard, [(shard, metadata, full, bar) for shard in shards], workers)
    errors = [error for shard in shards for error in shard.errors]
    errors += _stray_files(directory, shards) + _duplicates(shards)
    splits = {}
    for split in dict.fromkeys(['train', EVAL_SPLIT[name], *metadata.shards]):
        if not metadata.shards.get(split):
            errors.append(f'{split} has no shards in the metadata')
        of_split = {shard.path.name: shard.summary for shard in shards if shard.split == split}
        splits[split] = Summary.of_shards(of_split)
    found = Manifest(metadata.label_names, splits)

    written = directory / manifest.FILE_NAME
    published = f'{name}-{directory.name}-{metadata.encoding}.json'
    known = manifest_file or manifest.PUBLISHED / published
    expected: dict[Path, Manifest] = {}
    for path in filter(Path.exists, (known, written)):
        try:
            expected[path] = manifest.read(path)
            errors += _differences(path, expected[path], found)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise _failure(directory, errors, remedy)
    verdict = f'as in {" and ".join(map(str, expected))}'
    digested = any(s.digest for known in expected.values() for s in known.splits.values())
    if not digested or written not in expected:  # Runs record the digest that is beside the data.
        manifest.write(directory, found)
    if not digested:
        verdict = f'no digest is published for this data, so theirs are now in {written}'
    counts = ', '.join(f'{summary.examples:,} {split}' for split, summary in splits.items())
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
    """Reads the files beside the shards of a dataset, which may be anything.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is damaged; the text names it, where that is known.
    """
    for name in ('dataset_info.json', 'features.json'):
        files.read_json(directory / name)
    for path in directory.glob('*.labels.txt'):
        files.check_regular(path, MAX_LABELS_BYTES)
    return records.read_metadata(directory)


def _read_shard(
    shard: Shard, metadata: Metadata, full: bool, bar: tqdm, stop: threading.Event
) -> None:
    """Reads the records of a shard into `shard`, until `stop` is set."""
    name = shard.path.name
    try:
        reader = records.open_shard(shard.path)
    except ValueError as error:
        shard.errors.append(str(error))
        return
    count = reader.num_records()
    if count != shard.length:
        shard.errors.append(f'{name} has {count} records, the metadata says {shard.length}')
    facts = []
    for i in range(min(count, shard.length)):
        if stop.is_set():
            return
        where = f'record {i} of {name}'
        try:
            record = records.parse(reader.read([i])[0])
            if record.name:
                where += f' ({record.name.decode()})'
            _check_record(record, metadata, full)
        except records.READER_ERRORS as error:
            shard.errors.append(f'{where}: {error}')
        else:
            digest = manifest.digest_of(record)
            facts.append((record.label, digest))
            shard.names[record.name or digest.to_bytes(32, 'big')] += 1
        bar.update()
    shard.summary = Summary.of_records(facts)


def _check_record(record: Record, metadata: Metadata, full: bool) -> None:
    """Checks a record's label and image; ValueError says what is wrong."""
    records.check_label(record.label, len(metadata.label_names))
    if full or record.image[:2] != b'\xff\xd8':
        height, width, _ = decode(record.image).shape
    else:
        simplejpeg.decode_jpeg_header(record.image)
        frame = find_frame(record.image)
        height, width = frame.height, frame.width
    for actual, stated in zip((height, width), metadata.image_size, strict=True):
        if stated not in (None, actual):
            raise ValueError(
                f'the image is {width}×{height} pixels, features.json says '
                f'{metadata.image_size[1]}×{metadata.image_size[0]}'
            )


def _stray_files(directory: Path, shards: list[Shard]) -> list[str]:
    there = {path.name for path in directory.glob('*.array_record*')}
    strays = sorted(there - {shard.path.name for shard in shards})
    return [f'{name} is a shard that the metadata does not have' for name in strays]


def _duplicates(shards: list[Shard]) -> list[str]:
    """Names the identifiers, or where there are none the contents, that a split has twice."""
    errors = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        counts: Counter[bytes] = Counter()
        for shard in members:
            counts.update(shard.names)
        for name, count in counts.items():
            if count > 1:
                text = name.decode() if len(name) < 32 else name.hex()[:16]
                places = ', '.join(shard.path.name for shard in members if name in shard.names)
                errors.append(f'{split} has {text} {count} times, in {places}')
    return errors


def _differences(path: Path, expected: Manifest, found: Manifest) -> list[str]:
    """Compares with the manifest in `path`; one may leave out what is not published."""
    errors = []
    if expected.label_names != found.label_names:
        errors.append(f'the class names are not those of {path}: a label file of another dataset?')
    for split in sorted(expected.splits.keys() ^ found.splits.keys()):
        where = 'missing' if split in expected.splits else 'unknown'
        errors.append(f'split {split} is {where}, compared with {path}')
    for split in sorted(expected.splits.keys() & found.splits.keys()):
        ours, theirs = found.splits[split], expected.splits[split]
        counts = [('examples', ours.examples, theirs.examples)]
        if theirs.class_counts is not None:
            pairs = itertools.zip_longest(ours.class_counts or [], theirs.class_counts, fillvalue=0)
            counts += [(f'examples of class {i}', *pair) for i, pair in enumerate(pairs)]
        wrong = [
            f'{split} has {actual:,} {what}, {path} says {stated:,}'
            for what, actual, stated in counts
            if actual != stated
        ][:2]  # One class is enough to see that classes differ.
        if theirs.digest not in (None, ours.digest):
            wrong.append(
                f'{split} has the content digest {ours.digest}, {path} says {theirs.digest}'
            )
        errors += wrong
        if wrong:
            errors += [
                f'{name} does not have the content it was written with'
                for name, digest in ours.shards.items()
                if theirs.shards.get(name, digest) != digest
            ]
    return errors
