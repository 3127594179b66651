# SPDX-License-Identifier: Apache-2.0
"""Small archives of the structure of ILSVRC2012's two, and the check of what is made of them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from data_preparation.imagenet_archives import Source, read_sources
from data_preparation.verify import verify

CLASSES = ('n01440764', 'n01443537', 'n02123045')
CMYK_NAME, PNG_NAME = 'n01739381_1309.JPEG', 'n02105855_2933.JPEG'


def synthetic_jpeg(seed: int, height: int = 40, width: int = 60) -> bytes:
    """A JPEG of smooth noise; another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(image, quality=90, colorsubsampling='420')


def cmyk_jpeg() -> bytes:
    """A JPEG of the kind that 22 training files are: four channels, inverted, Adobe's marker."""
    cmyk = np.random.default_rng(7).integers(0, 256, (5, 6, 4), np.uint8)
    cmyk = cv2.resize(cmyk, (48, 40), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(cmyk, quality=95, colorspace='CMYK', colorsubsampling='444')


def png() -> bytes:
    """A PNG of the size of a small photograph."""
    noise = np.random.default_rng(8).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.imencode('.png', cv2.resize(noise, (48, 40)))[1].tobytes()


def write_archives(
    folder: Path, train: Mapping[str, bytes], validation: Mapping[str, bytes], shards: int
) -> Path:
    """Writes the two archives and the JSON file of what is known of them, and returns the latter.

    Args:
        folder: where they go.
        train: encoded images by name; a name starts with its class, 'n01440764_'.
        validation: encoded images by name, 'ILSVRC2012_val_00000001.JPEG' on.
        shards: how many the training set is to be cut into; the validation set gets 2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes: dict[str, dict[str, bytes]] = {}
    for name, content in train.items():
        classes.setdefault(name.split('_')[0], {})[name] = content
    contents = {
        'train': _tar({f'{synset}.tar': _tar(images) for synset, images in classes.items()}),
        'validation': _tar(validation),
    }
    sources = {}
    for split, stem, examples, count in (
        ('train', 'train', len(train), shards),
        ('validation', 'val', len(validation), 2),
    ):
        file_name = f'ILSVRC2012_img_{stem}.tar'
        (folder / file_name).write_bytes(contents[split])
        sources[split] = {
            'file_name': file_name,
            'size': len(contents[split]),
            'sha256': hashlib.sha256(contents[split]).hexdigest(),
            'examples': examples,
            'shards': count,
        }
    path = folder / 'sources.json'
    path.write_text(json.dumps(sources))
    return path


def small_sources(folder: Path) -> dict[str, Source]:
    """Writes archives of 32 training and 6 validation images, and returns what is known of them."""
    train = {
        f'{c}_{i}.JPEG': synthetic_jpeg(10 * i + k)
        for i in range(10)
        for k, c in enumerate(CLASSES)
    }
    train |= {CMYK_NAME: cmyk_jpeg(), PNG_NAME: png()}
    validation = {f'ILSVRC2012_val_{i:08d}.JPEG': synthetic_jpeg(100 + i) for i in range(1, 7)}
    return read_sources(write_archives(folder, train, validation, shards=4))


def _tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def check(tmp_path: Path, full: bool = False) -> str:
    """Verifies what `prepare` wrote; the published manifest is of the real ImageNet."""
    local = tmp_path / 'expected.json'
    if not local.exists():
        written = tmp_path / 'data/imagenet2012/5.1.0/manifest.json'
        local.write_text(written.read_text())
    return verify('imagenet2012', tmp_path / 'data', full=full, manifest_file=local, workers=2)
