# SPDX-License-Identifier: Apache-2.0
"""How a run is asked to stop: by SIGTERM or SIGINT, to any of its processes.

All processes have to stop after the same step. So at every step each says whether it was asked,
and a small program adds this up over the devices, behind the step. Its answer is read a step later,
when it is already available: neither the host nor a device waits for it.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training import processes

SAME_SIGNAL_SECONDS = 0.2


class StopRequest:
    """Whether SIGTERM or SIGINT asked the run to stop; a second signal ends this process at once.

    Within SAME_SIGNAL_SECONDS it is the first one again: Linux sends a process one for every thread
    of a parent that dies (prctl(2), PR_SET_PDEATHSIG).

    Args:
      mesh: all devices of the run, on one axis.

    Attributes:
      received: the name of the signal that this process got.
    """

    def __init__(self, mesh: Mesh):
        self.received: str | None = None
        self._when = 0.0
        self._sum: Callable | None = None
        if processes.is_several():
            self._sum, self._flags = _compile_sum(mesh)

    def _handle(self, number, frame):
        if self.received and time.monotonic() - self._when < SAME_SIGNAL_SECONDS:
            return
        if self.received:
            for data_process in multiprocessing.active_children():
                data_process.terminate()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self._when = signal.Signals(number).name, time.monotonic()

    def listen(self) -> None:
        """Handles SIGTERM and SIGINT until the process ends.

        A process may get the signal after it has learned of the stop from another process; the
        signal must not change its exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def poll(self) -> jax.Array | bool:
        """Starts to ask all processes whether one of them was asked to stop.

        All call it at the same points of the run.

        Returns:
          A bool; with several processes an int32 that the devices are still computing, the same in
          all. `bool(jax.device_get(answer))`, one step later, is the answer.
        """
        asked = self.received is not None
        return self._sum(self._flags[asked]) if self._sum else asked


def _compile_sum(mesh: Mesh) -> tuple[Callable, list[jax.Array]]:
    """A program that adds up a flag of every device, and this process's flags: all 0, all 1."""
    (axis,) = mesh.axis_names
    spread = PartitionSpec(axis)
    flags = [
        jax.make_array_from_process_local_data(
            NamedSharding(mesh, spread), np.full(mesh.local_mesh.size, asked, np.int32)
        )
        for asked in (0, 1)
    ]
    total = jax.shard_map(
        lambda flag: lax.psum(flag[0], axis), mesh=mesh, in_specs=spread, out_specs=PartitionSpec()
    )
    return jax.jit(total).lower(flags[0]).compile(), flags
