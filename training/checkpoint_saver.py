# SPDX-License-Identifier: Apache-2.0
"""Saves a run's checkpoints in a thread of its own, while the run trains."""

import concurrent.futures
import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from settings.errors import SaveError
from training import processes
from training.checkpointing import first_line, to_save

KEPT = 2  # The newest, and the one before it in case the newest is damaged.


class CheckpointSaver:
    """A run's checkpoints in `directory`. Every process has one, and writes its own parts.

    All methods but `close` are to be called by all processes at once.

    Args:
      directory: is made if it is missing; all processes see it.
      report: receives a sentence for every error that does not end the run: a damaged checkpoint,
        a save that failed.
      damaged: checkpoints to put aside, as found by `find`: the run will reach these steps again.
    """

    def __init__(
        self,
        directory: Path,
        report: Callable[[str], None],
        damaged: Sequence[tuple[Path, str]] = (),
    ):
        self._directory, self._report = directory.resolve(), report
        processes.run_on_lead(lambda: self._prepare(damaged))
        self._manager = self._open()
        # Orbax has threads too, but starts them after half a second's work on 100 MB of weights.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._saving: concurrent.futures.Future | None = None
        self._last_save_ok = True  # True, too, while a save is running.

    def _prepare(self, damaged: Sequence[tuple[Path, str]]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path, reason in damaged:
            aside = _unused_path(path.with_name(f'damaged-{path.name}'))
            path.rename(aside)
            self._report(f'checkpoint {path} is damaged, and now called {aside.name}: {reason}')

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    # Named, they wait for each other without their devices, which are training.
                    active_processes=set(range(jax.process_count())),
                    barrier_sync_key_prefix='checkpoints',
                ),
            ),
        )

    def save(self, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Starts writing a tree (`compilation.on_host`) and a record; an earlier save ends first.

        A save that fails (a full disk) is reported, and the run continues.
        """
        self.wait()
        if not all(processes.gathered(self._last_save_ok)):
            self._reopen()
        step = int(tree['step'])
        self._last_save_ok = True
        if step in self._manager.all_steps():
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        error = processes.broadcast(_reserve(self._directory, size) if processes.is_lead() else '')
        if error:
            self._failed(error)
            return
        self._saving = self._thread.submit(self._write, step, tree, record)

    def _write(self, step: int, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self._manager.save(step, args=to_save(tree, record))

    def wait(self) -> None:
        """Returns when the last save is on disk, or has failed and been reported."""
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except Exception as error:
            self._failed(first_line(error))

    def _failed(self, error: str) -> None:
        self._last_save_ok = False
        self._report(f'a checkpoint could not be saved in {self._directory}: {error}')
        if not self._directory.is_dir():
            raise SaveError(f'{self._directory} is gone: it was deleted while the run was using it')

    def _reopen(self) -> None:
        """Removes what a failed save left behind."""
        with contextlib.suppress(Exception):  # The failed save, which was reported already.
            self._manager.close()
        self._manager = self._open()

    def close(self) -> bool:
        """Waits for the last save and ends the thread; whether that save succeeded here."""
        self.wait()
        self._manager.close()
        self._thread.shutdown()
        return self._last_save_ok


def _reserve(directory: Path, size: int) -> str:
    """Why so many bytes cannot be written; '' if they can.

    TensorStore prints a traceback for every array that a full disk or a quota keeps it from
    writing; here it is one sentence.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return first_line(error)
    return ''


def _unused_path(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that does not exist."""
    numbered = (path.with_name(f'{path.name}-{n}') for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
