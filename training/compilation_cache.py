# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept between runs."""

import contextlib
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from run_files.terminal import show
from training import processes

LARGEST_BYTES = 2 << 30
SHORTEST_COMPILATION_SECONDS = 0.5


def configure() -> None:
    """Sets the cache's limits; it stays off until `keep` is called."""
    jax.config.update('jax_compilation_cache_dir', None)
    jax.config.update('jax_compilation_cache_max_size', LARGEST_BYTES)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', SHORTEST_COMPILATION_SECONDS)


def keep(folder: Path) -> None:
    """Keeps compiled programs in a folder that all processes see; otherwise none are kept.

    On GPUs, XLA has the processes of a run tune a program's kernels together. If one found the
    program in its cache, the others would wait a day for its part.
    """
    if processes.is_several():
        mark = folder / f'seen-by-all-{processes.broadcast(os.urandom(8).hex())}'
        processes.run_on_lead(lambda: _touch(mark))
        seen = multihost_utils.process_allgather(np.int32(mark.exists()))
        processes.run_on_lead(lambda: mark.unlink(missing_ok=True))
        if not seen.all():
            if processes.is_lead():
                show(f'{folder} is not seen by all processes: compiled programs are not kept')
            return
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
