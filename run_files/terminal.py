# SPDX-License-Identifier: Apache-2.0
"""Lines for people, on standard output."""

import os
import sys


def show(text: str, end: str = '\n') -> None:
    """Prints at once. If nobody can read it any more (`| head`, a lost terminal), it is dropped."""
    try:
        print(text, end=end, flush=True)
    except OSError:  # A run must save and end as if its output were still being read.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
