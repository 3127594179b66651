# SPDX-License-Identifier: Apache-2.0
"""A configuration from a JSON file: `--config=configs/from_json.py:FILE`.

FILE maps names to values; the config.json of a work directory is one, seed included.
"""

from pathlib import Path

from ml_collections import ConfigDict

from settings import json_object


def get_config(path: str = '') -> ConfigDict:
    """The configuration in the JSON file at `path`.

    Raises:
      ValueError: when there is no such file or it is not a JSON object.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no file {path!r}; use --config=configs/from_json.py:FILE')
    return ConfigDict(json_object.read(Path(path)))
