# SPDX-License-Identifier: Apache-2.0
"""Runs a program as several processes on this machine, one device each.

    launch.py --gpus=N | --cpus=N -- main.py ARGUMENT…

Every process gets --coordinator (a free port of the loopback device), --num_processes and
--process_id, and sees one GPU, or one CPU device; where there are fewer than N usable GPUs the run
is rejected. Output lines are prefixed with the process number. SIGTERM and SIGINT are forwarded to
all processes, SIGHUP as SIGTERM. When one fails, the others have a moment to exit by themselves,
then get SIGTERM, then SIGKILL. If this program is killed, the system sends them SIGTERM. The exit
status is that of the first process that failed (see main.py), or the highest if none failed; 3 for
a process ended by a signal, 75 for SIGALRM (the run hung and can be resumed).
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from run_files.terminal import show
from scripts import end_with_parent
from settings.errors import FAILED, INTERRUPTED, MISSED, REACHED, REJECTED

NO_FAILURE = {REACHED, MISSED, INTERRUPTED}  # The others are about to follow.


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and the command that it is to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument('--gpus', type=int, metavar='N', help='N processes, one GPU each')
    number.add_argument('--cpus', type=int, metavar='N', help='N processes, one CPU device each')
    parser.add_argument(
        '--grace', type=float, default=10, metavar='SECONDS',
        help='that the others have after one failed, before SIGTERM, and again before SIGKILL',
    )  # fmt: skip
    parser.add_argument('command', nargs='+', metavar='PROGRAM.py ARGUMENT')
    flags = parser.parse_args(arguments)
    if (flags.gpus or flags.cpus or 0) < 1:
        parser.error('the number of processes must be at least 1')
    return flags, flags.command


def environments(flags: argparse.Namespace, inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """What each process adds to its environment so that it sees one GPU, or has one CPU device.

    It has more CPU devices where JAX_NUM_CPU_DEVICES says so.

    Raises:
      ValueError: when CUDA_VISIBLE_DEVICES names fewer GPUs than are asked for.
    """
    if flags.cpus:
        devices = inherited.get('JAX_NUM_CPU_DEVICES', '1')
        return [{'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': devices}] * flags.cpus
    visible = inherited.get('CUDA_VISIBLE_DEVICES')
    if visible is None:
        gpus = [str(i) for i in range(flags.gpus)]
    else:  # Empty, it names none.
        gpus = list(filter(None, visible.split(',')))
    if len(gpus) < flags.gpus:
        raise ValueError(
            f'--gpus={flags.gpus}, but CUDA_VISIBLE_DEVICES={visible} names only {len(gpus)}'
        )
    # JAX would otherwise take the CPU where there is no GPU, and no one would be told.
    return [{'CUDA_VISIBLE_DEVICES': gpu, 'JAX_PLATFORMS': 'cuda'} for gpu in gpus[: flags.gpus]]


def free_port() -> int:
    """A TCP port of the loopback device that nobody listens on."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


class Processes:
    """The processes of a run.

    Each leads a process group of its own, so that a signal from the terminal reaches them through
    this program only, once, and so that helpers of theirs can be ended with them.
    """

    def __init__(self, command: list[str], environments: list[dict[str, str]]):
        address = f'127.0.0.1:{free_port()}'
        # Else JAX listens on all of the machine's addresses.
        common = {'JAX_COORDINATOR_BIND_ADDRESS': address, 'PYTHONUNBUFFERED': '1'}
        place = [f'--coordinator={address}', f'--num_processes={len(environments)}']
        self._processes = [
            subprocess.Popen(
                end_with_parent.wrap(
                    [sys.executable, *command]
                    + ([*place, f'--process_id={i}'] if len(environments) > 1 else [])
                ),
                env=os.environ | environment | common,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for i, environment in enumerate(environments)
        ]
        width = len(str(len(environments) - 1))
        self._printers = [
            threading.Thread(target=self._print, args=(f'[{i:{width}}] ', process), daemon=True)
            for i, process in enumerate(self._processes)
        ]
        for printer in self._printers:
            printer.start()

    @staticmethod
    def _print(prefix: str, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            show(prefix + line.decode(errors='replace'), end='')

    def running(self) -> list[subprocess.Popen]:
        """Those that have not ended."""
        return [process for process in self._processes if process.poll() is None]

    def failure(self) -> tuple[int, int] | None:
        """Number and return code of a process that failed, if one has."""
        failed = [
            (i, p.returncode)
            for i, p in enumerate(self._processes)
            if p.poll() is not None and p.returncode not in NO_FAILURE
        ]
        # One that was killed is the cause of what the others say.
        return min(failed, key=lambda pair: pair[1], default=None)

    def send(self, number: int) -> None:
        """Sends a signal to those that are running."""
        for process in self.running():
            process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Waits until all have ended, but no longer than this; whether they have."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.running()

    def end(self, grace: float) -> None:
        """Ends all, and whatever they started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.wait(grace):
                self.send(number)
        for process in self._processes:
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Helpers that outlived it.
        for printer in self._printers:
            printer.join(timeout=1)

    def status(self) -> int:
        """The largest return code, once all have ended."""
        return max(process.returncode for process in self._processes)


def say(text: str) -> None:
    """A line of this program's own."""
    show(f'launch.py: {text}', file=sys.stderr)


def supervise(processes: Processes, grace: float, asked: list[int]) -> int:
    """Waits for the processes; the exit status of the run.

    Args:
      processes: of the run.
      grace: seconds that the others have when one has failed.
      asked: the signals that this program has received and passed on.
    """
    try:
        while processes.running() and processes.failure() is None:
            time.sleep(0.05)
        failure = processes.failure()
        if failure is None:
            return processes.status()
        number, code = failure
        how = f'was ended by {signal.Signals(-code).name}' if code < 0 else f'failed ({code})'
        if processes.running():
            say(f'process {number} {how}; ending the others')
        elif code < 0:
            say(f'process {number} {how}')
        if code >= 0:
            return code
        if code == -signal.SIGALRM:
            return INTERRUPTED
        return 128 - code if -code in asked else FAILED
    finally:
        processes.end(grace)


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    flags, command = parse_flags(arguments)
    try:
        each = environments(flags, os.environ)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return REJECTED
    asked: list[int] = []
    processes: Processes | None = None

    def pass_on(number, frame):
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
        if processes:
            processes.send(asked[-1])

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # As nohup leaves it.
        signal.signal(signal.SIGHUP, pass_on)
    processes = Processes(command, each)
    if asked:  # While they were being started.
        processes.send(asked[-1])
    return supervise(processes, flags.grace, asked)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
