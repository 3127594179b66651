# SPDX-License-Identifier: Apache-2.0
"""Becomes a command that the system sends SIGTERM to when the process that started it dies.

    end_with_parent.py PARENT COMMAND ARGUMENT…

PARENT is the id of that process. Linux only; elsewhere it just becomes the command. Python's
subprocess module could ask the system in the new process itself (preexec_fn), but not safely where
the program has threads.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2); it outlasts execve(2).


def wrap(command: list[str]) -> list[str]:
    """The command as this process should start it."""
    return [sys.executable, __file__, str(os.getpid()), *command]


def ask(parent: int) -> None:
    """Has the system send SIGTERM to this process when the one with that id, its parent, dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # It died before the system was asked.
        signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('parent', type=int, metavar='PARENT')
    parser.add_argument('command', nargs=argparse.REMAINDER, metavar='COMMAND ARGUMENT')
    flags = parser.parse_args()
    ask(flags.parent)
    os.execvp(flags.command[0], flags.command)


if __name__ == '__main__':
    main()
