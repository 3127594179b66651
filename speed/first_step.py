# SPDX-License-Identifier: Apache-2.0
"""How long a run takes to its first step.

    python speed/first_step.py CONFIG [--config.NAME=VALUE …]

Runs main.py twice, up to its first line of metrics: with an empty compilation cache, and with what
the first run has left in it. Prints wall time, and CPU time, which other users of the machine
disturb less.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time

from speed.contestants import ROOT, machine


def cpu_seconds() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_step(workdir: str, arguments: list[str]) -> tuple[float, float]:
    """Runs main.py to its first line of metrics, and kills it; wall and CPU seconds."""
    command = [sys.executable, str(ROOT / 'main.py'), f'--workdir={workdir}', *arguments]
    wall, cpu = time.perf_counter(), cpu_seconds()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = any('  step ' in line for line in process.stdout)
        wall = time.perf_counter() - wall
        process.kill()
    if not found:
        sys.exit(f'error: main.py ended with status {process.returncode} before its first step')
    return wall, cpu_seconds() - cpu


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    flags, fields = parser.parse_known_args()
    arguments = [f'--config={flags.config}', '--config.log_every_steps=1', *fields]
    with tempfile.TemporaryDirectory() as folder:
        for state in ('empty', 'filled'):  # The cache lies beside the work directories.
            wall, cpu = first_step(f'{folder}/{state}', arguments)
            print(f'compilation cache {state}: first step after {wall:.1f} s', end='')
            print(f' ({cpu:.1f} s of CPU time)', flush=True)
    print(f'{flags.config}; {machine()}')


if __name__ == '__main__':
    main()
