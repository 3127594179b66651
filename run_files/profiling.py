# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of a run, for TensorBoard's XProf and for Perfetto."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces optimizer steps [start, stop), counted from 0, into a folder.

    A run that resumes between them traces those that are left.

    Args:
      folder: WORKDIR/profile; the files lie in plugins/profile/TIME below it.
      steps: (start, stop), or None for no trace.
      report: receives what people should know.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, report: Callable[[str], None]):
        self._folder, self._running, self._report = folder, False, report
        self._steps, self._is_first = range(*(steps or (0, 0))), True

    def at(self, step: int, state: Any) -> None:
        """To be called before a step: `step` are done, and `state` is what they leave behind."""
        if self._running and step not in self._steps:
            self.end(state)
        elif not self._running and step in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._is_first and self._steps and step >= self._steps.stop:
            self._report(
                f'no trace is written: the run resumes from step {step}, after those to be traced'
            )
        self._is_first = False

    def end(self, state: Any) -> None:
        """Ends and writes the trace, if one is running, once the device has computed `state`.

        To be called after the last step before a pause, and whatever ended the run: it raises
        nothing that would hide the reason.
        """
        if not self._running:
            return
        self._running = False
        with contextlib.suppress(RuntimeError):  # A step that failed takes its state with it.
            jax.block_until_ready(state)
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            self._report(f'the trace could not be written to {self._folder}: {error}')
