# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 as TFDS's `cifar10` 3.0.2 in ArrayRecord format, without TensorFlow.

In: the authors' binary archive, fetched from where TFDS fetches it; or, where that is out of reach,
a folder `train|test/CLASS/*.jpg`, or a tar of one. Out: `DATA_DIR/cifar10/3.0.2` with the features
`id`, `image` and `label`. From the archive images become PNGs, with the identifiers and order that
TFDS gives them. JPEGs from a folder are kept byte for byte, so those pixels are not quite
CIFAR-10's; the image feature's encoding tells the two apart.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_preparation.archives import Archive, check, download

URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
ARCHIVE = Archive(
    'cifar-10-binary.tar.gz',
    170_052_171,
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
)
LABELS = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
# A record of the binary archive: the label, then 32×32 red, green and blue values.
RECORD_BYTES = 1 + 3 * 32 * 32

# Of a split: (key that TFDS orders by, identifier, label, encoded image).
Examples = Iterable[tuple[int | str, str, str, bytes]]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The TFDS builder; it hands over encoded bytes, so TensorFlow is not needed."""

    name = 'cifar10'
    VERSION = tfds.core.Version('3.0.2')

    def __init__(self, *, examples: Callable[[str], Examples], encoding: str, **kwargs):
        self._examples, self._encoding = examples, encoding
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(32, 32, 3), encoding_format=self._encoding)
        return tfds.core.DatasetInfo(
            builder=self,
            description='50,000 training and 10,000 test images of 32x32 pixels in 10 classes.',
            homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
            features=tfds.features.FeaturesDict({
                'id': tfds.features.Text(),
                'image': image,
                'label': tfds.features.ClassLabel(names=LABELS),
            }),
            supervised_keys=('image', 'label'),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ('train', 'test')}

    def _generate_examples(self, split: str):
        for key, name, label, image in self._examples(split):
            yield key, {'id': name, 'image': image, 'label': label}


def prepare(data_dir: Path, source: Path | None = None) -> Path:
    """Writes `data_dir/cifar10/3.0.2` and returns it; returns at once when it is there.

    Args:
        data_dir: the root of all data.
        source: a folder train|test/CLASS/*.jpg or a tar of one; None for the download.

    Raises:
        FileNotFoundError: `source` is missing, or has no such images.
        ValueError: the download fails or is damaged.
    """
    final = data_dir / Builder.name / str(Builder.VERSION)
    if final.exists():
        return final
    if source is None:
        archive = data_dir / 'downloads' / ARCHIVE.file_name
        if not archive.exists():
            download(URL, archive, ARCHIVE.size)
        check(archive, ARCHIVE, archive.with_name('checked.json'))
        examples, encoding = read_binary(archive), 'png'
    else:
        examples, encoding = read_jpegs(source), 'jpeg'
    builder = Builder(
        examples=lambda split: examples[split],
        encoding=encoding,
        data_dir=data_dir,
        file_format='array_record',
    )
    builder.download_and_prepare()
    return final


def read_binary(archive: Path) -> dict[str, list]:
    """The examples of each split in the authors' archive, images as PNG."""
    splits: dict[str, list] = {'train': [], 'test': []}
    with tarfile.open(archive) as tar:
        # TFDS numbers the training images over the files in the order of their names.
        for member in sorted(tar, key=lambda m: m.name):
            if not member.name.endswith('.bin'):
                continue
            split = 'test' if 'test' in PurePosixPath(member.name).name else 'train'
            content = np.frombuffer(_content(tar, member), np.uint8)
            for record in content.reshape(-1, RECORD_BYTES):
                number = len(splits[split])
                rgb = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                png = cv2.imencode('.png', np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes()
                splits[split].append((number, f'{split}_{number:05d}', LABELS[record[0]], png))
    return splits


def read_jpegs(source: Path) -> dict[str, list]:
    """The examples of each split in a folder train|test/CLASS/*.jpg or in a tar of one."""
    splits: dict[str, list] = {'train': [], 'test': []}
    for path, content in sorted(_files(source)):
        *_, split, label, name = PurePosixPath(path).parts
        if split not in splits or label not in LABELS:
            raise ValueError(f'{path} in {source} is not {{train,test}}/CLASS/NAME.jpg')
        identifier = f'{split}/{label}/{PurePosixPath(name).stem}'
        splits[split].append((identifier, identifier, label, content))
    if not all(splits.values()):
        raise FileNotFoundError(f'{source} has no train/CLASS/*.jpg and test/CLASS/*.jpg')
    return splits


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (path within `source`, content) of its JPEGs."""
    if source.is_dir():
        for path in source.glob('*/*/*.jpg'):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    if not source.exists():
        raise FileNotFoundError(f'{source} is missing')
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                if member.name.endswith('.jpg'):
                    yield member.name, _content(tar, member)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f'{source} is damaged: {error}') from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f'{member.name} in {tar.name!s} is no file')
    return file.read()
