# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, agree, and end."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from input_pipeline import Share
from settings import backend
from settings.errors import FAILED, REJECTED, FailedError, RejectedError

HEARTBEAT_TIMEOUT_SECONDS = 30  # A peer that is silent for so long ends the others.
END_SECONDS = 10.0  # In which a process that failed has ended; see _end_soon.


class StartError(RejectedError):
    """The processes could not start together; the text says what to do."""


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Joins the run's other processes, for what is done inside; see `initialize`."""
    try:
        initialize(coordinator, num_processes, process_id, timeout)
        yield
    except Exception:
        if jax.distributed.is_initialized():
            _end_soon()
        raise


def _end_soon() -> None:
    """Has this process ended in END_SECONDS, by SIGUSR1 if need be.

    At its exit JAX waits for the other processes, which may wait for this one. After some minutes
    it would abort them all with a C++ stack trace. Where all fail, none has to wait.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    overdue = threading.Timer(END_SECONDS, os.kill, [os.getpid(), signal.SIGUSR1])
    overdue.daemon = True
    overdue.start()


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
    """
    given = coordinator is not None
    if given != (num_processes is not None) or given != (process_id is not None):
        raise StartError(
            '--coordinator, --num_processes and --process_id belong together; give all'
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator, num_processes, process_id)
    if given or backend.in_cluster():
        _join(coordinator, num_processes, process_id, timeout)
    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # The latter where no GPU is visible at all.
        reason = str(error) or 'it finds none'
        text = f'JAX could not start its devices: {reason}. {_remedy()}'
        raise StartError(text.rstrip()) from error
    if jax.default_backend() == 'cpu' and jax.local_device_count() > backend.CPU_THREADS:
        raise StartError(
            f'{jax.local_device_count()} CPU devices in a process; use at most '
            f'{backend.CPU_THREADS}: with more, XLA takes more threads, which changes the last bits'
        )


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
    if jax.distributed.is_initialized():
        return (
            'Several processes on CPUs find each other by the name of their machine, which must '
            'resolve (/etc/hosts, say)'
        )
    asked = os.environ.get('JAX_PLATFORMS')
    return f'Unset JAX_PLATFORMS={asked}, or install what it asks for' if asked else ''


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Waits for the run's other processes; see `initialize`."""
    # It would answer SIGTERM in our place (see stop_request.py).
    jax.config.update('jax_enable_preemption_service', False)
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            errors.append(error)

    # In a thread, for past its own limit JAX aborts the process with a C++ stack trace.
    waiting = threading.Thread(target=join, name='join', daemon=True)
    waiting.start()
    waiting.join(timeout)
    if waiting.is_alive():
        _end_soon()
        jax.distributed.shutdown()
        raise StartError(
            f'not all processes have joined within --start_timeout={timeout} seconds; check that '
            f'all were started, and can reach the coordinator '
            f'{coordinator or "that the cluster named"}'
        )
    if errors:
        raise StartError(f'the processes could not join: {errors[0]}') from errors[0]


def is_several() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def is_lead() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def run_on_lead(function: Callable[[], Any]) -> Any:
    """Runs a function in process 0; its result there, None elsewhere. If it fails, all fail.

    Raises:
      What the function raises, in process 0; in the others an error of the same exit status.
    """
    result, error = None, None
    if is_lead():
        try:
            result = function()
        except Exception as caught:
            error = caught
    status = broadcast(getattr(error, 'status', FAILED) if error else None)
    if error is not None:
        raise error
    if status is not None:
        text = 'process 0 could not continue; its message says why'
        raise StartError(text) if status == REJECTED else FailedError(text)
    return result


def gathered(value: Any) -> list[Any]:
    """Every process's value, anything that JSON can hold, by its index; in every process."""
    if not is_several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Process 0's value, anything that JSON can hold, in every process."""
    return gathered(value if is_lead() else None)[0]


def check_all_see(directory: Path) -> None:
    """Raises StartError unless every process sees a directory that process 0 has made."""
    sees = gathered(directory.resolve().is_dir())
    if not all(sees):
        raise StartError(
            f'process {sees.index(False)} does not see {directory}, which process 0 has made: '
            'every process writes a part of each checkpoint, so the work directory must be on a '
            'file system that they share'
        )


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    multihost_utils.sync_global_devices('wait_for_all')


def seed_from_lead(seed: int | None) -> int:
    """The run's seed, in [0, 2^63): process 0's, or drawn there from the system's entropy."""
    return broadcast(int.from_bytes(os.urandom(8), 'little') >> 1 if seed is None else seed)


def local_share(mesh: Mesh, micro_batch: int) -> Share:
    """This process's part of a batch over the mesh; its devices are neighbours there."""
    owners = [device.process_index for device in mesh.devices]
    per_device = micro_batch // len(owners)
    first, count = owners.index(jax.process_index()), owners.count(jax.process_index())
    return Share(first * per_device, count * per_device, micro_batch)
