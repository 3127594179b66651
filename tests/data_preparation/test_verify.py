# SPDX-License-Identifier: Apache-2.0
"""Verification: good data is accepted, and whatever is wrong is named."""

import json
import os
import random
import resource
import shlex
import shutil
import threading
import zlib
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_preparation import imagenet, manifest
from data_preparation.verify import read_metadata, verify
from settings.errors import DatasetError
from tests.ilsvrc_archives import check, png, small_sources, synthetic_jpeg
from workloads.resnet import records


def edit_shard(path: Path, edit) -> None:
    """Writes the records of a shard anew, as `edit(list of serialized records)` returns them."""
    edited = edit(ArrayRecordReader(str(path)).read_all())
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in edited:
        writer.write(record)
    writer.close()


def replace_image(serialized: bytes, change) -> bytes:
    example = records.tf_example_pb2.Example.FromString(serialized)
    values = example.features.feature['image'].bytes_list.value
    values[0] = change(values[0])
    return example.SerializeToString()


def corrupt(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def prepared(tmp_path) -> Path:
    sources = small_sources(tmp_path / 'archives')
    directory = imagenet.prepare(tmp_path / 'data', tmp_path / 'archives', sources, workers=2)
    check(tmp_path)
    return directory


def shard(directory: Path, number: int = 1) -> Path:
    return directory / f'imagenet2012-train.array_record-{number:05d}-of-00004'


def test_a_flipped_bit_is_found_and_its_record_named(tmp_path, prepared):
    image = records.parse(ArrayRecordReader(str(shard(prepared))).read_all()[3]).image
    corrupt(shard(prepared), shard(prepared).read_bytes().find(image[-100:]) + 50)
    with pytest.raises(
        ValueError, match=r'record 3 of imagenet2012-train.array_record-00001-of-00004'
    ):
        check(tmp_path)


def test_a_missing_shard_is_named(tmp_path, prepared):
    shard(prepared).unlink()
    with pytest.raises(ValueError, match=r'array_record-00001-of-00004 is missing'):
        check(tmp_path)


@pytest.mark.parametrize('size', [0, 1000, -1])
def test_a_truncated_shard_is_named(tmp_path, prepared, size):
    os.truncate(shard(prepared), size if size >= 0 else shard(prepared).stat().st_size - 1)
    with pytest.raises(ValueError, match=r'array_record-00001-of-00004 is truncated'):
        check(tmp_path)


def test_a_duplicate_is_named_though_the_count_is_right(tmp_path, prepared):
    name = records.parse(ArrayRecordReader(str(shard(prepared))).read_all()[0]).name.decode()
    edit_shard(shard(prepared), lambda records: [records[0], *records[:-1]])
    with pytest.raises(ValueError, match=rf'train has {name} 2 times, in .*00001-of-00004'):
        check(tmp_path)


def test_a_shard_of_another_preparation_is_named(tmp_path, prepared):
    stray = prepared / 'imagenet2012-train.array_record-00000-of-00009'
    stray.write_bytes(shard(prepared).read_bytes())
    with pytest.raises(
        ValueError, match=r'00000-of-00009 is a shard that the metadata does not have'
    ):
        check(tmp_path)


def test_another_image_under_the_same_name_is_found_by_its_shard(tmp_path, prepared):
    def edit(records):
        return [replace_image(records[0], lambda _: synthetic_jpeg(999)), *records[1:]]

    edit_shard(shard(prepared), edit)
    with pytest.raises(ValueError, match=r'00001-of-00004 does not have the content'):
        check(tmp_path)


def test_a_broken_image_is_found_by_full_verification_alone(tmp_path, prepared):
    """Where it went in before the manifest was written, so that the digest cannot tell."""
    edit_shard(shard(prepared), lambda r: [replace_image(r[0], lambda image: image[:-200]), *r[1:]])
    (prepared / 'manifest.json').unlink()
    expected = {'label_names': tfds.builder_from_directory(prepared).info.features['label'].names}
    expected |= {'train': {'examples': 32}, 'validation': {'examples': 6}}
    (tmp_path / 'expected.json').write_text(json.dumps(expected))
    with pytest.raises(ValueError, match=r'record 0 of imagenet2012-train.*truncated JPEG'):
        check(tmp_path, full=True)
    check(tmp_path, full=False)


def test_a_label_file_of_another_dataset_is_found(tmp_path, prepared):
    names = tfds.builder_from_directory(prepared).info.features['label'].names
    (prepared / 'label.labels.txt').write_text('\n'.join(sorted(names, reverse=True)) + '\n')
    with pytest.raises(ValueError, match=r'a label file of another dataset'):
        check(tmp_path)
    (prepared / 'label.labels.txt').write_text('cat\ndog\n')
    with pytest.raises(ValueError, match=r'label'):
        check(tmp_path)


def test_real_imagenet_is_held_to_the_published_counts(tmp_path, prepared):
    with pytest.raises(ValueError, match=r'train has 32 examples, .* says 1,281,167'):
        verify('imagenet2012', tmp_path / 'data', full=False, manifest_file=None, workers=1)


def test_ctrl_c_does_not_wait_for_the_shards_that_are_left(tmp_path, prepared, monkeypatch):
    told_to_stop, is_at_work = [], threading.Event()

    def interrupted(shard, metadata, full, bar, stop):
        if shard.path.name.endswith('00000-of-00004'):
            assert is_at_work.wait(20)
            raise KeyboardInterrupt
        is_at_work.set()
        told_to_stop.append(stop.wait(20))

    monkeypatch.setattr('data_preparation.verify._read_shard', interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify('imagenet2012', tmp_path / 'data', full=True, manifest_file=None, workers=2)
    assert told_to_stop
    assert all(told_to_stop)


# Damage of any kind: every file of the digits in every state.

DIGITS_FILES = (
    'dataset_info.json',
    'features.json',
    'manifest.json',
    'digits-train.array_record-00000-of-00001',
    'digits-test.array_record-00000-of-00001',
)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to('nowhere')


def flip(place: float):
    """Flips a bit of the byte at that share of the file."""

    def damage(path: Path) -> None:
        corrupt(path, int(place * path.stat().st_size))

    return damage


DAMAGE = {
    'deleted': Path.unlink,
    'empty': lambda path: os.truncate(path, 0),
    'half': lambda path: os.truncate(path, path.stat().st_size // 2),
    'without its last byte': lambda path: os.truncate(path, path.stat().st_size - 1),
    'without its first block': lambda path: path.write_bytes(path.read_bytes()[1 << 16 :]),
    'longer': lambda path: path.write_bytes(path.read_bytes() + b'}'),
    'zeros': lambda path: path.write_bytes(bytes(path.stat().st_size)),
    'random': lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    'null': lambda path: path.write_text('null'),
    'list': lambda path: path.write_text('[]'),
    'object': lambda path: path.write_text('{}'),
    'deep': lambda path: path.write_text('[' * 100_000),
    'folder': put_folder,
    'pipe': put_pipe,
    'dangling link': put_dangling_link,
} | {f'bit at {n} of 12': flip(n / 12) for n in range(12)}


@pytest.fixture(scope='module')
def whole_digits(digits_dir, tmp_path_factory) -> Path:
    """A data_dir with the digits and their manifest."""
    data_dir = tmp_path_factory.mktemp('whole')
    shutil.copytree(digits_dir / 'digits', data_dir / 'digits')
    verify('digits', data_dir, full=True, manifest_file=None, workers=1)
    return data_dir


@pytest.fixture
def damaged_digits(whole_digits, tmp_path) -> Path:
    """A copy of the digits' folder, to be damaged, in the data_dir `tmp_path`."""
    return Path(shutil.copytree(whole_digits / 'digits/1.0.0', tmp_path / 'digits/1.0.0'))


def examples(directory: Path) -> dict[str, list[records.Record]]:
    """What a reader of the dataset gets, and by the names of its classes."""
    metadata = read_metadata(directory)
    found: dict[str, list] = {'classes': metadata.label_names}
    for split, shards in metadata.shards.items():
        read = [ArrayRecordReader(str(path)).read_all() for path, _ in shards]
        found[split] = [records.parse(record) for of_shard in read for record in of_shard]
    return found


def verify_digits(data_dir: Path) -> str:
    return verify('digits', data_dir, full=True, manifest_file=None, workers=1)


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', DIGITS_FILES)
def test_a_damaged_file_is_named_unless_the_examples_are_still_the_same(
    whole_digits, damaged_digits, tmp_path, name, damage
):
    """Accepted are a manifest that is gone (it is written anew) and bits that nothing reads."""
    DAMAGE[damage](damaged_digits / name)
    try:
        verify_digits(tmp_path)
    except (ValueError, DatasetError) as error:
        said = str(error)
        assert name in said or (name, damage) in {
            ('dataset_info.json', 'deleted'),
            ('dataset_info.json', 'dangling link'),
        }
        assert 'download_dataset.sh digits' in said
    else:
        assert examples(damaged_digits) == examples(whole_digits / 'digits/1.0.0')
        assert damage.startswith('bit at') or name == 'manifest.json'


@pytest.mark.parametrize('name', DIGITS_FILES)
def test_a_file_without_permission_is_named(damaged_digits, tmp_path, name):
    (damaged_digits / name).chmod(0)
    if os.access(damaged_digits / name, os.R_OK):
        pytest.skip('root may read everything')
    with pytest.raises((ValueError, OSError), match=name):
        verify_digits(tmp_path)


def leaves(value, path=()):
    """The paths to everything in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


STRANGE = (None, True, -1, 2**70, 1.5, '', 'x', [], [None], {}, {'x': 1})


def test_a_manifest_with_anything_in_any_place_is_named_or_says_something_else(damaged_digits):
    path = damaged_digits / 'manifest.json'
    content, original = json.loads(path.read_text()), manifest.read(path)
    rejected = []
    for place in leaves(content):
        for strange in STRANGE:
            path.write_text(json.dumps(replaced(content, place, strange)))
            try:
                found = manifest.read(path)
            except ValueError as error:
                rejected.append(str(error))
            else:
                assert found != original
    assert len(rejected) > 400
    assert all(str(path) in said for said in rejected)


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_metadata_with_anything_in_any_place_are_named_or_usable(damaged_digits, name):
    path = damaged_digits / name
    content = json.loads(path.read_text())
    rejected = []
    for place in leaves(content):
        for strange in STRANGE:
            path.write_text(json.dumps(replaced(content, place, strange)))
            try:
                metadata = read_metadata(damaged_digits)
            except ValueError as error:
                rejected.append(str(error))
            else:
                paths = [path for shards in metadata.shards.values() for path, _ in shards]
                assert all(path.parent == damaged_digits for path in paths)
    assert len(rejected) > 100
    assert all(name in said or 'names no classes' in said for said in rejected)


@pytest.mark.parametrize('claimed', [0, 10, 359, 361, 2**40])
def test_metadata_that_claim_another_number_of_examples_are_found(
    damaged_digits, tmp_path, claimed
):
    path = damaged_digits / 'dataset_info.json'
    path.write_text(path.read_text().replace('"360"', f'"{claimed}"'))
    with pytest.raises(ValueError, match=rf'has 360 records, the metadata says {claimed}'):
        verify_digits(tmp_path)


def test_metadata_without_one_of_the_splits_are_found(damaged_digits, tmp_path):
    path = damaged_digits / 'dataset_info.json'
    content = json.loads(path.read_text())
    del content['splits'][1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'test has no shards in the metadata'):
        verify_digits(tmp_path)


def test_images_of_another_size_than_the_metadata_say_are_found(damaged_digits, tmp_path):
    path = damaged_digits / 'features.json'
    path.write_text(path.read_text().replace('"8"', '"9"', 1))
    with pytest.raises(ValueError, match=r'the image is 8×8 pixels, features.json says 8×9'):
        verify_digits(tmp_path)


def test_the_remedy_can_be_pasted(damaged_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (damaged_digits / 'features.json').unlink()
    with pytest.raises(ValueError, match=r'features.json is missing') as caught:
        verify('digits', Path('.'), full=False, manifest_file=None, workers=1)
    remedy = shlex.split(str(caught.value).splitlines()[-1])
    assert remedy[:4] == ['rm', '-r', str(damaged_digits), '&&']
    assert os.access(remedy[4], os.X_OK)
    assert remedy[5:] == ['digits', str(tmp_path)]


def claims(encoded: bytes, side: int) -> bytes:
    """The same JPEG or PNG, but its header states `side` pixels in both directions."""
    if encoded[:2] == b'\xff\xd8':
        at = encoded.index(b'\xff\xc0') + 5
        return encoded[:at] + 2 * side.to_bytes(2, 'big') + encoded[at + 4 :]
    header = encoded[12:16] + 2 * side.to_bytes(4, 'big') + encoded[24:29]
    return encoded[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + encoded[33:]


@pytest.mark.parametrize('full', [True, False])
@pytest.mark.parametrize('kind', [synthetic_jpeg, lambda _: png()])
def test_an_image_that_claims_to_be_huge_is_named_and_not_decoded(tmp_path, prepared, kind, full):
    def edit(records):
        return [records[0], replace_image(records[1], lambda _: claims(kind(0), 60_000))]

    edit_shard(shard(prepared), edit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r'record 1 of .*00001-of-00004 .*60000×60000'):
        check(tmp_path, full)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
