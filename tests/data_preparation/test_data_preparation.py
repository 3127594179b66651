# SPDX-License-Identifier: Apache-2.0
"""Preparation on small data: records are what was in the archives, bad input is named."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from data_preparation import cifar10, digits, imagenet, imagenet_archives
from data_preparation.__main__ import parse_arguments
from data_preparation.progress import only_one
from data_preparation.verify import verify
from settings.errors import DatasetError
from tests.ilsvrc_archives import (
    CLASSES,
    CMYK_NAME,
    PNG_NAME,
    check,
    png,
    small_sources,
    synthetic_jpeg,
    write_archives,
)
from tests.range_server import RangeServer, RawServer
from workloads.resnet.image_decoding import decode
from workloads.resnet.records import Record, find_dataset, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path) -> dict[str, imagenet_archives.Source]:
    """Archives of 32 training and 6 validation images in `tmp_path`/archives."""
    return small_sources(tmp_path / 'archives')


def prepare(tmp_path: Path, sources) -> Path:
    return imagenet.prepare(tmp_path / 'data', tmp_path / 'archives', sources, workers=2)


def contents(directory: Path, split: str) -> list[Record]:
    paths = sorted(directory.glob(f'*-{split}.array_record-*'))
    return [parse(r) for p in paths for r in ArrayRecordReader(str(p)).read_all()]


# Digits and CIFAR-10.


def test_digits_are_all_there_split_evenly_and_as_published(tmp_path):
    directory = digits.prepare(tmp_path)
    source = tfds.builder_from_directory(directory).as_data_source()
    assert {split: len(examples) for split, examples in source.items()} == {
        'train': 1437,
        'test': 360,
    }
    assert np.bincount([e['label'] for e in source['test']]).tolist() == [36] * 10
    ids = [e['id'] for examples in source.values() for e in examples]
    assert sorted(map(int, ids)) == list(range(1797))
    images = np.stack([e['image'] for e in source['train']])
    assert images.shape == (1437, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    assert 'digits-1.0.0-png.json' in verify(
        'digits', tmp_path, full=True, manifest_file=None, workers=1
    )


def test_preparing_again_changes_nothing(tmp_path):
    directory = digits.prepare(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in directory.iterdir()}
    assert digits.prepare(tmp_path) == directory
    assert {p: p.stat().st_mtime_ns for p in directory.iterdir()} == before


def test_half_written_digits_are_not_taken_for_whole(tmp_path, monkeypatch):
    def interrupted(split):
        yield 0, '0', digits.encode_png(np.zeros((8, 8))), 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, 'examples', interrupted)
        with pytest.raises(KeyboardInterrupt):
            digits.prepare(tmp_path)
    with pytest.raises(DatasetError, match=r'scripts/download_dataset.sh digits'):
        verify('digits', tmp_path, full=False, manifest_file=None, workers=1)
    digits.prepare(tmp_path)
    verify('digits', tmp_path, full=False, manifest_file=None, workers=1)


def binary_cifar(folder: Path) -> Path:
    """An archive of the authors' structure with 2 training files and 1 of tests, 4 images each."""
    path = folder / 'cifar-10-binary.tar.gz'
    rng = np.random.default_rng(0)
    with tarfile.open(path, 'w:gz') as tar:
        for name in ('data_batch_2', 'data_batch_1', 'test_batch'):
            records = rng.integers(0, 256, (4, cifar10.RECORD_BYTES), np.uint8)
            records[:, 0] = rng.integers(0, 10, 4)
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}.bin')
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    return path


def test_the_binary_cifar_archive_becomes_tfds_examples(tmp_path):
    path = binary_cifar(tmp_path)
    with tarfile.open(path) as tar:
        file = tar.extractfile('cifar-10-batches-bin/data_batch_1.bin')
        stored = np.frombuffer(file.read(), np.uint8).reshape(4, -1)
    splits = cifar10.read_binary(path)
    assert [len(splits[s]) for s in ('train', 'test')] == [8, 4]
    for record, (key, name, image, label) in zip(stored, splits['train'], strict=False):
        assert name == f'train_{key:05d}'
        assert label == record[0]
        planes = record[1:].reshape(3, 32, 32)
        np.testing.assert_array_equal(decode(image), np.moveaxis(planes, 0, -1))


@pytest.mark.parametrize('packed', [False, True])
def test_cifar_from_jpegs_keeps_their_bytes(tmp_path, packed):
    folder, tar_path = tmp_path / 'cifar', tmp_path / 'cifar.tar.xz'
    for i, split in enumerate(('train', 'test')):
        for k, label in enumerate(cifar10.LABELS):
            path = folder / split / label / '0000.jpg'
            path.parent.mkdir(parents=True)
            path.write_bytes(synthetic_jpeg(10 * i + k, 32, 32))
    with tarfile.open(tar_path, 'w:xz') as tar:
        tar.add(folder, '.')
    directory = cifar10.prepare(tmp_path / 'data', tar_path if packed else folder)
    records = contents(directory, 'train')
    found = {r.name.decode(): (r.label, r.image) for r in records}
    for label, name in enumerate(cifar10.LABELS):
        image = (folder / 'train' / name / '0000.jpg').read_bytes()
        assert found[f'train/{name}/0000'] == (label, image)


def test_cifar_from_a_folder_without_images_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        cifar10.prepare(tmp_path / 'data', tmp_path)


@pytest.mark.slow
def test_the_jpegs_of_cifar_are_the_published_ones(tmp_path, cifar10_jpeg):
    cifar10.prepare(tmp_path, cifar10_jpeg)
    said = verify('cifar10', tmp_path, full=False, manifest_file=None, workers=2)
    assert 'cifar10-3.0.2-jpeg.json' in said


# ImageNet.


def test_official_facts():
    assert {s: (f.size, f.examples) for s, f in imagenet_archives.OFFICIAL.items()} == {
        'train': (147_897_477_120, 1_281_167),
        'validation': (6_744_924_160, 50_000),
    }


def test_prepared_imagenet_is_what_was_in_the_archives(tmp_path, sources):
    directory = prepare(tmp_path, sources)
    names = tfds.builder_from_directory(directory).info.features['label'].names
    train = {r.name.decode(): r for r in contents(directory, 'train')}
    assert len(train) == 32
    for i in range(10):
        for k, synset in enumerate(CLASSES):
            record = train[f'{synset}_{i}.JPEG']
            assert names[record.label] == synset
            assert record.image == synthetic_jpeg(10 * i + k)
    for name in (CMYK_NAME, PNG_NAME):
        assert train[name].image[:2] == b'\xff\xd8'
        assert decode(train[name].image).shape == (40, 48, 3)
    # The published labels of the first validation images.
    validation = {r.name.decode(): names[r.label] for r in contents(directory, 'validation')}
    for number, synset in ((1, 'n01751748'), (2, 'n09193705'), (3, 'n02105855')):
        assert validation[f'ILSVRC2012_val_{number:08d}.JPEG'] == synset
    assert tfds.data_source('imagenet2012', data_dir=tmp_path / 'data', split='train')[0]
    check(tmp_path, full=True)


def test_neither_workers_nor_shards_change_content_or_order(tmp_path, sources):
    first = prepare(tmp_path, sources)
    other = {split: dataclasses.replace(s, shards=1) for split, s in sources.items()}
    second = imagenet.prepare(tmp_path / 'other', tmp_path / 'archives', other, workers=1)
    assert len(list(first.glob('*-train.*'))) == 4
    assert len(list(second.glob('*-train.*'))) == 1
    for split in sources:
        assert contents(first, split) == contents(second, split)
    digest = [
        json.loads((d / 'manifest.json').read_text())['train']['digest'] for d in (first, second)
    ]
    assert digest[0] == digest[1]


def test_an_interrupted_preparation_resumes_where_it_stopped(tmp_path, sources, monkeypatch):
    written, original = [], imagenet._write_shard

    def stops_at_the_third(archive, entries, path, *args):
        if len(written) == 2:
            path.with_name(path.name + '.part').write_bytes(b'half')
            raise KeyboardInterrupt
        written.append(path.name)
        return original(archive, entries, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, '_write_shard', stops_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            imagenet.prepare(tmp_path / 'data', tmp_path / 'archives', sources, workers=1)
    assert not (tmp_path / 'data/imagenet2012/5.1.0').exists()
    work = tmp_path / 'data/imagenet2012/incomplete.5.1.0'
    kept = {name: (work / name).stat().st_mtime_ns for name in written}
    directory = prepare(tmp_path, sources)
    assert {name: (directory / name).stat().st_mtime_ns for name in written} == kept
    assert {p.name for p in directory.iterdir() if 'array_record' not in p.name} == {
        'dataset_info.json', 'features.json', 'label.labels.txt', 'manifest.json',
    }  # fmt: skip
    check(tmp_path, full=True)


def corrupt(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_missing_archive_is_named(tmp_path, sources):
    (tmp_path / 'archives/ILSVRC2012_img_val.tar').unlink()
    with pytest.raises(FileNotFoundError, match=r'ILSVRC2012_img_val.tar is missing'):
        prepare(tmp_path, sources)


def test_a_damaged_archive_is_named(tmp_path, sources):
    corrupt(tmp_path / 'archives/ILSVRC2012_img_train.tar', 5000)
    with pytest.raises(ValueError, match=r'img_train.tar is damaged: its SHA-256'):
        prepare(tmp_path, sources)


def test_a_truncated_archive_is_named(tmp_path, sources):
    path = tmp_path / 'archives/ILSVRC2012_img_train.tar'
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ValueError, match=r'img_train.tar is truncated'):
        prepare(tmp_path, sources)


def test_a_broken_image_in_an_archive_is_named_and_the_finished_part_kept(tmp_path):
    train = {f'{CLASSES[0]}_{i}.JPEG': synthetic_jpeg(i) for i in range(12)}
    broken = f'{CLASSES[0]}_7.JPEG'
    train[broken] = train[broken][:700]
    validation = {
        'ILSVRC2012_val_00000001.JPEG': synthetic_jpeg(1),
        'ILSVRC2012_val_00000002.JPEG': png(),
    }
    facts = imagenet_archives.read_sources(
        write_archives(tmp_path / 'archives', train, validation, 6)
    )
    with pytest.raises(
        ValueError, match=rf'{broken} in .*ILSVRC2012_img_train.tar is damaged.*kept'
    ):
        imagenet.prepare(tmp_path / 'data', tmp_path / 'archives', facts, workers=1)
    assert not (tmp_path / 'data/imagenet2012/5.1.0').exists()


def test_an_unknown_class_is_rejected(tmp_path):
    train = {'n99999999_0.JPEG': synthetic_jpeg(0)}
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': synthetic_jpeg(i) for i in (1, 2)}
    facts = imagenet_archives.read_sources(
        write_archives(tmp_path / 'archives', train, validation, 1)
    )
    with pytest.raises(ValueError, match=r'not the structure of ILSVRC2012.*n99999999'):
        prepare(tmp_path, facts)


def test_two_preparations_of_one_folder_exclude_each_other(tmp_path, sources):
    work = tmp_path / 'data/imagenet2012/incomplete.5.1.0'
    work.mkdir(parents=True)
    with only_one(work), pytest.raises(OSError, match=r'another preparation'):
        prepare(tmp_path, sources)


def small_disk(path: Path, megabytes: float) -> None:
    path.mkdir()
    options = f'size={int(megabytes * 2**20)}'
    made = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path], capture_output=True
    )
    if made.returncode:
        pytest.skip('mounting a small disk takes root')


@pytest.mark.parametrize('known_beforehand', [True, False])
def test_a_full_disk_is_said_and_the_finished_part_kept(tmp_path, known_beforehand, monkeypatch):
    train = {f'{CLASSES[0]}_{i}.JPEG': synthetic_jpeg(i, 400, 500) for i in range(60)}
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': synthetic_jpeg(i) for i in (1, 2)}
    facts = imagenet_archives.read_sources(
        write_archives(tmp_path / 'archives', train, validation, 10)
    )
    needed = sum(map(len, train.values()))
    small_disk(tmp_path / 'data', 0.6 * needed / 2**20)
    try:
        if not known_beforehand:
            monkeypatch.setattr(imagenet, '_check_space', lambda *_: None)
        with pytest.raises(OSError, match=r'disk|space') as caught:
            prepare(tmp_path, facts)
        assert not (tmp_path / 'data/imagenet2012/5.1.0').exists()
        if known_beforehand:
            assert 'GB free' in str(caught.value)
            return
        kept = len(list((tmp_path / 'data').glob('*/*/summaries/*.json')))
        assert kept > 0
        assert f'{kept} of 10 shards of train are complete' in str(caught.value)
        subprocess.run(['mount', '-o', 'remount,size=100m', tmp_path / 'data'], check=True)
        prepare(tmp_path, facts)
        check(tmp_path, full=True)
    finally:
        subprocess.run(['umount', tmp_path / 'data'], check=True)


def test_damage_in_an_unfinished_preparation_is_named_and_can_be_deleted(
    tmp_path, sources, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, '_write_metadata', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, sources)
    work = tmp_path / 'data/imagenet2012/incomplete.5.1.0'
    summary = next(work.glob('summaries/*.json'))
    for path in (work / 'train.index.npy', summary):
        for content in (b'', b'{}', b'[1]', path.read_bytes()[:-10]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf'{path} is damaged.*rm {path}'):
                prepare(tmp_path, sources)
        path.unlink()
    prepare(tmp_path, sources)
    check(tmp_path, full=True)


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'imagenet'])
def test_something_else_in_place_of_a_dataset_is_named(tmp_path, name):
    folder = {
        'digits': 'digits/1.0.0',
        'cifar10': 'cifar10/3.0.2',
        'imagenet': 'imagenet2012/5.1.0',
    }
    (tmp_path / folder[name]).mkdir(parents=True)
    ended = command('prepare', name, tmp_path)
    assert f'{tmp_path / folder[name]} is not a prepared dataset' in ended
    assert f'rm -r {tmp_path / folder[name]} && ' in ended


# The command line.


def command(*arguments, status: int = 2, **options) -> str:
    """Runs the command line; returns its last paragraph on stderr, which is no traceback."""
    ended = subprocess.run(
        [sys.executable, '-m', 'data_preparation', *map(str, arguments)],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert 'Traceback' not in ended.stderr
    said = ended.stderr.replace('\r', '\n').rpartition('error: ')[2]
    assert status == 0 or said
    return said


def test_a_missing_archive_is_one_paragraph(tmp_path):
    said = command('prepare', 'imagenet', tmp_path)
    assert said.startswith(f'{tmp_path}/downloads/manual/ILSVRC2012_img_train.tar is missing')
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_data_folder_is_named(tmp_path):
    path = tmp_path / 'file'
    path.touch()
    for name in ('prepare digits', 'prepare imagenet', 'verify digits'):
        assert str(path) in command(*name.split(), path)


def test_a_data_folder_that_cannot_be_written_to_is_named(tmp_path):
    small_disk(tmp_path / 'data', 1)
    try:
        subprocess.run(['mount', '-o', 'remount,ro', tmp_path / 'data'], check=True)
        said = command('prepare', 'digits', tmp_path / 'data')
        assert 'Read-only file system' in said
        assert str(tmp_path / 'data') in said
    finally:
        subprocess.run(['umount', tmp_path / 'data'], check=True)


def test_a_full_disk_is_named_for_digits_too(tmp_path):
    small_disk(tmp_path / 'data', 0.2)
    try:
        said = command('prepare', 'digits', tmp_path / 'data')
        assert 'No space left on device' in said
        assert str(tmp_path / 'data') in said
        assert not (tmp_path / 'data/digits/1.0.0').exists()
    finally:
        subprocess.run(['umount', tmp_path / 'data'], check=True)


def test_a_full_disk_is_named_for_downloads_too(tmp_path, sources):
    small_disk(tmp_path / 'data', 0.05)
    archives = tmp_path / 'archives'
    try:
        with RangeServer({p.name: p.read_bytes() for p in archives.glob('*.tar')}, []) as server:
            options = [f'--sources={archives}/sources.json', f'--url={server.url}']
            said = command('prepare', 'imagenet', tmp_path / 'data', *options)
        assert 'No space left on device' in said
        assert str(tmp_path / 'data') in said
    finally:
        subprocess.run(['umount', tmp_path / 'data'], check=True)


@pytest.mark.parametrize(
    'wrong',
    [
        'prepare imagenet --workers=0',
        'prepare imagenet --workers=-1',
        'prepare imagenet --workers=many',
        'prepare digits --from=x',
        'prepare digits --bogus',
        'prepare digits --he',
        'prepare digits DIR more',
        'prepare digits ~nobody-of-this-name/data',
        'prepare',
        'prepare mnist',
        'verify mnist',
        'verify',
        '',
        'mnist',
    ],
)
def test_wrong_arguments_are_rejected(tmp_path, wrong):
    assert command(*wrong.split(), cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert not list(tmp_path.iterdir())


def test_a_password_in_a_url_is_not_repeated(tmp_path):
    said = command('prepare', 'imagenet', tmp_path, '--url=https://me:secret@127.0.0.1:1/x')
    assert 'environment variables IMAGENET_USER and IMAGENET_PASSWORD' in said
    assert 'secret' not in said
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text, path in (('~/data', tmp_path / 'data'), ('data', tmp_path / 'data')):
        monkeypatch.setattr(sys, 'argv', ['', 'prepare', 'digits', text])
        assert parse_arguments().data_dir == path


def test_ctrl_c_ends_with_130_and_the_next_run_resumes(tmp_path, sources):
    archives, data_dir = tmp_path / 'archives', tmp_path / 'data'
    arguments = ['prepare', 'imagenet', data_dir, f'--sources={archives}/sources.json']
    files = {path.name: path.read_bytes() for path in archives.glob('*.tar')}
    train = files['ILSVRC2012_img_train.tar']
    part = data_dir / 'downloads/manual/ILSVRC2012_img_train.tar.part'
    answer = f'HTTP/1.1 200 OK\r\nContent-Length: {len(train)}\r\n\r\n'.encode() + train[:9000]
    with RawServer([answer], hangs=True) as server:
        process = subprocess.Popen(
            [sys.executable, '-m', 'data_preparation', *map(str, arguments), f'--url={server.url}'],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not (part.exists() and part.stat().st_size == 9000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == 'stopped; run the same command again to resume'
    assert 'Traceback' not in said
    with RangeServer(files, []) as server:
        command(*arguments, f'--url={server.url}', status=0)
    assert server.requests[0][0] == 'bytes=9000-'


@pytest.mark.parametrize('script', ['download_dataset.sh', 'verify_dataset.sh'])
@pytest.mark.parametrize(
    'arguments',
    ['digits --bogus', 'digits DIR more', 'mnist', 'imagenet --workers=0', 'digits --he'],
)
def test_scripts_reject_wrong_arguments_before_anything_is_set_up(tmp_path, script, arguments):
    environment = os.environ | {'VENV': str(tmp_path / 'venv'), 'PYTHON': sys.executable}
    ended = subprocess.run(
        [ROOT / 'scripts' / script, *arguments.split()],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert ended.returncode == 2
    assert 'error: ' in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script', ['download_dataset.sh', 'verify_dataset.sh'])
@pytest.mark.parametrize('arguments', ['', '-h', '--help', 'digits --help', 'imagenet DIR -h'])
def test_scripts_print_their_help(tmp_path, script, arguments):
    environment = os.environ | {'VENV': str(tmp_path / 'venv')}
    said = subprocess.run(
        [ROOT / 'scripts' / script, *arguments.split()],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    ).stdout  # fmt: skip
    assert said.startswith(f'usage: scripts/{script} ')
    assert all(name in said for name in ('digits', 'cifar10', 'imagenet') if name in arguments)
    assert not list(tmp_path.iterdir())


def test_a_small_dataset_is_prepared_with_the_digest_that_runs_record(tmp_path):
    command = [sys.executable, '-m', 'data_preparation', 'prepare', 'digits', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ''
    assert find_dataset('digits', str(tmp_path)).digest
