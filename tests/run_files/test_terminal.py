# SPDX-License-Identifier: Apache-2.0
"""What is printed for people who no longer listen."""

import os
from pathlib import Path

from run_files.terminal import show


def test_what_nobody_reads_is_dropped_and_leaves_nothing_open():
    reader, writer = os.pipe()
    with os.fdopen(writer, 'w') as lost:
        os.close(reader)
        before = len(list(Path('/proc/self/fd').iterdir()))
        for _ in range(2):
            show('a line', file=lost)
        assert len(list(Path('/proc/self/fd').iterdir())) == before
