# SPDX-License-Identifier: Apache-2.0
"""Damaged data is named: before the run by its metadata, else at the first access."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from input_pipeline import Share
from settings.errors import ConfigError, DataError, DatasetError
from tests.harness import resolve
from workloads.resnet import images
from workloads.resnet.records import Records, find_dataset, newest_version


@pytest.fixture
def folder(digits_dir, tmp_path) -> Path:
    """A copy of the digits; its data_dir is two folders up."""
    shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
    return tmp_path / 'digits' / '1.0.0'


def shard(folder: Path, split: str = 'train') -> Path:
    return next(folder.glob(f'*{split}*array_record*'))


def find(folder: Path):
    return find_dataset('digits', str(folder.parents[1]))


def set_label(folder: Path, split: str, index: int, label: int) -> None:
    path = shard(folder, split)
    records = ArrayRecordReader(str(path)).read_all()
    example = tf_example_pb2.Example.FromString(records[index])
    example.features.feature['label'].int64_list.value[0] = label
    records[index] = example.SerializeToString()
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


def commands_in(message: str) -> list[list[str]]:
    return [shlex.split(part) for part in message.split(' with: ')[1:]]


def test_no_data_set_tells_how_to_prepare_it(tmp_path):
    with pytest.raises(DatasetError, match=r'download_dataset.sh digits'):
        find_dataset('digits', str(tmp_path))


def test_a_missing_or_empty_shard_is_named(folder):
    shard(folder).write_bytes(b'')
    with pytest.raises(DatasetError, match=shard(folder).name):
        find(folder)
    shard(folder).unlink()
    with pytest.raises(DatasetError, match='incomplete'):
        find(folder)


@pytest.mark.parametrize('label', [10, 57, -1, -(2**63)])
def test_a_label_of_no_class_stops_training_and_evaluation(folder, label):
    set_label(folder, 'train', 5, label)
    set_label(folder, 'test', 7, label)
    config = resolve('digits', folder.parents[1])
    pipeline = images.pipeline(find(folder), config, 5, Share(0, 479, 479))
    named = rf'record {{}} of .*digits-{{}}.*its label {label} is not in 0\.\.9'
    with pytest.raises(DataError, match=named.format(5, 'train')):
        list(pipeline.train(0, 3))
    with pytest.raises(DataError, match=named.format(7, 'test')):
        list(pipeline.evaluation())


@pytest.mark.parametrize(('split', 'claimed'), [('test', 10), ('test', 361), ('train', 1438)])
def test_metadata_that_miscounts_a_shard_is_named_at_the_first_access(folder, split, claimed):
    (folder / 'manifest.json').unlink(missing_ok=True)  # It would tell before.
    path = folder / 'dataset_info.json'
    info = json.loads(path.read_text())
    next(s for s in info['splits'] if s['name'] == split)['shardLengths'] = [str(claimed)]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match=rf'digits-{split}.* has \d+ records, .* says {claimed}'):
        Records(find(folder), split)[0]


@pytest.mark.parametrize(
    ('text', 'other'),
    [('{SHARD_X_OF_Y}', '{X}'), ('"shardLengths"', '"x"'), ('"1437"', '"0"'), ('train', 'trian')],
)
def test_unusable_metadata_is_rejected_before_the_run(folder, text, other):
    path = folder / 'dataset_info.json'
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, other))
    with pytest.raises(DatasetError, match=f'metadata in {folder} cannot be used'):
        find(folder)


def test_metadata_that_contradicts_the_manifest_is_rejected(folder):
    manifest = {split: {'examples': 10, 'digest': 64 * 'a'} for split in ('train', 'test')}
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r'1437 examples for train, its manifest.json 10'):
        find(folder)


@pytest.mark.parametrize(
    'text',
    [
        '[]', '3', 'null', '"a"', '', '{', '\xff', '{"train": 5}', '{"train": {"digest": 5}}',
        '{"train": {"digest": "x"}, "test": null}', '[' * 100_000,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_manifest_of_any_content_gives_no_digest(folder, text):
    (folder / 'manifest.json').write_text(text, encoding='latin-1')
    assert find(folder).digest is None


@pytest.mark.parametrize('name', ['1.0.0.bak', '1.0.0-old', 'copy', '1.0.0 (2)', '٣.0.0'])
def test_folders_that_are_no_version_are_skipped(folder, name):
    shutil.copytree(folder, folder.with_name(name))
    assert newest_version('digits', folder.parents[1]) == folder
    shutil.rmtree(folder)
    with pytest.raises(DatasetError, match='is not in'):
        find(folder)


@pytest.mark.parametrize('data_dir', ['~nobody_of_this_name', 'a\0b', 'a' * 5000])
def test_a_data_dir_that_cannot_be_is_named(data_dir):
    with pytest.raises(DatasetError, match=r'data_dir=|is not in'):
        find_dataset('digits', data_dir)


def test_printed_commands_can_be_pasted_in_any_folder(folder, monkeypatch):
    spaced = folder.parents[1] / 'with space'
    shutil.copytree(folder, spaced / 'digits' / '1.0.0')
    monkeypatch.chdir(folder.parents[1])
    shard(spaced / 'digits/1.0.0').write_bytes(b'damaged')
    with pytest.raises(DataError) as damaged:
        Records(find_dataset('digits', 'with space'), 'train')[0]
    with pytest.raises(DatasetError) as missing:
        find_dataset('digits', "it's not here")
    for error, place, options in (
        (damaged, spaced, ['--full']),
        (missing, folder.parents[1] / "it's not here", []),
    ):
        ((script, *arguments),) = commands_in(str(error.value))
        assert os.access(script, os.X_OK)
        assert Path(script).is_absolute()
        assert arguments == ['digits', str(place), *options]


@pytest.mark.parametrize('seed', range(40))
def test_damage_is_named_or_harmless(folder, seed):
    """Shards and metadata, cut, changed, or exchanged: never another kind of error."""
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix == '.json'))
    path = rng.choice([path, shard(folder, 'train'), shard(folder, 'test')])
    content = bytearray(path.read_bytes())
    kind = rng.choice(['cut', 'change', 'exchange', 'insert'])
    if kind == 'cut':
        del content[rng.randrange(len(content)) :]
    elif kind == 'exchange':
        content = bytearray(rng.choice(sorted(folder.iterdir())).read_bytes())
    else:
        at = rng.randrange(len(content))
        content[at : at + 3 * (kind == 'change')] = rng.randbytes(3)
    path.write_bytes(content)
    try:
        config = resolve('digits', folder.parents[1])
        pipeline = images.pipeline(find(folder), config, 5, Share(0, 479, 479))
        outcome = f'{len([*pipeline.train(0, 3), *pipeline.evaluation()])} batches of digits'
    except (DatasetError, DataError, ConfigError) as error:
        outcome = str(error)
    assert 'digits' in outcome


def test_what_threads_need_is_imported_before_there_are_any():
    """Imports by several threads at once can wait for each other for ever."""
    program = 'import sys; from workloads.resnet import records; '
    program += 'print("tensorflow_datasets" in sys.modules)'
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == 'True\n'
