# SPDX-License-Identifier: Apache-2.0
"""ILSVRC2012 from its official archives to TFDS's `imagenet2012` 5.1.0 in ArrayRecord format.

Out comes `DATA_DIR/imagenet2012/5.1.0` with the file names, order, features and labels that TFDS
gives it, so that its own preparation can take this one's place; TensorFlow is not needed. Images
are read straight from the archives, decoded once to see that they are whole, and written, a shard
per thread. A shard gets its name when it is complete, and the folder gets its own when all are;
a preparation that was stopped resumes with the shards that are missing.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import os
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer
from tqdm import tqdm

from data_preparation import dataset, files, manifest
from data_preparation.archives import check, progress
from data_preparation.imagenet_archives import NAME, VERSION, Source, features, index, repair
from workloads.resnet.image_decoding import decode

# As TFDS writes, but for the compression, which gains nothing on JPEGs.
WRITER_OPTIONS = 'group_size:1,uncompressed'

# Of each shard of a split, by file name: what is in it, and the bytes of its records.
Shards = dict[str, tuple[manifest.Summary, int]]


def prepare(data_dir: Path, archives_dir: Path, sources: dict[str, Source], workers: int) -> Path:
    """Writes `data_dir/imagenet2012/5.1.0` and returns it; returns at once when it is there.

    Raises:
        FileNotFoundError: an archive is missing.
        ValueError: an archive or an image in it is damaged; the text names it.
        OSError: the disk is full, the folder cannot be written to, or another preparation is at
            work on it.
    """
    final = data_dir / NAME / VERSION
    if dataset.is_prepared(NAME, data_dir, VERSION):
        return final
    paths = [archives_dir / source.archive.file_name for source in sources.values()]
    missing = [f'{path} is missing' for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{", and ".join(missing)}. ImageNet requires registration at image-net.org '
            '(docs/data.md says more). Put the archives there, or name the folder that has them '
            'with --archives_dir, or a URL to download them from with --url'
        )
    work = data_dir / NAME / f'incomplete.{VERSION}'
    work.mkdir(parents=True, exist_ok=True)
    with _only_one(work):
        for source in sources.values():
            path = archives_dir / source.archive.file_name
            check(path, source.archive, work / 'checked.json')
        indexes = {
            split: index(split, archives_dir / source.archive.file_name, source, work)
            for split, source in sources.items()
        }
        _check_space(work, indexes)
        summaries = {}
        for split, shards in indexes.items():
            archive = archives_dir / sources[split].archive.file_name
            summaries[split] = _write_split(split, archive, shards, work, workers)
        _write_metadata(work, summaries)
        for leftover in [work / 'checked.json', *work.glob('*.index.npy'), *work.glob('*.part')]:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(work / 'summaries')
        os.rename(work, final)
    return final


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Holds a lock on the folder that dies with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OSError(f'another preparation is at work in {directory}') from error
    finally:
        os.close(descriptor)


def _check_space(work: Path, indexes: dict[str, list[np.ndarray]]) -> None:
    needed = sum(int(i['size'].sum(dtype=np.int64)) for shards in indexes.values() for i in shards)
    written = sum(p.stat().st_size for p in work.glob('*.array_record-*'))
    free = shutil.disk_usage(work).free
    if written + free < needed:
        raise OSError(
            f'the records need {needed / 1e9:,.3f} GB, and the disk of {work} has '
            f'{free / 1e9:,.3f} GB free; free some, or choose another data folder'
        )


def _write_split(
    split: str, archive: Path, shards: list[np.ndarray], work: Path, workers: int
) -> Shards:
    """Writes the shards of a split that are missing; returns the summaries of all, by file name."""
    (work / 'summaries').mkdir(exist_ok=True)
    paths = [
        work / f'{NAME}-{split}.array_record-{i:05d}-of-{len(shards):05d}'
        for i in range(len(shards))
    ]
    summaries = [work / 'summaries' / f'{path.name}.json' for path in paths]
    missing = [i for i, summary in enumerate(summaries) if not summary.exists()]
    total = sum(map(len, shards))
    done = total - sum(len(shards[i]) for i in missing)
    stop = threading.Event()
    with (
        archive.open('rb') as file,
        progress(f'writing {split}', total, ' images', done) as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        write = functools.partial(_write_shard, archive, file.fileno(), stop=stop, bar=bar)
        writing = [pool.submit(write, shards[i], paths[i], summaries[i]) for i in missing]
        try:
            for shard in concurrent.futures.as_completed(writing):
                shard.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            kept = sum(summary.exists() for summary in summaries)
            advice = (
                f'{error}. {kept} of {len(paths)} shards of {split} are complete and kept in '
                f'{work}; fix the cause and run the same command again to resume'
            )
            if isinstance(error, (RuntimeError, OSError)):
                raise OSError(advice) from error
            if isinstance(error, ValueError):
                raise ValueError(advice) from error
            raise
    return {path.name: _read_summary(s) for path, s in zip(paths, summaries, strict=True)}


def _read_summary(path: Path) -> tuple[manifest.Summary, int]:
    """The summary of a shard and the bytes of its records, as `_write_shard` wrote them."""
    try:
        values = files.read_json(path)
        return manifest.Summary.from_json(values), int(values['bytes'])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged. Delete it: rm {shlex.quote(str(path))}') from error


def _write_shard(
    archive: Path,
    descriptor: int,
    entries: np.ndarray,
    path: Path,
    summary_path: Path,
    *,
    stop: threading.Event,
    bar: tqdm,
) -> None:
    """Writes one shard, and when it is complete under its name, its summary beside it."""
    serializer = example_serializer.ExampleSerializer(features().get_serialized_info())
    temporary = path.with_name(path.name + '.part')
    summary, size = manifest.Summary(), 0
    for offset, length in sorted(entries[['offset', 'size']].tolist()):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
    for offset, length, label, name in entries.tolist():
        if stop.is_set():
            return
        try:
            image = repair(name.decode(), os.pread(descriptor, length, offset))
            decode(image)
        except ValueError as error:
            raise ValueError(f'{name.decode()} in {archive} is damaged: {error}') from error
        example = {'file_name': name.decode(), 'image': image, 'label': label}
        serialized = serializer.serialize_example(features().encode_example(example))
        writer.write(serialized)
        size += len(serialized)
        summary.add(manifest.Record(name, label, image))
        bar.update()
    writer.close()
    with temporary.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    temporary.write_text(json.dumps(summary.to_json() | {'bytes': size}))
    os.replace(temporary, summary_path)


def _write_metadata(work: Path, summaries: dict[str, Shards]) -> None:
    """Adds what TFDS needs to read the shards, and the manifest."""
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[summary.examples for summary, _ in shards.values()],
            num_bytes=sum(size for _, size in shards.values()),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=work, dataset_name=NAME, split=split, filetype_suffix='array_record'
            ),
        )
        for split, shards in summaries.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=features(),
        split_infos=infos,
        version=VERSION,
        check_data=False,
        supervised_keys=('image', 'label'),
        homepage='https://image-net.org/',
    )
    manifest.write(
        work,
        {
            split: {name: summary for name, (summary, _) in shards.items()}
            for split, shards in summaries.items()
        },
        features()['label'].names,
    )
