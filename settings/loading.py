# SPDX-License-Identifier: Apache-2.0
"""Configurations from files, and the flags that override their fields."""

import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from settings.errors import ConfigError

FLAG = '--config.'
_ROOT = Path(__file__).resolve().parent.parent


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates a program's own arguments from --config.NAME=VALUE or --config.NAME VALUE.

    Returns:
      The former, and the latter as texts by name, unknown names included.

    Raises:
      ConfigError: when a flag has no value.
    """
    own, overrides = [], {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(FLAG):
            own.append(argument)
            continue
        name, equals, value = argument.removeprefix(FLAG).partition('=')
        if not equals:
            value = next(rest, '--')
            if value.startswith('--'):
                raise ConfigError(f'{argument} needs a value: {argument}=VALUE')
        overrides[name] = value
    return own, overrides


def read_object(path: Path) -> dict[str, Any]:
    """The names and values in a JSON file, such as config.json or environment.json.

    Raises:
      ValueError: when it cannot be read, or holds anything else; the text names the file.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} cannot be read ({error})') from error
    if not isinstance(value, dict):
        raise ValueError(f'{path} is damaged: it is no JSON object')
    return value


def committed() -> list[str]:
    """The configuration files of this repository, as `load` takes them."""
    names = sorted(path.name for path in (_ROOT / 'configs').glob('[a-z]*.py'))
    return [f'configs/{name}' for name in names if name != 'common.py']


def _find(name: str) -> Path:
    try:
        return next(p for p in (Path(name), _ROOT / name) if p.is_file())
    except (OSError, ValueError, StopIteration) as error:  # Too long a name, or one with a NUL.
        raise ConfigError(
            f'--config={name[:200]}: no such file; there are {", ".join(committed())}, and '
            'FILE.json such as the config.json of a work directory'
        ) from error


def load(specification: str) -> Mapping[str, Any]:
    """Calls `get_config` of a configuration file, or reads a JSON file of names and values.

    Args:
      specification: FILE.py, FILE.py:ARGUMENT (of `get_config`), or FILE.json.

    Raises:
      ConfigError: when there is no such file, or it cannot be loaded.
    """
    path, _, argument = specification.partition(':')
    file = _find(path)
    try:
        if file.suffix == '.json':
            return read_object(file)
        get_config = runpy.run_path(str(file))['get_config']
        config = get_config(argument) if argument else get_config()
    except (Exception, SystemExit) as error:
        raise ConfigError(f'--config={specification}: {type(error).__name__}: {error}') from error
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(
            f'--config={specification}: get_config() returned {type(config).__name__}, not the '
            'names and values of a configuration'
        )
    return config
