# SPDX-License-Identifier: Apache-2.0
"""Work that takes a while: shown by a bar, done by threads or processes that stop together."""

import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from scripts import end_with_parent
from settings.errors import RejectedError

POLL_SECONDS = 0.2


def progress(text: str, total: int | None, unit: str, done: int = 0) -> tqdm:
    """A bar with the time left on a terminal, and a line now and then in a file; after two seconds.

    `unit` is 'B' for bytes, which are scaled, or the name of another thing; `done` of the `total`
    were there before and took no time.
    """
    interval = 0.2 if sys.stderr.isatty() else 60
    timing = {'delay': 2, 'mininterval': interval, 'maxinterval': 2 * interval}
    scaled = unit == 'B'
    return tqdm(desc=text, total=total, initial=done, unit=unit, unit_scale=scaled, **timing)


def in_threads(function: Callable[..., None], calls: Sequence[tuple], workers: int) -> None:
    """Calls `function(*arguments, stop)` for the arguments of each call, `workers` at a time.

    When one raises, or at Ctrl-C, the event `stop` is set for those at work, no other is begun, and
    the error is raised.
    """
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, *arguments, stop) for arguments in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def in_process(function: Callable[..., None], arguments: tuple, stop: threading.Event) -> bool:
    """Calls `function(*arguments)` in a process of its own, which ends with this one.

    Returns:
        Whether it was done; False if it was ended because `stop` was set.

    Raises:
        ValueError, RejectedError, OSError: what the function raised.
        OSError: the process was killed.
    """
    spawn = multiprocessing.get_context('spawn')
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report, args=(theirs, os.getpid(), function, arguments))
    process.start()
    theirs.close()
    try:
        while not ours.poll(POLL_SECONDS):
            if stop.is_set():
                process.terminate()
                return False
        error = ours.recv()
    except EOFError:
        process.join()
        status = process.exitcode
        raise OSError(
            f'a process ended with status {status} before its work was done'
            + ': it was killed, perhaps for want of memory' * (status == -signal.SIGKILL)
        ) from None
    finally:
        process.join()
    if error:
        raise error
    return True


def _report(answer: Connection, parent: int, function: Callable[..., None], arguments: tuple):
    """The program of such a process: sends None or the error; others end it with a traceback."""
    end_with_parent.ask(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends it.
    try:
        function(*arguments)
    except (ValueError, RejectedError, OSError) as error:
        answer.send(error)
    else:
        answer.send(None)


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Holds a lock on the folder that dies with the process.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OSError(f'another preparation is at work in {directory}') from error
    finally:
        os.close(descriptor)
