# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, agree, and are asked to stop."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import cache_key  # For want of a public way; see _compile_once.
from jax._src.lib import xla_client
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from input_pipeline import Share
from train_lib import Programs

EXIT_REFUSED = 2  # As in main.py.
HEARTBEAT_TIMEOUT_SECONDS = 30  # A peer that is silent for so long ends the others.


class StartError(RuntimeError):
    """The processes could not start together; the text says what to do."""


def _in_cluster() -> bool:
    """Whether a launcher that JAX knows how to ask has started this process, among others."""
    environment = os.environ
    slurm = 'SLURM_STEP_NODELIST' in environment and int(environment.get('SLURM_NTASKS', 1)) > 1
    open_mpi = (
        'OMPI_MCA_orte_hnp_uri' in environment
        and int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    )
    # Of the pods of a cluster, only those of an indexed job belong together.
    kubernetes = 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment
    return slurm or open_mpi or kubernetes


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the run's other processes.

    With explicit arguments, or by JAX's own detection of Slurm, Open MPI and Kubernetes; a process
    that is in none of these runs alone.

    Args:
      coordinator: HOST:PORT of process 0; None: detected.
      num_processes, process_id: of the run, and of this one from 0; None: detected.
      timeout: seconds after which a process that has not appeared ends the start.

    Raises:
      StartError: when they cannot join, an argument is missing, or JAX cannot start its devices.
        When one does not appear in time this process prints an error and ends with status 2.
    """
    given = coordinator is not None
    if given != (num_processes is not None) or given != (process_id is not None):
        raise StartError(
            '--coordinator, --num_processes and --process_id belong together; give all'
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator, num_processes, process_id)
    if given or _in_cluster():
        _join(coordinator, num_processes, process_id, timeout)
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # The latter where no GPU is visible at all.
        reason = str(error) or 'it finds none'
        raise StartError(f'JAX could not start its devices: {reason}. {_remedy()}') from error
    if coordinator and coordinator.startswith('127.0.0.1:') and platform == 'cpu':
        _compile_once()


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
    """Raises StartError unless the arguments name a process of a run."""
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise StartError(f'--coordinator={coordinator} is not HOST:PORT')
    if not 0 <= process_id < num_processes:
        raise StartError(
            f'--process_id={process_id} is not in 0..{num_processes - 1}, the processes of '
            f'--num_processes={num_processes}'
        )


def _remedy() -> str:
    """What usually keeps JAX from starting its devices."""
    if os.environ.get('JAX_PLATFORMS') == 'cuda':
        return (
            'A GPU was asked for (--gpus=N): it needs N GPUs, an NVIDIA driver (nvidia-smi lists '
            'both) and the environment that scripts/setup_env.sh --gpu makes'
        )
    return (
        'Several processes on CPUs find each other by the name of their machine, which must '
        'resolve (/etc/hosts, say)'
    )


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Waits for the run's other processes; see `initialize`."""
    # Past its own limit JAX aborts the process with a C++ stack trace; a clear end comes first.
    overdue = threading.Timer(timeout, _give_up, [timeout, coordinator])
    overdue.daemon = True
    overdue.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise StartError(f'the processes could not join: {error}') from error
    finally:
        overdue.cancel()


def _compile_once() -> None:
    """Lets process 0 compile for all processes of a machine without GPUs.

    They share its few cores and its compilation cache. JAX does the sharing if asked, but in 0.10
    and 0.11 the key of a program on a CPU hashes a description of the machine in which every
    process calls itself another name; process 0's takes its place. (On GPUs the keys are alike,
    and XLA has the processes tune a program's kernels together, so there all compile.)
    """
    description = xla_client.get_topology_for_devices(jax.devices()).fingerprint()
    shared = from_lead(np.array([description >> 32, description & 0xFFFFFFFF], np.uint32))
    cache_key._hash_accelerator_config = lambda hash_obj, accelerators: hash_obj.update(
        shared.tobytes()
    )
    jax.config.update('jax_share_binary_between_hosts', True)


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs in a folder that all processes see; otherwise none are kept.

    XLA has the processes of a run tune a program's kernels on their GPUs together. If one found the
    program in its cache, others that did not would wait for its part, for a day.
    """
    if is_several():
        number = from_lead(np.frombuffer(os.urandom(8), np.uint64))
        mark = folder / f'seen-by-all-{number[0]:x}'
        lead_does(lambda: _touch(mark))
        seen = multihost_utils.process_allgather(np.int32(mark.exists()))
        lead_does(lambda: mark.unlink(missing_ok=True))
        if not seen.all():
            if is_lead():
                print(f'{folder} is not seen by all processes: compiled programs are not kept')
            return
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _give_up(timeout: int, coordinator: str | None) -> None:
    """Ends this process, whose main thread waits for the others inside JAX."""
    where = coordinator or 'that the cluster named'
    print(
        f'error: not all processes have joined within --start_timeout={timeout} seconds; check '
        f'that all were started, and can reach the coordinator {where}',
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_REFUSED)


def is_several() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def is_lead() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def from_lead(tree: Any) -> Any:
    """Process 0's tree of host arrays, in every process; the others pass one of the same shapes."""
    if not is_several():
        return tree
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # As one array: JAX compiles a program for what it sends, and one of many arrays takes a second.
    sent = np.frombuffer(b''.join(leaf.tobytes() for leaf in leaves), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    parts = np.split(received, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    arrays = [
        np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def lead_does(function: Callable[[], Any]) -> Any:
    """Runs a function in process 0; its result there, None elsewhere. If it fails, all fail.

    Raises:
      What the function raises, in process 0; StartError in the others.
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
        raise StartError('process 0 could not start the run; its message says why')
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
            for data_process in multiprocessing.active_children():
                data_process.terminate()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def listen(self) -> None:
        """Handles the two signals from here on, to the end of the process.

        To its end, for a process may be asked to stop after it has learnt of it from another one,
        and must not lose its exit status over it.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def flags(self, programs: Programs) -> jax.Array:
        """The flag that rides along with a step, int32 [devices], on the devices."""
        asked = self.received is not None
        if asked not in self._flags:
            flags = np.full(programs.mesh.local_mesh.size, int(asked), np.int32)
            self._flags[asked] = programs.to_devices(flags)
        return self._flags[asked]
