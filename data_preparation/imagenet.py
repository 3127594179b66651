# SPDX-License-Identifier: Apache-2.0
"""ILSVRC2012 from its official archives to TFDS's `imagenet2012` 5.1.0 in ArrayRecord format.

Out comes `DATA_DIR/imagenet2012/5.1.0` with the file names, order, features and labels that TFDS
gives it, so that its own preparation can take this one's place; TensorFlow is not needed. Images
are read straight from the archives, decoded once to see that they are whole, and written, a shard
per thread. A shard gets its name when it is complete, and the folder gets its own when all are;
a preparation that was stopped resumes with the shards that are missing.
"""

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer
from tqdm import tqdm

from data_preparation import dataset, files, manifest
from data_preparation.archives import check
from data_preparation.imagenet_archives import NAME, VERSION, Source, features, index, repair
from data_preparation.manifest import Summary
from data_preparation.progress import in_threads, only_one, progress
from workloads.resnet.image_decoding import decode
from workloads.resnet.records import Record

# As TFDS writes, but for the compression, which gains nothing on JPEGs.
WRITER_OPTIONS = 'group_size:1,uncompressed'


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
    archives = {split: archives_dir / source.file_name for split, source in sources.items()}
    missing = [f'{path} is missing' for path in archives.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{", and ".join(missing)}. ImageNet requires registration at image-net.org '
            '(docs/data.md says more). Put the archives there, or name the folder that has them '
            'with --archives_dir, or a URL to download them from with --url'
        )
    work = data_dir / NAME / f'incomplete.{VERSION}'
    work.mkdir(parents=True, exist_ok=True)
    with only_one(work):
        for split, source in sources.items():
            check(archives[split], source, work / 'checked.json')
        indexes = {
            split: index(split, archives[split], source, work) for split, source in sources.items()
        }
        _check_space(work, indexes)
        shards = {
            split: _write_split(split, archives[split], index, work, workers)
            for split, index in indexes.items()
        }
        _write_metadata(work, shards)
        for leftover in [work / 'checked.json', *work.glob('*.index.npy'), *work.glob('*.part')]:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(work / 'summaries')
        os.rename(work, final)
    return final


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
    split: str, archive: Path, index: list[np.ndarray], work: Path, workers: int
) -> dict[str, Summary]:
    """Writes the shards of a split that are missing; returns what is in each, by file name."""
    (work / 'summaries').mkdir(exist_ok=True)
    count = len(index)
    paths = [work / f'{NAME}-{split}.array_record-{i:05d}-of-{count:05d}' for i in range(count)]
    summaries = [work / 'summaries' / f'{path.name}.json' for path in paths]
    missing = [i for i, summary in enumerate(summaries) if not summary.exists()]
    total = sum(map(len, index))
    done = total - sum(len(index[i]) for i in missing)
    try:
        with progress(f'writing {split}', total, ' images', done) as bar:
            calls = [(archive, index[i], paths[i], summaries[i], bar) for i in missing]
            in_threads(_write_shard, calls, workers)
    except (RuntimeError, OSError, ValueError) as error:
        kept = sum(summary.exists() for summary in summaries)
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(
            f'{error}. {kept} of {count} shards of {split} are complete and kept in {work}; fix '
            'the cause and run the same command again to resume'
        ) from error
    return {path.name: _read_summary(s) for path, s in zip(paths, summaries, strict=True)}


def _read_summary(path: Path) -> Summary:
    try:
        return Summary.from_json(files.read_json(path))
    except ValueError as error:
        raise ValueError(f'{path} is damaged. {files.remedy(path)}') from error


def _write_shard(
    archive: Path,
    entries: np.ndarray,
    path: Path,
    summary_path: Path,
    bar: tqdm,
    stop: threading.Event,
) -> None:
    """Writes one shard, and when it is complete under its name, its summary."""
    serializer = example_serializer.ExampleSerializer(features().get_serialized_info())
    temporary = path.with_name(path.name + '.part')
    facts = []
    writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
    with archive.open('rb') as file:
        # They are spread over the archive; the disk may read them in the best order.
        for offset, length in sorted(entries[['offset', 'size']].tolist()):
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
        for offset, length, label, name in entries.tolist():
            if stop.is_set():
                return
            try:
                image = repair(name.decode(), os.pread(file.fileno(), length, offset))
                decode(image)
            except ValueError as error:
                raise ValueError(f'{name.decode()} in {archive} is damaged: {error}') from error
            example = {'file_name': name.decode(), 'image': image, 'label': label}
            writer.write(serializer.serialize_example(features().encode_example(example)))
            facts.append((label, manifest.digest_of(Record(name, label, image))))
            bar.update()
    writer.close()
    with temporary.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    files.write_json(summary_path, dataclasses.asdict(Summary.of_records(facts)))


def _write_metadata(work: Path, shards: dict[str, dict[str, Summary]]) -> None:
    """Adds what TFDS needs to read the shards, and the manifest."""
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[summary.examples for summary in of_split.values()],
            num_bytes=sum((work / name).stat().st_size for name in of_split),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=work, dataset_name=NAME, split=split, filetype_suffix='array_record'
            ),
        )
        for split, of_split in shards.items()
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
    splits = {split: Summary.of_shards(of_split) for split, of_split in shards.items()}
    manifest.write(work, manifest.Manifest(features()['label'].names, splits))
