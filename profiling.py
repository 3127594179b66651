# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of a run, for TensorBoard's XProf and for Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces optimizer steps [start, stop), counted from 0, into a folder.

    Args:
      folder: WORKDIR/profile; the files lie in plugins/profile/TIME below it.
      steps: (start, stop), or None for no trace.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._running = folder, False
        self._start, self._stop = steps or (-1, -1)

    def at(self, step: int, state: Any) -> None:
        """To be called between steps: `step` are done, and `state` is what they leave behind."""
        if step == self._start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._stop:
            self.end(state)

    def end(self, state: Any) -> None:
        """Ends and writes the trace, if one is running, once the device has computed `state`."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
