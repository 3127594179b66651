# SPDX-License-Identifier: Apache-2.0
"""The two archives of ILSVRC2012: what they are, where each image lies in them, and its label.

`ILSVRC2012_img_train.tar` is a tar of one tar per class, `ILSVRC2012_img_val.tar` a tar of images.
One pass over their headers makes an index of the images' offsets; nothing is unpacked. Labels,
class names and the list of files to re-encode are those that TFDS carries.
"""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

from data_preparation import files
from data_preparation.archives import Archive, download
from data_preparation.progress import progress
from workloads.resnet.image_decoding import decode, find_frame

NAME, VERSION = 'imagenet2012', '5.1.0'
INDEX_ENTRY = np.dtype([('offset', 'i8'), ('size', 'i4'), ('label', 'i2'), ('name', 'S32')])
MAX_IMAGE_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Source(Archive):
    """A split's archive and what is known of it; `shards` is TFDS's choice where it is None."""

    examples: int
    shards: int | None = None


OFFICIAL = {
    'train': Source(
        'ILSVRC2012_img_train.tar',
        147_897_477_120,
        'b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb',
        1_281_167,
    ),
    'validation': Source(
        'ILSVRC2012_img_val.tar',
        6_744_924_160,
        'c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0',
        50_000,
    ),
}
# Of each field of another source: its type, a pattern of its text, and that in words.
_COUNT = (int, '[1-9][0-9]*', 'an integer above 0')
_FORM: dict[str, tuple[type, str, str]] = {
    'file_name': (str, r'\w[\w.-]*', 'letters, digits, . - and _'),
    'size': _COUNT,
    'sha256': (str, '[0-9a-f]{64}', '64 digits of 0-9a-f'),
    'examples': _COUNT,
    'shards': _COUNT,
}


def read_sources(path: Path) -> dict[str, Source]:
    """Reads what is known of other archives of the same structure, for rehearsals, from JSON.

    The file has {split: {file_name, size, sha256, examples, shards}} for the splits of `OFFICIAL`;
    `shards` is optional. ValueError names the field that is of another form.
    """
    content = files.read_json(path)
    if content.keys() != OFFICIAL.keys():
        raise ValueError(f'{path} must have an object with the keys {", ".join(OFFICIAL)}')
    return {split: _source(f'{path}: {split}', values) for split, values in content.items()}


def _source(where: str, values: Any) -> Source:
    """Checks the form of one split of a file of sources."""
    if not isinstance(values, dict) or {*values, 'shards'} != _FORM.keys():
        raise ValueError(
            f'{where} must be an object with {", ".join(_FORM)} (the last is optional)'
        )
    for field, value in values.items():
        kind, pattern, words = _FORM[field]
        if type(value) is not kind or not re.fullmatch(pattern, str(value)):
            raise ValueError(f'{where}: {field} is {value!r}; it must be {words}')
    if values.get('shards', 1) > values['examples']:
        raise ValueError(f'{where}: shards is {values["shards"]}; it must be at most examples')
    return Source(**values)


def fetch(url: str, archives_dir: Path, sources: dict[str, Source]) -> None:
    """Downloads from the folder `url` the archives that `archives_dir` does not have.

    A server that asks for a name and a password gets those of the environment variables
    IMAGENET_USER and IMAGENET_PASSWORD. Raises as `download`.
    """
    if '@' in url.partition('//')[2].partition('/')[0]:
        raise ValueError(
            'the URL must not have a user name and password in it; put them into the environment '
            'variables IMAGENET_USER and IMAGENET_PASSWORD'
        )
    user, password = (os.environ.get(f'IMAGENET_{v}', '') for v in ('USER', 'PASSWORD'))
    for source in sources.values():
        path = archives_dir / source.file_name
        if not path.exists():
            download(f'{url.rstrip("/")}/{path.name}', path, source.size, user, password)


@functools.cache
def features() -> tfds.features.FeaturesDict:
    """The features of TFDS's `imagenet2012`: file_name, image and label."""
    return tfds.builder(NAME, data_dir='/nonexistent', file_format='array_record').info.features


@functools.cache
def _validation_classes() -> list[str]:
    """The class ('n01440764') of each validation image, in the order of their numbers."""
    path = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
    return path.read_text().split()


def _label(split: str, name: str, inner_tar: str) -> int:
    """The label of an image, from the tar it lies in or from its number; ValueError if unknown."""
    synset = Path(inner_tar).stem
    if split != 'train':
        number = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', name)
        classes = _validation_classes()
        if not number or not 1 <= int(number[1]) <= len(classes):
            raise ValueError(f'{name} is not a name of a validation image')
        synset = classes[int(number[1]) - 1]
    try:
        return features()['label'].str2int(synset)
    except KeyError:
        raise ValueError(f'{synset} is not a class of ILSVRC2012') from None


def _members(split: str, path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields (image's name, inner tar's name, offset in the archive, size) from the tar headers."""
    with path.open('rb') as archive:
        if split != 'train':
            for image in files.tar_members(archive, str(path), MAX_IMAGE_BYTES):
                yield Path(image.path).name, '', image.offset, image.size
            return
        for member in files.tar_members(archive, str(path), path.stat().st_size):
            where = f'{member.path} in {path}'
            for image in files.tar_members(member.content, where, MAX_IMAGE_BYTES):
                yield Path(image.path).name, member.path, member.offset + image.offset, image.size


def index(split: str, path: Path, source: Source, work: Path) -> list[np.ndarray]:
    """Where each shard's images are: one array of INDEX_ENTRY for each shard, in TFDS's order.

    It is kept in `work`, because reading all headers again can take long. ValueError names a member
    that ILSVRC2012's archives do not have.
    """
    cache = work / f'{split}.index.npy'
    if not cache.exists():
        entries = np.array(_entries(split, path, source), INDEX_ENTRY)
        temporary = cache.with_suffix('.part')
        with temporary.open('wb') as file:
            np.save(file, entries)
        os.replace(temporary, cache)
    try:
        index = np.load(cache)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{cache} is damaged. {files.remedy(cache)}') from error
    shards = shard_utils.ShardConfig(num_shards=source.shards).get_number_shards(
        int(index['size'].sum(dtype=np.int64)), len(index)
    )
    return np.split(index, shard_utils.get_shard_boundaries(len(index), shards)[:-1])


def _entries(split: str, path: Path, source: Source) -> list[tuple[int, int, int, bytes]]:
    """The images of an archive as tuples of INDEX_ENTRY, in TFDS's order."""
    entries = []
    bar = progress(f'indexing {path.name}', source.examples, ' images')
    for name, inner_tar, offset, size in _members(split, path):
        bar.update()
        try:
            if len(name.encode()) > INDEX_ENTRY['name'].itemsize:
                raise ValueError(f'{name} is too long')
            entries.append((offset, size, _label(split, name, inner_tar), name.encode()))
        except ValueError as error:
            raise ValueError(f'{path} has not the structure of ILSVRC2012: {error}') from error
        if len(entries) > source.examples:
            raise ValueError(f'{path} has more than {source.examples:,} images')
    if len(entries) != source.examples:
        raise ValueError(f'{path} has {len(entries):,} images, not {source.examples:,}')
    most, count = Counter(name for *_, name in entries).most_common(1)[0]
    if count > 1:
        raise ValueError(f'{path} has {most.decode()} twice')
    # TFDS orders the examples of a split by a hash of their names.
    hasher = hashing.Hasher(split)
    return sorted(entries, key=lambda entry: hasher.hash_key(entry[3]))


def repair(name: str, encoded: bytes) -> bytes:
    """Re-encodes the 22 CMYK files and the PNG among the training images; the rest stays as it is.

    As TFDS does it with TensorFlow, to the byte: RGB, JPEG quality 100, halved chroma, 300 dpi.
    ValueError if it is to be re-encoded and cannot be decoded.
    """
    if name in imagenet2012_dataset_builder.CMYK_IMAGES:
        find_frame(encoded)  # It checks the size.
        # Adobe's CMYK is stored inverted, so that the product with black is the colour.
        cmyk = simplejpeg.decode_jpeg(encoded, 'CMYK', fastdct=True).astype(np.uint16)
        rgb = (cmyk[..., :3] * cmyk[..., 3:] // 255).astype(np.uint8)
    elif name in imagenet2012_dataset_builder.PNG_IMAGES:
        rgb = decode(encoded)
    else:
        return encoded
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=100, colorsubsampling='420')
    resolution = b'\1' + 2 * (300).to_bytes(2, 'big')  # in the JFIF header; the encoder says none
    return jpeg[:13] + resolution + jpeg[18:]
