# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept between runs."""

import contextlib
import os
from pathlib import Path

import jax

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
    mark = folder / f'seen-by-all-{processes.broadcast(os.urandom(8).hex())}'
    processes.run_on_lead(lambda: _touch(mark))
    seen = processes.gathered(os.path.exists(mark))
    processes.run_on_lead(lambda: _remove(mark))
    if all(seen):
        jax.config.update('jax_compilation_cache_dir', str(folder))
    elif processes.is_lead():
        reason = 'is not seen by all processes' if any(seen) else 'cannot be written'
        show(f'{folder} {reason}: compiled programs are not kept')


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
