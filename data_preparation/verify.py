# SPDX-License-Identifier: Apache-2.0
"""Checks a prepared dataset record by record against its metadata and its manifest.

Every shard is there and opens, every record can be read (ArrayRecord keeps a checksum of each),
labels are in range, no identifier occurs twice, image headers (or with `full` the whole images)
decode, and counts, class counts and content digest are those of the manifest: the published one,
or else the one that was written beside the data when it was prepared. All faults are named at
once.
"""

import concurrent.futures
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from data_preparation import manifest
from data_preparation.archives import progress
from data_preparation.manifest import Record, Summary
from image_preprocessing import decode
from records import newest_version

NAMED_FAULTS = 20
ADVICE = 'Delete that folder and prepare the dataset again; until then nothing should train on it'


@dataclasses.dataclass
class Shard:
    """What was found in one shard."""

    split: str
    path: Path
    faults: list[str] = dataclasses.field(default_factory=list)
    summary: Summary = dataclasses.field(default_factory=Summary)
    names: list[bytes] = dataclasses.field(default_factory=list)


def verify(
    name: str, data_dir: Path, *, full: bool, manifest_file: Path | None, workers: int
) -> str:
    """Checks `data_dir/name` and returns a line that says so.

    Raises:
        DatasetError: there is no such dataset.
        FileNotFoundError: there is no such manifest.
        ValueError: it has faults; the text names them.
    """
    directory = newest_version(name, data_dir)
    info = tfds.builder_from_directory(directory).info
    encoding = info.features['image'].encoding_format or 'png'
    shards, faults = _read_all(info, full, workers)
    faults += [fault for shard in shards for fault in shard.faults]
    faults += _stray_files(directory, shards)
    faults += _duplicates(shards)
    found: dict[str, dict[str, Summary]] = {split: {} for split in info.splits}
    for shard in shards:
        found[shard.split][shard.path.name] = shard.summary

    known = manifest_file or manifest.published(name, str(info.version), encoding)
    written = directory / manifest.FILE_NAME
    if manifest_file and not manifest_file.exists():
        raise FileNotFoundError(f'{manifest_file} is missing')
    compared = [path for path in (known, written) if path.exists()]
    for path in compared:
        faults += _differences(path, found, info)
    if faults:
        more = [f'… and {len(faults) - NAMED_FAULTS} more'] if len(faults) > NAMED_FAULTS else []
        lines = '\n  '.join(faults[:NAMED_FAULTS] + more)
        raise ValueError(f'{directory} has {len(faults)} faults:\n  {lines}\n{ADVICE}')
    verdict = f'as in {" and ".join(map(str, compared))}'
    digested = any('digest' in split for path in compared for split in _splits(path).values())
    if not digested or not written.exists():  # Runs record the digest that is beside the data.
        manifest.write(directory, found, info.features['label'].names)
    if not digested:
        verdict = f'no digest is published for this data, so theirs are now in {written}'
    counts = ', '.join(f'{info.splits[split].num_examples:,} {split}' for split in found)
    return f'verified: {directory}: {counts} examples, {verdict}'


def _read_all(
    info: tfds.core.DatasetInfo, full: bool, workers: int
) -> tuple[list[Shard], list[str]]:
    """Reads every shard, several at a time; returns what was found, and faults of the metadata."""
    num_classes = info.features['label'].num_classes
    faults: list[str] = []
    if num_classes is None:
        return [], ['the metadata names no classes: label.labels.txt is missing or empty']
    shards, lengths = [], []
    for split, of_split in info.splits.items():
        for path, length in zip(of_split.filepaths, of_split.shard_lengths, strict=True):
            shards.append(Shard(split, Path(path)))
            lengths.append(length)
    with (
        progress('verifying', sum(lengths), ' records') as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        reads = [
            pool.submit(_read_shard, shard, length, num_classes, full, bar)
            for shard, length in zip(shards, lengths, strict=True)
        ]
        for read in reads:
            read.result()
    return shards, faults


def _read_shard(shard: Shard, length: int, num_classes: int, full: bool, bar: tqdm) -> None:
    """Reads the records of a shard into `shard`."""
    if not shard.path.is_file():
        shard.faults.append(f'{shard.path.name} is missing')
        return
    options = 'readahead_buffer_size:0,max_parallelism:0'
    reader = ArrayRecordReader(str(shard.path), options)
    if not reader.ok():
        shard.faults.append(f'{shard.path.name} is truncated or no ArrayRecord file')
        return
    if reader.num_records() != length:
        shard.faults.append(
            f'{shard.path.name} has {reader.num_records()} records, the metadata says {length}'
        )
    for i in range(reader.num_records()):
        where = f'record {i} of {shard.path.name}'
        try:
            record = Record.parse(reader.read([i])[0])
            where += f' ({record.name.decode()})' * bool(record.name)
            if not 0 <= record.label < num_classes:
                raise ValueError(f'label {record.label} is not in 0..{num_classes - 1}')
            (decode if full else check_header)(record.image)
        except (ValueError, RuntimeError) as error:
            shard.faults.append(f'{where}: {error}')
        else:
            shard.summary.add(record)
            shard.names.append(record.name or record.digest.to_bytes(32, 'big'))
        bar.update()


def check_header(encoded: bytes) -> None:
    """Checks the start of a JPEG, and the whole of a PNG; ValueError if it is neither."""
    if encoded[:2] == b'\xff\xd8':
        simplejpeg.decode_jpeg_header(encoded)
    else:
        decode(encoded)


def _stray_files(directory: Path, shards: list[Shard]) -> list[str]:
    expected = {shard.path.name for shard in shards}
    return [
        f'{path.name} is a shard that the metadata does not have'
        for path in sorted(directory.glob('*.array_record*'))
        if path.name not in expected
    ]


def _duplicates(shards: list[Shard]) -> list[str]:
    """Names the identifiers, or where there are none the contents, that a split has twice."""
    faults = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        counts = Counter(name for shard in members for name in shard.names)
        for name, count in counts.items():
            if count > 1:
                text = name.decode() if len(name) < 32 else name.hex()[:16]
                places = ', '.join(s.path.name for s in members if name in s.names)
                faults.append(f'{split} has {text} {count} times, in {places}')
    return faults


def _splits(path: Path) -> dict[str, dict[str, Any]]:
    """A manifest's splits."""
    return {k: v for k, v in json.loads(path.read_text()).items() if k != 'label_names'}


def _differences(
    path: Path, found: dict[str, dict[str, Summary]], info: tfds.core.DatasetInfo
) -> list[str]:
    """Compares with a manifest file; one may leave out what is not published."""
    expected, faults = _splits(path), []
    if json.loads(path.read_text())['label_names'] != info.features['label'].names:
        faults.append(f'the class names are not those of {path}: a label file of another dataset?')
    for split in sorted(expected.keys() | found.keys()):
        if split not in found or split not in expected:
            faults.append(f'split {split} is {"missing" if split in expected else "unknown"}')
            continue
        actual = sum(found[split].values(), Summary()).to_json()
        before = len(faults)
        for key in ('examples', 'class_counts', 'digest'):
            want, have = expected[split].get(key), actual[key]
            if want is None or want == have:
                continue
            if key == 'class_counts':
                pairs = enumerate(zip(want, have, strict=False))
                label, (want, have) = next((c, p) for c, p in pairs if p[0] != p[1])
                key = f'examples of class {label}'
            faults.append(f'{split} has {key} {have}, in {path} it is {want}')
        if len(faults) > before:
            recorded = expected[split].get('shards', {})
            for name, summary in found[split].items():
                if name in recorded and recorded[name] != f'{summary.digest:064x}':
                    faults.append(f'{name} has not the content it was written with')
    return faults
