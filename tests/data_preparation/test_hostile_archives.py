# SPDX-License-Identifier: Apache-2.0
"""Archives and folders that hold anything but what they should: one error names file and member."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_preparation import cifar10, files, imagenet, imagenet_archives
from tests.ilsvrc_archives import CLASSES, synthetic_jpeg, write_archives

IMAGE = synthetic_jpeg(0, 32, 32)
NAME = 'train/cat/0000.jpg'
VALIDATION = 'ILSVRC2012_val_00000001.JPEG'


def member(name: str, content: bytes = IMAGE, **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    if not info.isreg():
        info.size = 0
    return info, content


def tar(members, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:', **options) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link_to_itself(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, b'', type=tarfile.LNKTYPE, linkname=name)


def one_hole(name: str) -> tuple[tarfile.TarInfo, bytes]:
    """A member that is one hole of 100 GB, as GNU tar stores it."""
    headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': name}
    headers['GNU.sparse.realsize'] = str(10**11)
    return member(name, b'0\n'.ljust(tarfile.BLOCKSIZE, b'\0'), pax_headers=headers)


# What no archive may have: what the error says of it, and members that have it, which are made from
# a name and a content that would be right.
HOSTILE: dict[str, tuple[str, Callable[[str, bytes], list]]] = {
    'link': ('not a regular', lambda n, c: [member(n, c, type=tarfile.SYMTYPE, linkname='/')]),
    'link to itself': ('not a regular', lambda n, c: [link_to_itself(n)]),
    'pipe': ('not a regular', lambda n, c: [member(n, c, type=tarfile.FIFOTYPE)]),
    'character device': ('not a regular', lambda n, c: [member(n, c, type=tarfile.CHRTYPE)]),
    'block device': ('not a regular', lambda n, c: [member(n, c, type=tarfile.BLKTYPE)]),
    'unknown type': ('not a regular', lambda n, c: [member(n, c, type=b'Z')]),
    'holes': ('not a regular', lambda n, c: [one_hole(n)]),
    'the same name twice': ('twice', lambda n, c: [member(n, c), member(n, c)]),
    'the same path twice': ('twice', lambda n, c: [member(n, c), member(f'./{n}', c)]),
    'absolute path': ('unusable path', lambda n, c: [member(f'/{n}', c)]),
    'path outside': ('unusable path', lambda n, c: [member(f'../{n}', c)]),
    'path outside, hidden': ('unusable path', lambda n, c: [member(f'a/../../{n}', c)]),
    'control character': ('unusable path', lambda n, c: [member(f'\x1b[1m{n}', c)]),
    'bytes that are no text': ('unusable path', lambda n, c: [member(f'\udcff{n}', c)]),
}  # fmt: skip


@pytest.mark.parametrize('what', HOSTILE)
def test_a_cifar_archive_with_an_unusable_member_is_named(tmp_path, what):
    said, members = HOSTILE[what]
    path = tmp_path / 'cifar.tar'
    path.write_bytes(
        tar([member('test/cat/0.jpg'), *members(NAME, IMAGE), member('test/dog/0.jpg')])
    )
    with pytest.raises(ValueError, match=said) as caught:
        cifar10.prepare(tmp_path / 'data', path)
    assert str(path) in str(caught.value)
    assert '0000.jpg' in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('where', ['validation', 'train', 'class'])
@pytest.mark.parametrize('what', HOSTILE)
def test_an_imagenet_archive_with_an_unusable_member_is_named(tmp_path, what, where):
    said, members = HOSTILE[what]
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': IMAGE for i in (1, 2)}
    train = {f'{CLASSES[0]}_{i}.JPEG': IMAGE for i in range(2)}
    facts = write_archives(tmp_path / 'archives', train, validation, shards=1)
    image, class_tar = f'{CLASSES[0]}_0.JPEG', f'{CLASSES[0]}.tar'
    split, file, name, content = {
        'validation': ('validation', 'val', VALIDATION, tar(members(VALIDATION, IMAGE))),
        'train': ('train', 'train', class_tar, tar(members(class_tar, tar([member(image)])))),
        'class': ('train', 'train', image, tar([member(class_tar, tar(members(image, IMAGE)))])),
    }[where]
    path = tmp_path / f'archives/ILSVRC2012_img_{file}.tar'
    publish(facts, split, path, content)
    with pytest.raises(ValueError, match=said) as caught:
        prepare_imagenet(tmp_path, facts)
    assert str(path) in str(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / 'data/imagenet2012/5.1.0').exists()
    assert {p.name for p in tmp_path.iterdir()} == {'archives', 'data'}


def publish(facts: Path, split: str, path: Path, content: bytes) -> None:
    """Puts another archive in place, and its size and checksum among the facts."""
    path.write_bytes(content)
    sources = json.loads(facts.read_text())
    sources[split] |= {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    facts.write_text(json.dumps(sources))


def prepare_imagenet(tmp_path: Path, facts: Path) -> Path:
    sources = imagenet_archives.read_sources(facts)
    return imagenet.prepare(tmp_path / 'data', tmp_path / 'archives', sources, workers=1)


def cifar(*more) -> bytes:
    """A tar of one image of each split, and `more`."""
    return tar([member(NAME), member('test/dog/0000.jpg'), *more])


def with_a_broken_header(content: bytes) -> bytes:
    at = 2 * tarfile.BLOCKSIZE + len(IMAGE) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return content[:at] + b'broken' + content[at + 6 :]


DAMAGED = {
    'empty': b'',
    'no tar': random.Random(0).randbytes(10_000),
    'text': b'<html>not found</html>',
    'cut in a header': cifar()[:100],
    'cut in a content': cifar()[:900],
    'cut between members': cifar()[: cifar().index(b'test/dog')],
    'without the end': cifar()[: cifar().rindex(b'\xff\xd9') + 2],
    'broken second header': with_a_broken_header(cifar()),
    'gzip, cut': gzip.compress(cifar())[:-100],
    'gzip, damaged': gzip.compress(cifar())[:300] + bytes(100),
    'gzip, header only': gzip.compress(b'')[:10],
    'bzip2, cut': bz2.compress(cifar())[:-100],
    'bzip2, damaged': bz2.compress(cifar())[:300] + bytes(100),
    'xz, cut': lzma.compress(cifar())[:-100],
    'xz, damaged': lzma.compress(cifar())[:300] + bytes(100),
    'long name without end': tar([member('x' * 10_000, b'')])[:600],
}


@pytest.mark.parametrize('what', DAMAGED)
def test_a_damaged_cifar_archive_is_named(tmp_path, what):
    path = tmp_path / 'cifar.tar'
    path.write_bytes(DAMAGED[what])
    with pytest.raises(ValueError, match=r'cifar.tar is (damaged|truncated)'):
        cifar10.prepare(tmp_path / 'data', path)


@pytest.mark.parametrize('seed', range(4))
def test_random_damage_to_a_tar_is_named_or_changes_no_more_than_images(tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(150):
        content = bytearray(cifar())
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(len(content)) if rng.random() < 0.2 else rng.randrange(1024)
            content[at] = rng.choice((0, 255, ord('7'), rng.randrange(256)))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path = tmp_path / 'cifar.tar'
        path.write_bytes(content)
        try:
            splits = cifar10.read_jpegs(path)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
        else:
            said = ''
            assert [len(split) for split in splits.values()] == [1, 1]
        assert not said or str(path) in said


@pytest.mark.parametrize('compress', [gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_that_decompresses_to_too_much_is_not_read_whole(
    tmp_path, monkeypatch, compress
):
    monkeypatch.setattr(cifar10, 'MAX_TAR_BYTES', 1 << 21)
    path = tmp_path / 'cifar.tar'
    path.write_bytes(compress(cifar(member('zeros', bytes(1 << 26)))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r'cifar.tar has more than 2,097,152 bytes inside'):
        cifar10.prepare(tmp_path / 'data', path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_member_that_is_too_large_is_named(tmp_path):
    path = tmp_path / 'cifar.tar'
    path.write_bytes(cifar(member('train/cat/large.jpg', bytes(cifar10.MAX_IMAGE_BYTES + 1))))
    with pytest.raises(ValueError, match=r'train/cat/large.jpg in .*cifar.tar has 65,537 bytes'):
        cifar10.prepare(tmp_path / 'data', path)


def claims_to_be_huge() -> bytes:
    at = IMAGE.index(b'\xff\xc0') + 5
    return IMAGE[:at] + 2 * (60_000).to_bytes(2, 'big') + IMAGE[at + 4 :]


UNUSABLE = {
    'cut': (IMAGE[:-100], 'is damaged: truncated JPEG'),
    'no image': (b'x' * 500, 'is damaged: neither JPEG nor PNG'),
    'empty': (b'', 'is damaged'),
    'huge': (claims_to_be_huge(), 'is damaged: its size is 60000'),
    'of another size': (synthetic_jpeg(0, 40, 32), 'is not a JPEG of 32x32 pixels'),
    'PNG': (cv2.imencode('.png', np.zeros((32, 32, 3)))[1].tobytes(), 'is not a JPEG of 32x32'),
}


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('what', UNUSABLE)
def test_a_cifar_image_that_is_none_is_named(tmp_path, what, packed):
    image, said = UNUSABLE[what]
    source = folder_of(tmp_path)
    if packed:
        source = tmp_path / 'cifar.tar'
        source.write_bytes(cifar(member('train/cat/1.jpg', image)))
    else:
        (source / 'train/cat/1.jpg').write_bytes(image)
    with pytest.raises(ValueError, match=f'train/cat/1.jpg in {source} {said}'):
        cifar10.prepare(tmp_path / 'data', source)


def folder_of(tmp_path: Path) -> Path:
    """A folder of one image of each split."""
    for name in (NAME, 'test/dog/0000.jpg'):
        (tmp_path / 'cifar' / name).parent.mkdir(parents=True)
        (tmp_path / 'cifar' / name).write_bytes(IMAGE)
    return tmp_path / 'cifar'


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**7)


ODD_FILES = {
    'pipe': (os.mkfifo, 'is not a regular file'),
    'device': (lambda path: path.symlink_to('/dev/zero'), 'is not a regular file'),
    'folder': (Path.mkdir, 'is not a regular file'),
    'link to nowhere': (lambda path: path.symlink_to('nowhere'), 'is missing'),
    'link to itself': (lambda path: path.symlink_to(path.name), 'symbolic link|symlink|is missing'),
    'large file': (hole, 'has 10,000,000 bytes'),
}


@pytest.mark.parametrize('what', ODD_FILES)
def test_an_odd_file_in_a_cifar_folder_is_named(tmp_path, what):
    make, said = ODD_FILES[what]
    path = folder_of(tmp_path) / 'train/cat/odd.jpg'
    make(path)
    with pytest.raises((ValueError, OSError), match=said) as caught:
        cifar10.prepare(tmp_path / 'data', tmp_path / 'cifar')
    assert str(path) in str(caught.value)


@pytest.mark.parametrize('what', ODD_FILES)
def test_an_odd_file_in_place_of_a_cifar_archive_is_named(tmp_path, monkeypatch, what):
    monkeypatch.setattr(cifar10, 'MAX_TAR_BYTES', 1 << 21)
    make, _ = ODD_FILES[what]
    path = tmp_path / 'cifar.tar'
    make(path)
    with pytest.raises((ValueError, OSError), match=str(path)):
        cifar10.prepare(tmp_path / 'data', path)


@pytest.mark.parametrize('name', ['x.jpg', 'cat/x.jpg', 'train/lion/x.jpg', 'valid/cat/x.jpg'])
def test_a_cifar_image_in_an_unknown_place_is_named(tmp_path, name):
    path = tmp_path / 'cifar.tar'
    path.write_bytes(cifar(member(name)))
    with pytest.raises(ValueError, match=rf'{name} in {path} is not .train,test./CLASS/NAME.jpg'):
        cifar10.prepare(tmp_path / 'data', path)


def test_two_cifar_images_that_would_get_one_identifier_are_named(tmp_path):
    path = tmp_path / 'cifar.tar'
    path.write_bytes(cifar(member(f'again/{NAME}')))
    with pytest.raises(ValueError, match=rf'{path} has more than one {NAME}.*again/{NAME}'):
        cifar10.prepare(tmp_path / 'data', path)


@pytest.mark.parametrize(
    ('split', 'names', 'said'),
    [
        ('validation', ['ILSVRC2012_val_00000000.JPEG'], 'is not a name of a validation image'),
        ('validation', ['ILSVRC2012_val_00050001.JPEG'], 'is not a name of a validation image'),
        ('validation', ['cat.JPEG'], 'is not a name of a validation image'),
        ('validation', [VALIDATION, 'ILSVRC2012_val_00000002.JPEG'] * 2, 'twice'),
        ('validation', [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 9)], 'more than 2 images'),
        ('validation', [VALIDATION], 'has 1 images, not 2'),
        ('validation', [VALIDATION, f'a/{VALIDATION}'], 'twice'),
        ('validation', [VALIDATION.replace('ILS', 'ILS' * 5)], 'too long'),
        ('train', ['n99999999.tar'], 'n99999999 is not a class'),
        ('train', ['cats.tar'], 'cats is not a class'),
    ],
)
def test_an_imagenet_archive_of_another_structure_is_named(tmp_path, split, names, said):
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': IMAGE for i in (1, 2)}
    train = {f'{CLASSES[0]}_{i}.JPEG': IMAGE for i in range(2)}
    facts = write_archives(tmp_path / 'archives', train, validation, shards=1)
    inner = IMAGE if split == 'validation' else tar([member('a.JPEG'), member('b.JPEG')])
    path = tmp_path / f'archives/ILSVRC2012_img_{"val" if split == "validation" else "train"}.tar'
    publish(facts, split, path, tar([member(name, inner) for name in names]))
    with pytest.raises(ValueError, match=said) as caught:
        prepare_imagenet(tmp_path, facts)
    assert str(path) in str(caught.value)


STRANGE = (None, True, 0, -1, 1.5, '', 'x', '../x', '/x', [], {}, [1], {'x': 1}, 10**30)


def test_a_file_of_sources_with_anything_in_any_place_is_named_or_usable(tmp_path):
    train = {f'{CLASSES[0]}_{i}.JPEG': IMAGE for i in range(2)}
    path = write_archives(tmp_path / 'archives', train, {VALIDATION: IMAGE, 'b': IMAGE}, shards=1)
    content = json.loads(path.read_text())
    variants = [*STRANGE, content | {'test': content['train']}, {'train': content['train']}]
    for split, values in content.items():
        variants += [content | {split: strange} for strange in STRANGE]
        variants += [content | {split: values | {f: s}} for f in values for s in STRANGE]
        for field in values:
            variants.append(content | {split: {k: v for k, v in values.items() if k != field}})
    accepted = 0
    for variant in variants:
        path.write_text(json.dumps(variant))
        try:
            sources = imagenet_archives.read_sources(path)
        except ValueError as error:
            said = str(error)
        else:
            said = ''
            accepted += 1
            assert sources.keys() == {'train', 'validation'}
            assert all(Path(s.file_name).name for s in sources.values())
        assert not said or str(path) in said
    # Without shards, another name or a larger number are possible.
    assert accepted < 0.1 * len(variants)


@pytest.mark.parametrize('content', ['', '{', '\xff', '[' * 100_000])
def test_a_file_of_sources_that_is_no_json_is_named(tmp_path, content):
    path = tmp_path / 'sources.json'
    path.write_bytes(content.encode('latin-1'))
    with pytest.raises(ValueError, match=str(path)):
        imagenet_archives.read_sources(path)


@pytest.mark.parametrize('size', [-tarfile.BLOCKSIZE, -1, 10**15])
def test_a_member_of_an_impossible_size_is_named(size):
    """A negative size leads back to the header, again and again."""
    info, _ = member(NAME)
    info.size = size
    content = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * tarfile.BLOCKSIZE))
    with pytest.raises(ValueError, match=rf'{NAME} in odd.tar has {size:,} bytes'):
        list(files.tar_members(content, 'odd.tar', 100))
    with pytest.raises(ValueError, match=r'odd.tar (has|is truncated)'):
        list(files.tar_members(content, 'odd.tar', 10**16))


def test_a_tar_of_too_many_files_is_named(monkeypatch):
    monkeypatch.setattr(files, 'MAX_MEMBERS', 3)
    content = io.BytesIO(tar([member(str(i), b'') for i in range(4)]))
    with pytest.raises(ValueError, match=r'many.tar has more than 3 files'):
        list(files.tar_members(content, 'many.tar', 100))
