# SPDX-License-Identifier: Apache-2.0
"""The two archives of ILSVRC2012: what they are, where each image lies in them, and its label.

`ILSVRC2012_img_train.tar` is a tar of one tar per class, `ILSVRC2012_img_val.tar` a tar of images.
One pass over their headers makes an index of the images' offsets; nothing is unpacked. Labels,
class names and the list of files to re-encode are those that TFDS carries.
"""

import dataclasses
import functools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

from data_preparation.archives import Archive, download, progress
from image_preprocessing import decode

NAME, VERSION = 'imagenet2012', '5.1.0'
INDEX_ENTRY = np.dtype([('offset', 'i8'), ('size', 'i4'), ('label', 'i2'), ('name', 'S32')])


@dataclasses.dataclass(frozen=True)
class Source:
    """A split's archive and what is known of it; `shards` is TFDS's choice where it is None."""

    archive: Archive
    examples: int
    shards: int | None = None


OFFICIAL = {
    'train': Source(
        Archive(
            'ILSVRC2012_img_train.tar',
            147_897_477_120,
            'b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb',
        ),
        1_281_167,
    ),
    'validation': Source(
        Archive(
            'ILSVRC2012_img_val.tar',
            6_744_924_160,
            'c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0',
        ),
        50_000,
    ),
}


def read_sources(path: Path) -> dict[str, Source]:
    """Reads what is known of other archives of the same structure, for rehearsals, from JSON.

    The file has {split: {file_name, size, sha256, examples, shards}}, `shards` optional.
    """
    sources = {}
    for split, values in json.loads(path.read_text()).items():
        archive = Archive(values['file_name'], values['size'], values['sha256'])
        sources[split] = Source(archive, values['examples'], values.get('shards'))
    return sources


def fetch(url: str, archives_dir: Path, sources: dict[str, Source]) -> None:
    """Downloads from the folder `url` the archives that `archives_dir` does not have.

    A server that wants a name and a password gets those of the environment variables
    IMAGENET_USER and IMAGENET_PASSWORD.
    """
    user, password = (os.environ.get(f'IMAGENET_{v}', '') for v in ('USER', 'PASSWORD'))
    for source in sources.values():
        archive = source.archive
        path = archives_dir / archive.file_name
        if not path.exists():
            download(f'{url.rstrip("/")}/{path.name}', path, archive.size, user, password)


@functools.cache
def features() -> tfds.features.FeaturesDict:
    """The features of TFDS's `imagenet2012`: file_name, image and label."""
    return tfds.builder(NAME, data_dir='/nonexistent', file_format='array_record').info.features


@functools.cache
def _validation_labels() -> list[str]:
    """The class of each validation image, in the order of their numbers."""
    path = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
    return path.read_text().split()


def _class_of(split: str, name: str, inner_tar: str) -> str:
    """The class ('n01440764') of an image, from the tar it lies in or from its number."""
    if split == 'train':
        return Path(inner_tar).stem
    return _validation_labels()[int(Path(name).stem.rsplit('_', 1)[1]) - 1]


def _members(split: str, path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields (image's name, inner tar's name, offset in the archive, size) from the tar headers."""
    with tarfile.open(path, 'r:') as outer:
        for member in outer:
            outer.members = []  # type: ignore[attr-defined]  # or it would keep a million
            if split != 'train':
                yield member.name, '', member.offset_data, member.size
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as inner:
                for image in inner:
                    inner.members = []  # type: ignore[attr-defined]
                    offset = member.offset_data + image.offset_data
                    yield image.name, member.name, offset, image.size


def index(split: str, path: Path, source: Source, work: Path) -> list[np.ndarray]:
    """Where each shard's images are: one array of INDEX_ENTRY for each shard, in TFDS's order."""
    cache = work / f'{split}.index.npy'
    if not cache.exists():
        to_index = features()['label'].str2int
        entries = []
        try:
            bar = progress(f'indexing {path.name}', source.examples, ' images')
            for name, inner_tar, offset, size in _members(split, path):
                bar.update()
                name = Path(name).name
                entries.append(
                    (offset, size, to_index(_class_of(split, name, inner_tar)), name.encode())
                )
        except (tarfile.TarError, KeyError, IndexError) as error:
            raise ValueError(f'{path} has not the structure of ILSVRC2012: {error!r}') from error
        if len(entries) != source.examples:
            raise ValueError(f'{path} has {len(entries):,} images, not {source.examples:,}')
        # TFDS orders the examples of a split by a hash of their names.
        hasher = hashing.Hasher(split)
        entries.sort(key=lambda entry: hasher.hash_key(entry[3]))
        temporary = cache.with_suffix('.part')
        with temporary.open('wb') as file:
            np.save(file, np.array(entries, INDEX_ENTRY))
        os.replace(temporary, cache)
    index = np.load(cache)
    shards = shard_utils.ShardConfig(num_shards=source.shards).get_number_shards(
        int(index['size'].sum(dtype=np.int64)), len(index)
    )
    return np.split(index, shard_utils.get_shard_boundaries(len(index), shards)[:-1])


def repair(name: str, encoded: bytes) -> bytes:
    """Re-encodes the 22 CMYK files and the PNG among the training images; the rest stays as it is.

    As TFDS does it with TensorFlow, to the byte: RGB, JPEG quality 100, halved chroma, 300 dpi.
    """
    if name in imagenet2012_dataset_builder.CMYK_IMAGES:
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
