# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its configuration, its environment, and the guard that one run owns it.

config.json       the resolved configuration with the seed; `configs/from_json.py` reads it
environment.json  versions, devices, code and data that the run used
mlperf.log, metrics.jsonl, tensorboard/, checkpoints/
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import hyperparameters

_OWN = ('lock', 'config.part')
_VERSIONS_OF = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'numpy',
    'mlperf-logging',
    'simplejpeg',
    'opencv-python-headless',
    'tensorflow-datasets',
)


class WorkDirectoryError(RuntimeError):
    """A work directory that this run must not or cannot use; the text says what to do."""


def _write(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    temporary = path.with_suffix('.part')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(path)


def open_for(config: Mapping[str, Any], path: Path) -> int | None:
    """Claims `path` for a run of `config`, new or to be resumed; called by process 0.

    Returns:
      The seed of the run that is to be resumed, if there is one.

    Raises:
      WorkDirectoryError: it is not writable, in use, or holds a run of another configuration.
    """
    if '[' in str(path.resolve()):
        raise WorkDirectoryError(
            f'the work directory {path} has a "[" in its path, where Orbax writes checkpoints that '
            'cannot be read again; choose another with --workdir'
        )
    try:
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
        strangers = [entry.name for entry in path.iterdir() if entry.name not in _OWN]
        if strangers:
            raise WorkDirectoryError(
                f'the work directory {path} is not empty and holds no run (there is '
                f'{strangers[0]}); choose another with --workdir'
            )
        return None
    try:
        theirs = json.loads(recorded.read_text())
    except ValueError as error:
        raise WorkDirectoryError(f'{recorded} cannot be read ({error})') from error
    ours = dict(config)
    if ours['seed'] is None:
        ours['seed'] = theirs.get('seed')
    differences = hyperparameters.differences(ours, theirs)
    if differences:
        raise WorkDirectoryError(
            f'the work directory {path} holds a run of another configuration '
            f'({"; ".join(differences)}); nothing was changed. Choose another with --workdir, or '
            f'go on with that run: --config=configs/from_json.py:{recorded}'
        )
    return theirs['seed']


def _earlier(path: Path, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of this run before `now`, oldest first, where they differ.

    Raises:
      WorkDirectoryError: the run has been trained on other data.
    """
    if not path.exists():
        return []
    try:
        last = json.loads(path.read_text())
        earlier = last.pop('earlier', [])
        theirs, ours = last['dataset']['digest'], now['dataset']['digest']
    except (ValueError, KeyError, TypeError) as error:
        raise WorkDirectoryError(f'{path} cannot be read ({error!r}); remove it') from error
    if theirs and ours and theirs != ours:
        raise WorkDirectoryError(
            f'{path.parent} holds a run on other data: their digest is {theirs}, now it is {ours}; '
            'choose another with --workdir, or bring the data back'
        )
    return earlier if last == now else [*earlier, last]


def _commit() -> str:
    """The commit of this code: Git's word, or in a container that of the environment."""
    root = Path(__file__).resolve().parent
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get('COMMIT', 'unknown')


def record(config: Mapping[str, Any], dataset: Any, path: Path) -> None:
    """Writes config.json and environment.json, which keeps those of earlier starts.

    Raises:
      WorkDirectoryError: the run has been trained on other data.
    """
    devices = jax.devices()
    now = {
        'versions': {name: importlib.metadata.version(name) for name in _VERSIONS_OF},
        'python': platform.python_version(),
        'system': platform.platform(),
        'devices': len(devices),
        'device_kind': devices[0].device_kind,
        'processes': jax.process_count(),
        'commit': _commit(),
        'dataset': {
            'name': dataset.name,
            'num_train': dataset.num_train,
            'num_eval': dataset.num_eval,
            'digest': dataset.digest,
        },
    }
    earlier = _earlier(path / 'environment.json', now)
    _write(path / 'config.json', dict(config))
    _write(path / 'environment.json', now | ({'earlier': earlier} if earlier else {}))
