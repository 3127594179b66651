# SPDX-License-Identifier: Apache-2.0
"""JSON files that hold names and values: config.json, environment.json and what users write."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The names and values in a JSON file.

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
