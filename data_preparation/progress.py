# SPDX-License-Identifier: Apache-2.0
"""Work that takes a while: shown by a bar, done by threads that stop together."""

import concurrent.futures
import sys
import threading
from collections.abc import Callable, Sequence

from tqdm import tqdm


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
