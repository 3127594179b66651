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
from training.checkpointing import first_line, signed

KEPT = 2  # The newest, and the one before it in case the newest is damaged.


class CheckpointSaver:
    """A run's checkpoints in `directory`; made by process 0 alone.

    Args:
      directory: is made if it is missing.
      report: receives a sentence for every error that does not end the run: a damaged checkpoint,
        a save that failed.
      damaged: checkpoints to put aside, as found by `find`: the run comes by these steps again.
    """

    def __init__(
        self,
        directory: Path,
        report: Callable[[str], None],
        damaged: Sequence[tuple[Path, str]] = (),
    ):
        self._directory, self._report = directory.resolve(), report
        self._directory.mkdir(parents=True, exist_ok=True)
        for path, reason in damaged:
            aside = _unused_path(path.with_name(f'damaged-{path.name}'))
            path.rename(aside)
            self._report(f'checkpoint {path} is damaged, and now called {aside.name}: {reason}')
        self._manager = self._open()
        # Orbax has threads too, but starts them after half a second's work on 100 MB of weights.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._saving: concurrent.futures.Future | None = None
        self._last_save_ok = True  # True, too, while a save is running.

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}, barrier_sync_key_prefix='checkpoints'
                ),
            ),
        )

    def save(self, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Starts writing a tree of host arrays and a JSON record; an earlier save ends first.

        A save that fails (a full disk) is reported, and the run continues.
        """
        self.wait()
        step = int(tree['step'])
        self._last_save_ok = True
        if step in self._manager.all_steps():
            return
        self._saving = self._thread.submit(self._write, step, tree, record)

    def _write(self, step: int, tree: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        _reserve(self._directory, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(signed(record, tree)),
            ),
        )

    def wait(self) -> None:
        """Returns when the last save is on disk, or has failed and been reported."""
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._last_save_ok = False
        self._report(f'a checkpoint could not be saved in {self._directory}: {first_line(error)}')
        with contextlib.suppress(Exception):  # The failed save, which was reported already.
            self._manager.close()
        if not self._directory.is_dir():
            raise SaveError(f'{self._directory} is gone: it was deleted while the run was using it')
        self._manager = self._open()  # Removes what the failed save left behind.

    def close(self) -> bool:
        """Waits for the last save and ends the thread; whether that save succeeded."""
        self.wait()
        self._manager.close()
        self._thread.shutdown()
        return self._last_save_ok


def _reserve(directory: Path, size: int) -> None:
    """Checks that so many bytes can be written.

    TensorStore prints a traceback for every array that a full disk or a quota keeps it from
    writing; here it is one OSError.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _unused_path(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that does not exist."""
    numbered = (path.with_name(f'{path.name}-{n}') for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
