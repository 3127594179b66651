# SPDX-License-Identifier: Apache-2.0
"""Lines for people."""

import os
import sys
from typing import TextIO


def show(text: str, end: str = '\n', file: TextIO | None = None) -> None:
    """Prints at once, on standard output or another file.

    If nobody can read it any more (`| head`, a lost terminal), it is dropped: a run must save, and
    end with its exit status, all the same.
    """
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
    except OSError:
        with open(os.devnull, 'wb') as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())
