# SPDX-License-Identifier: Apache-2.0
"""Verification: good data is accepted, and whatever is wrong is named."""

import json
import os
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_preparation import imagenet, manifest
from data_preparation.verify import verify
from tests.ilsvrc_archives import small_sources, synthetic_jpeg


def check(tmp_path: Path, full: bool = False) -> str:
    """Verifies what `prepare` wrote; the published manifest is of the real ImageNet."""
    local = tmp_path / 'expected.json'
    if not local.exists():
        written = tmp_path / 'data/imagenet2012/5.1.0/manifest.json'
        local.write_text(written.read_text())
    return verify('imagenet2012', tmp_path / 'data', full=full, manifest_file=local, workers=2)


def edit_shard(path: Path, edit) -> None:
    """Writes the records of a shard anew, as `edit(list of serialized records)` returns them."""
    records = edit(ArrayRecordReader(str(path)).read_all())
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


def replace_image(serialized: bytes, change) -> bytes:
    example = manifest.tf_example_pb2.Example.FromString(serialized)
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
    records = ArrayRecordReader(str(shard(prepared))).read_all()
    image = manifest.Record.parse(records[3]).image
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
    name = manifest.Record.parse(
        ArrayRecordReader(str(shard(prepared))).read_all()[0]
    ).name.decode()
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
