# SPDX-License-Identifier: Apache-2.0
"""Prints the fingerprints of checkpoints: 64 bits of all that they hold.

    fingerprint.py PATH...

PATH is a checkpoint, WORKDIR/checkpoints/STEP, or a work directory, which stands for its newest.
Two checkpoints with the same fingerprint are the same in every bit, but for a chance of 2^-64;
main.py prints it at every evaluation. Exit status: 0, or 2 if one cannot be read.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'  # An accelerator is not needed, and may be in use.

import fingerprints
from settings.errors import CheckpointError
from training import checkpointing


def newest(path: Path) -> Path:
    """The newest checkpoint of a work directory; another path as it is."""
    steps = checkpointing.steps(path / 'checkpoints')
    return path / 'checkpoints' / str(steps[0]) if steps else path


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('paths', type=Path, nargs='+', metavar='PATH')
    status = 0
    for path in map(newest, parser.parse_args(arguments).paths):
        try:
            stored = checkpointing.Stored(path)
            stored.check(stored.described())
            marks = [int(mark, 16) for mark in stored.record['fingerprints'].values()]
            print(f'{fingerprints.shown(marks)}  step {int(stored.read("step"))}  {path}')
        except CheckpointError as error:
            print(f'error: {path}: {error}', file=sys.stderr)
            status = 2
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
