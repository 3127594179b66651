# SPDX-License-Identifier: Apache-2.0
"""A program with a watchdog for its tests: watched.py SECONDS|none WHAT."""

import sys
import threading
import time

from training.watchdog import Watchdog


def moves(watchdog, steps=20):
    print('moves', flush=True)
    for step in range(steps):
        watchdog.beat(f'step {step}')
        time.sleep(0.1)


def hangs(watchdog):
    moves(watchdog, 5)
    waits_for_a_peer()


def waits_for_a_peer():
    threading.Event().wait()


def is_stopped(watchdog):
    watchdog.stop()
    time.sleep(1.5)


def sleeps(watchdog):
    time.sleep(1.5)


def is_debugged(watchdog):
    """After the debugger, waits for two thirds of the watchdog's time."""
    breakpoint()  # noqa: T100
    time.sleep(0.6)
    print('after')


PROGRAMS = {f.__name__: f for f in (moves, hangs, is_stopped, sleeps, is_debugged)}

if __name__ == '__main__':
    seconds, what = sys.argv[1:]
    watchdog = Watchdog(None if seconds == 'none' else float(seconds), tick_seconds=0.05)
    watchdog.start()
    PROGRAMS[what](watchdog)
