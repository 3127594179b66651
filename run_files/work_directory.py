# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its configuration, its environment, and the guard that one run owns it.

config.json       the resolved configuration with the seed; --config=…/config.json repeats the run
environment.json  versions, machine, devices, code and data that the run used
mlperf.log, metrics.jsonl, tensorboard/, checkpoints/, profile/
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from run_files import machine
from settings import hyperparameters, loading
from settings.errors import RejectedError, SaveError
from settings.hyperparameters import Config
from settings.plan import Dataset

_FILES = ('lock', 'config.json', 'environment.json', 'mlperf.log', 'metrics.jsonl')
_FOLDERS = ('tensorboard', 'checkpoints', 'profile')
_ALONE = ('lock', 'config.part')  # What a start that was killed may leave of a new run.
_REMEDY = 'put it back as it was, or start in a new work directory (--workdir)'
# What is recorded with a run: the packages that this file names, and others that decide results.
_REQUIREMENTS = Path(__file__).resolve().parents[1] / 'requirements.in'
_ALSO = ('jax', 'jaxlib', 'numpy')


class WorkDirectoryError(RejectedError):
    """A work directory that this run must not or cannot use; the text says what to do."""


def _write(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    temporary = path.with_suffix('.part')
    try:
        temporary.write_text(json.dumps(value, indent=2) + '\n')
        temporary.replace(path)
    except OSError as error:
        raise WorkDirectoryError(f'{path} cannot be written ({error.strerror})') from error


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return loading.read_object(path)
    except ValueError as error:
        raise WorkDirectoryError(f'{error}; {remedy}') from error


def open_for(config: Config, dataset: Dataset, path: Path) -> int | None:
    """Claims `path` for a run of `config`, new or to be resumed; called by process 0.

    Nothing but the file `lock` is written, and that only where a run is or may begin.

    Returns:
      The seed of the run that is to be resumed, if there is one.

    Raises:
      WorkDirectoryError: it is not writable, in use, damaged, or holds a run of another
        configuration or on other data.
    """
    if '[' in str(path.resolve()):
        raise WorkDirectoryError(
            f'the work directory {path} has a "[" in its path, where Orbax writes checkpoints that '
            'cannot be read again; choose another with --workdir'
        )
    try:
        _check_entries(path)
        path.mkdir(parents=True, exist_ok=True)
        # Held, and released by the system, for as long as the process lives.
        lock = os.open(path / 'lock', os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkDirectoryError(
            f'another run is using the work directory {path}; wait for it or choose another with '
            '--workdir'
        ) from None
    except OSError as error:
        raise WorkDirectoryError(
            f'the work directory {path} cannot be written ({error.strerror}); choose another with '
            '--workdir'
        ) from error
    recorded = path / 'config.json'
    if not recorded.exists():
        return None
    theirs = _read(recorded, _REMEDY)
    seed = theirs.get('seed')
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise WorkDirectoryError(
            f'{recorded} is damaged: "seed" is {json.dumps(seed)}, not a whole number in '
            f'[0, 2^63); {_REMEDY}'
        )
    ours = config if config.seed is not None else dataclasses.replace(config, seed=seed)
    differences = hyperparameters.differences(ours, theirs, also_logged=True)
    if differences:
        raise WorkDirectoryError(
            f'the work directory {path} holds a run of another configuration '
            f'({"; ".join(differences)}); nothing was changed. Choose another with --workdir, or '
            f'resume that run: {shlex.join([f"--config={recorded}", f"--workdir={path}"])}'
        )
    _earlier(path / 'environment.json', _data(dataset))
    return seed


def _check_entries(path: Path) -> None:
    """Checks the kind of every file and folder that a run has, and that there are no others."""
    if not path.exists():
        return
    there = [entry.name for entry in path.iterdir()]
    unexpected = [] if 'config.json' in there else sorted({*there} - {*_ALONE})
    if unexpected:
        raise WorkDirectoryError(
            f'the work directory {path} is not empty and holds no run: there is {unexpected[0]}, '
            'and no config.json; choose another with --workdir'
        )
    for name in _FILES:
        if name in there and not (path / name).is_file():
            raise WorkDirectoryError(f'{path / name} is not a regular file; {_REMEDY}')
        if name in there and not os.access(path / name, os.R_OK | os.W_OK):
            raise WorkDirectoryError(f'{path / name} cannot be read and written; change its mode')
    for name in _FOLDERS:
        if name in there and not (path / name).is_dir():
            raise WorkDirectoryError(f'{path / name} is not a folder; {_REMEDY}')


def _earlier(path: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments that are recorded of this run, oldest first.

    Raises:
      WorkDirectoryError: they cannot be read, or the run has been trained on other data.
    """
    if not path.exists():
        return []
    remedy = 'remove it: it is written again, without what it had of earlier starts'
    last = _read(path, remedy)
    earlier, recorded = last.pop('earlier', []), last.get('dataset')
    if not isinstance(earlier, list) or not isinstance(recorded, dict):
        raise WorkDirectoryError(f'{path} is damaged: it names no data set; {remedy}')
    if not isinstance(last.get('starts', 1), int):
        raise WorkDirectoryError(f'{path} is damaged: "starts" is no number; {remedy}')
    theirs, ours = recorded.get('digest'), data['digest']
    if theirs and ours and theirs != ours:
        raise WorkDirectoryError(
            f'{path.parent} holds a run on other data: their digest is {theirs}, now it is {ours}; '
            'choose another with --workdir, or bring the data back'
        )
    return [*earlier, last]


def _data(dataset: Dataset) -> dict[str, Any]:
    return {name: getattr(dataset, name) for name in ('name', 'num_train', 'num_eval', 'digest')}


def _commit() -> str:
    """The commit of this code: Git's word, or in a container that of the environment."""
    root = Path(__file__).resolve().parent.parent
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get('COMMIT', 'unknown')


def _versions() -> dict[str, str]:
    names = re.findall(r'^[\w-]+', _REQUIREMENTS.read_text(), re.MULTILINE)
    return {name: importlib.metadata.version(name) for name in (*names, *_ALSO)}


def record(config: Config, dataset: Dataset, path: Path) -> None:
    """Writes config.json and environment.json, which counts the starts and keeps earlier ones.

    Raises:
      WorkDirectoryError: the run has been trained on other data.
    """
    devices = jax.devices()
    now = {
        'versions': _versions(),
        'python': platform.python_version(),
        'system': platform.platform(),
        'devices': len(devices),
        'device_kind': devices[0].device_kind,
        'processes': jax.process_count(),
        'commit': _commit(),
        'machine': machine.describe(),
        'dataset': _data(dataset),
    }
    earlier = _earlier(path / 'environment.json', _data(dataset))
    starts = 1 + (earlier[-1].pop('starts', 1) if earlier else 0)
    earlier = [start for start in earlier if start != now]
    _write(path / 'config.json', dataclasses.asdict(config))
    more = {'starts': starts} | ({'earlier': earlier} if earlier else {})
    _write(path / 'environment.json', now | more)


def check_still_there(path: Path) -> None:
    """Checks that nobody has removed what `record` wrote.

    Raises:
      SaveError: naming what is missing.
    """
    gone = [name for name in ('config.json', 'environment.json') if not (path / name).is_file()]
    if gone:
        raise SaveError(
            f'{path} has lost {" and ".join(gone)} while the run was using it; put it back as it '
            'was and repeat the command, or start in a new work directory (--workdir)'
        )
