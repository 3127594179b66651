# SPDX-License-Identifier: Apache-2.0
"""What all preparations share: whether a dataset is there, and how TFDS writes a small one."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from settings.errors import DatasetError
from workloads.resnet.records import command

# Of each split: (key that TFDS orders by, identifier, encoded image, label).
Splits = Mapping[str, Iterable[tuple[int | str, str, bytes, int]]]


def prepare_again(name: str, data_dir: Path, directory: Path) -> str:
    """The command that replaces a prepared dataset, as it can be pasted into a shell."""
    remove = shlex.join(['rm', '-r', str(directory.absolute())])
    return f'{remove} && {command("download_dataset.sh", name, data_dir)}'


def is_prepared(name: str, data_dir: Path, version: str) -> bool:
    """Whether `data_dir`/`name`/`version` has a dataset; `verify` says whether it is whole.

    Raises:
        DatasetError: there is something else.
    """
    directory = data_dir / name / version
    if not directory.exists():
        return False
    if not (directory / 'dataset_info.json').exists():
        raise DatasetError(
            f'{directory} is not a prepared dataset: it has no dataset_info.json. To replace it: '
            f'{prepare_again(name, data_dir, directory)}'
        )
    return True


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's builder; it takes encoded bytes, so TensorFlow is not needed."""

    def __init__(self, name: str, version: str, splits: Splits, facts: dict, data_dir: Path):
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._splits, self._facts = splits, facts
        super().__init__(data_dir=data_dir, file_format='array_record')

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, **self._facts)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        for key, name, image, label in self._splits[split]:
            yield key, {'id': name, 'image': image, 'label': label}


def prepare(
    name: str,
    version: str,
    data_dir: Path,
    read: Callable[[], Splits],
    image: tfds.features.Image,
    label: tfds.features.ClassLabel,
    **about: str,
) -> Path:
    """Writes `data_dir`/`name`/`version` and returns it; returns at once when it is there.

    TFDS writes into a folder of another name and renames it at the end, so that a folder of the
    right name is complete. `read` is called when the examples are needed; `image` and `label` are
    their features beside `id`; `about` has a description and a homepage.

    Raises:
        DatasetError: there is something else.
        OSError: the disk is full, or the folder cannot be written to.
    """
    directory = data_dir / name / version
    if is_prepared(name, data_dir, version):
        return directory
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({'id': text, 'image': image, 'label': label})
    facts = {'features': features, 'supervised_keys': ('image', 'label'), **about}
    splits = read()
    tfds.disable_progress_bar()
    try:
        _Builder(name, version, splits, facts, data_dir).download_and_prepare()
    except RuntimeError as error:  # ArrayRecord's, for any failure to write
        raise OSError(f'{directory} cannot be written: {error}') from error
    return directory
