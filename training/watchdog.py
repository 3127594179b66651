# SPDX-License-Identifier: Apache-2.0
"""Ends a run that hangs, and says where.

A collective whose peer is stuck, a device or a file system that never answers leave a process that
is alive and does nothing, which no launcher or scheduler notices. The watchdog prints what the run
was doing and the stack of every thread, and ends the process by SIGALRM, the alarm clock's signal.
`launch.py` and the scripts turn that into status 75: the same command resumes from the last
checkpoint.
"""

import faulthandler
import math
import os
import signal
import sys
import threading

DEBUGGERS = ('bdb', 'pdb', 'pydevd', 'debugpy', '_pydevd_bundle')


class Watchdog:
    """Watches a run between `start` and `stop`.

    Args:
      seconds: the time without a `beat` after which the process is ended; None: never. Time in
        which the process itself is stopped (SIGSTOP, Ctrl-Z), or its main thread is in a debugger,
        does not count.
      tick_seconds: how often it looks.
    """

    def __init__(self, seconds: float | None, tick_seconds: float = 1.0):
        self._seconds = math.inf if seconds is None else seconds
        self._tick_seconds = tick_seconds
        self._doing = 'starting'
        self._idle = 0.0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Starts to watch the calling thread's work."""
        if self._seconds == math.inf:
            return
        watched = threading.get_ident()
        threading.Thread(target=self._watch, args=(watched,), name='watchdog', daemon=True).start()

    def beat(self, doing: str) -> None:
        """Notes progress: `doing` is done, and what follows has the whole time again."""
        self._doing, self._idle = doing, 0.0

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _watch(self, watched: int) -> None:
        # Own ticks are counted, not the clock: while the process is stopped there are none.
        while not self._stopped.wait(self._tick_seconds):
            if _in_debugger(watched):
                self._idle = 0.0  # After it, the run has the whole time again.
                continue
            self._idle += self._tick_seconds
            if self._idle >= self._seconds:
                self._end()

    def _end(self) -> None:
        print(
            f'\nerror: nothing has happened for stall_seconds={self._seconds:g} since '
            f'{self._doing}. The run is ended (SIGALRM); the stacks below say where it hangs. The '
            'same command resumes from the last checkpoint',
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os.kill(os.getpid(), signal.SIGALRM)


def _in_debugger(thread: int) -> bool:
    """Whether a debugger's code is on a thread's stack, or traces the process (gdb, strace)."""
    frame = sys._current_frames().get(thread)
    while frame:
        if frame.f_globals.get('__name__', '').partition('.')[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return _traced()


def _traced() -> bool:
    try:
        with open('/proc/self/status') as status:
            return any(line.startswith('TracerPid:') and int(line[10:]) for line in status)
    except OSError:  # Not Linux.
        return False
