# SPDX-License-Identifier: Apache-2.0
"""A program for launch.py to run in its tests: launched.py WHAT ARGUMENT…"""

import os
import signal
import sys
import time
from pathlib import Path


def show(*arguments):
    print(arguments, os.environ['JAX_PLATFORMS'], os.environ['CUDA_VISIBLE_DEVICES'])


def exits(me, codes, *_):
    """Ends with the process's own of the statuses."""
    sys.exit(int(codes.split(',')[me]))


def is_ended_by(me, number, *_):
    """Process 1 is ended by a signal; the others do nothing."""
    if me == 1:
        os.kill(os.getpid(), int(number))
    time.sleep(600)


def has_helpers(me, folder, *_):
    """Each has a helper and ignores SIGTERM; when all are there, process 1 is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = os.fork()
    Path(folder, f'pid-{os.getpid()}').touch()
    while len(list(Path(folder).iterdir())) < 6:
        time.sleep(0.01)
    if me == 1 and helper:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def saves(me, lines='1', *_):
    """Says which signal asked it to stop, in so many lines, and ends as an interrupted run."""

    def stop(number, _):
        for _ in range(int(lines)):
            print('got', number, flush=True)
        sys.exit(75)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sleeps(me)


def sleeps(*_):
    print('pid', os.getpid(), flush=True)
    time.sleep(600)


if __name__ == '__main__':
    what, *arguments = sys.argv[1:]
    process = int(arguments[-1].partition('--process_id=')[2] or 0) if arguments else 0
    if what == 'show':
        show(*arguments)
    else:
        programs = {f.__name__: f for f in (exits, is_ended_by, has_helpers, saves, sleeps)}
        programs[what](process, *arguments)
