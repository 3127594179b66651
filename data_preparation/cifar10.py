# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 as TFDS's `cifar10` 3.0.2 in ArrayRecord format, without TensorFlow.

In: the authors' binary archive, fetched from where TFDS fetches it; or, where that is out of reach,
a folder `train|test/CLASS/*.jpg`, or a tar of one. Out: `DATA_DIR/cifar10/3.0.2` with the features
`id`, `image` and `label`. From the archive images become PNGs, with the identifiers and order that
TFDS gives them. JPEGs from a folder are kept byte for byte, so those pixels are not quite
CIFAR-10's; the image feature's encoding tells the two apart.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_preparation import dataset, files
from data_preparation.archives import Archive, check, download
from workloads.resnet.image_decoding import decode

URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
ARCHIVE = Archive(
    'cifar-10-binary.tar.gz',
    170_052_171,
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
)
LABELS = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
# A record of the binary archive: the label, then 32×32 red, green and blue values.
RECORD_BYTES = 1 + 3 * 32 * 32
EXAMPLES = {'train': 50_000, 'test': 10_000}
# The authors' archive has 184 MB inside, a tar of 60,000 JPEGs 93 MB.
MAX_TAR_BYTES = 1 << 29
MAX_IMAGE_BYTES = 1 << 16


def prepare(data_dir: Path, source: Path | None = None) -> Path:
    """Writes `data_dir/cifar10/3.0.2` and returns it; returns at once when it is there.

    `source` is a folder train|test/CLASS/*.jpg or a tar of one; None for the download. Raises as
    `dataset.prepare`, `archives.download` and `read_jpegs`.
    """

    def read() -> dict[str, list]:
        if source is not None:
            return read_jpegs(source)
        archive = data_dir / 'downloads' / ARCHIVE.file_name
        if not archive.exists():
            download(URL, archive, ARCHIVE.size)
        check(archive, ARCHIVE, archive.with_name('checked.json'))
        return read_binary(archive)

    return dataset.prepare(
        'cifar10',
        '3.0.2',
        data_dir,
        read,
        tfds.features.Image(shape=(32, 32, 3), encoding_format='jpeg' if source else 'png'),
        tfds.features.ClassLabel(names=LABELS),
        description='50,000 training and 10,000 test images of 32x32 pixels in 10 classes.',
        homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    )


def read_binary(archive: Path) -> dict[str, list]:
    """The examples of each split in the authors' archive, images as PNG; raises as `read_jpegs`."""
    tar = files.decompress(archive, MAX_TAR_BYTES)
    batches = {
        member.path: member.content.read()
        for member in files.tar_members(tar, str(archive), MAX_TAR_BYTES)
        if member.path.endswith('.bin')
    }
    splits: dict[str, list] = {'train': [], 'test': []}
    # TFDS numbers the training images over the files in the order of their names.
    for path, content in sorted(batches.items()):
        records = np.frombuffer(content, np.uint8)
        if len(records) % RECORD_BYTES or (records[::RECORD_BYTES] >= len(LABELS)).any():
            raise ValueError(f'{path} in {archive} is not a batch of CIFAR-10 records')
        split = 'test' if 'test' in PurePosixPath(path).name else 'train'
        for record in records.reshape(-1, RECORD_BYTES):
            number = len(splits[split])
            bgr = record[1:].reshape(3, 32, 32)[::-1].transpose(1, 2, 0)
            png = cv2.imencode('.png', np.ascontiguousarray(bgr))[1].tobytes()
            splits[split].append((number, f'{split}_{number:05d}', png, int(record[0])))
    return splits


def read_jpegs(source: Path) -> dict[str, list]:
    """The examples of each split in a folder train|test/CLASS/*.jpg or in a tar of one.

    Raises:
        FileNotFoundError: `source` is missing or has no such files.
        ValueError: it is damaged, or a file in it is in another place, is there twice, or is not a
            JPEG of 32×32 pixels; the text names it.
    """
    splits: dict[str, dict] = {'train': {}, 'test': {}}
    for path, content in _files(source):
        where = f'{path} in {source}'
        parts = PurePosixPath(path).parts[-3:]
        if len(parts) < 3 or parts[0] not in splits or parts[1] not in LABELS:
            raise ValueError(f'{where} is not {{train,test}}/CLASS/NAME.jpg with a CIFAR-10 class')
        split, label, name = parts
        identifier = f'{split}/{label}/{PurePosixPath(name).stem}'
        if identifier in splits[split]:
            raise ValueError(f'{source} has more than one {identifier}.jpg; the second is {path}')
        if len(splits[split]) == EXAMPLES[split]:
            raise ValueError(f'{source} has more than {EXAMPLES[split]:,} images in {split}')
        try:
            height, width, _ = decode(content).shape
        except ValueError as error:
            raise ValueError(f'{where} is damaged: {error}') from error
        if content[:2] != b'\xff\xd8' or (height, width) != (32, 32):
            raise ValueError(f'{where} is not a JPEG of 32x32 pixels')
        splits[split][identifier] = (identifier, identifier, content, LABELS.index(label))
    if not all(splits.values()):
        raise FileNotFoundError(f'{source} has no train/CLASS/*.jpg and test/CLASS/*.jpg')
    return {split: list(found.values()) for split, found in splits.items()}


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (path within `source`, content) of its JPEGs."""
    if source.is_dir():
        for path in source.glob('*/*/*.jpg'):
            if not path.name.isprintable():
                raise ValueError(f'{str(path)!r} has an unusable name')
            files.check_regular(path, MAX_IMAGE_BYTES)
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    tar = files.decompress(source, MAX_TAR_BYTES)
    for member in files.tar_members(tar, str(source), MAX_IMAGE_BYTES):
        if member.path.endswith('.jpg'):
            yield member.path, member.content.read()
