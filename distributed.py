# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, agree, and are asked to stop."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from input_pipeline import Share
from train_lib import Programs

START_TIMEOUT_SECONDS = 300  # A peer that has not appeared by then ends the start.
HEARTBEAT_TIMEOUT_SECONDS = 30  # A peer that is silent for so long ends the others.


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the run's other processes.

    With explicit arguments, or by JAX's own detection of Slurm, Open MPI and Kubernetes; a process
    that is in none of these runs alone.

    Raises:
      RuntimeError: when a peer does not appear in time.
    """
    cluster = any(
        name in os.environ
        for name in ('SLURM_STEP_NODELIST', 'OMPI_MCA_orte_hnp_uri', 'KUBERNETES_SERVICE_HOST')
    )
    explicit = coordinator is not None
    several_in_cluster = int(os.environ.get('SLURM_NTASKS', '2')) > 1
    if not explicit and not (cluster and several_in_cluster):
        return
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=START_TIMEOUT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
    )


def is_lead() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def from_lead(tree: Any) -> Any:
    """Process 0's tree of host arrays, in every process; the others pass one of the same shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def lead_does(function: Callable[[], Any]) -> Any:
    """Runs a function in process 0; its result there, None elsewhere. If it fails, all fail.

    Raises:
      What the function raises, in process 0; RuntimeError in the others.
    """
    result, error = None, None
    if is_lead():
        try:
            result = function()
        except Exception as caught:
            error = caught
    failed = from_lead(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError('process 0 could not start the run; its message says why')
    return result


def seed_from_lead(seed: int | None) -> int:
    """The run's seed, in [0, 2^63): process 0's, or drawn there from the system's entropy."""
    if seed is None:
        seed = int.from_bytes(os.urandom(8), 'little') >> 1
    halves = from_lead(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))
    return int(halves[0]) << 32 | int(halves[1])


def share_of(mesh: Mesh, micro_batch: int) -> Share:
    """This process's part of a batch over the mesh; its devices are neighbours there."""
    owners = [device.process_index for device in mesh.devices]
    per_device = micro_batch // len(owners)
    first, count = owners.index(jax.process_index()), owners.count(jax.process_index())
    return Share(first * per_device, count * per_device, micro_batch)


class StopRequest:
    """Whether SIGTERM or SIGINT asked this process to stop; a second one ends it at once."""

    def __init__(self):
        self.received: str | None = None
        self._flags: dict[bool, jax.Array] = {}

    def _handle(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator['StopRequest']:
        """Handles the two signals inside the block."""
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def flags(self, programs: Programs) -> jax.Array:
        """The flag that rides along with a step, int32 [devices], on the devices."""
        asked = self.received is not None
        if asked not in self._flags:
            flags = np.full(programs.mesh.local_mesh.size, int(asked), np.int32)
            self._flags[asked] = programs.to_devices(flags)
        return self._flags[asked]
