# SPDX-License-Identifier: Apache-2.0
"""A configuration from a JSON file: `--config=configs/from_json.py:FILE`.

FILE maps names to values; the config.json of a work directory is one, seed included.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict


def get_config(path: str = '') -> ConfigDict:
    """The configuration in the JSON file at `path`.

    Raises:
      ValueError: when there is no such file or it is not a JSON object.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no file {path!r}; use --config=configs/from_json.py:FILE')
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'{path} holds no JSON object of names and values')
    return ConfigDict(values)
