# SPDX-License-Identifier: Apache-2.0
"""What all preparations share: whether a dataset is there, how TFDS writes it, and remedies."""

import shlex
from pathlib import Path

import tensorflow_datasets as tfds

from workloads.resnet.records import DatasetError

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'


def prepare_again(name: str, data_dir: Path, directory: Path) -> str:
    """The command that replaces a prepared dataset, as it can be pasted into a shell."""
    script = SCRIPTS / 'download_dataset.sh'
    remove, prepare = ['rm', '-r', directory], [script, name, data_dir]
    return ' && '.join(shlex.join(str(part) for part in command) for command in (remove, prepare))


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
            f'{prepare_again(name, data_dir.absolute(), directory.absolute())}'
        )
    return True


def write(builder: tfds.core.DatasetBuilder) -> Path:
    """Prepares a dataset with its TFDS builder and returns its folder.

    TFDS writes into a folder of another name and renames it at the end, so that a folder of the
    right name is complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except RuntimeError as error:  # ArrayRecord's, for any failure to write
        raise OSError(f'{builder.data_dir} cannot be written: {error}') from error
    return Path(builder.data_dir)
