# SPDX-License-Identifier: Apache-2.0
"""Runs a configuration many times, each time with another seed from the system's entropy.

    run_seeds.py --config=configs/digits.py --runs=N [--jobs=J] [--out=DIR] [--config.NAME=VALUE …]

Run i has the work directory DIR/i and appends its output to DIR/i.txt. The same command resumes:
finished runs are kept, whether they met their target or not; interrupted ones resume from their
checkpoint with their seed. One that cannot resume counts as failed and is left alone.
Ctrl-C, SIGTERM and SIGHUP let the runs save and end; should this program itself be killed, the
system sends them SIGTERM.
Exit status: 0 all runs met their target, 1 some did not, 2 rejected, 3 some failed, 75 interrupted.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import main as program
from reporting import convergence
from scripts import launch
from settings import hyperparameters

ROOT = Path(__file__).resolve().parent.parent
GIB_PER_RUN = 2  # What a small run needs; the default number of jobs is meant for small runs.


@dataclasses.dataclass
class Tally:
    """How the runs ended so far."""

    reached: int = 0
    missed: int = 0
    failed: int = 0

    def add(self, status: int) -> None:
        """Counts a run by its exit status."""
        if status == program.EXIT_REACHED:
            self.reached += 1
        elif status == program.EXIT_MISSED:
            self.missed += 1
        else:
            self.failed += 1

    @property
    def done(self) -> int:
        """Runs that will not be tried again."""
        return self.reached + self.missed + self.failed


class Bar:
    """A bar with the time left on a terminal, a line for every finished run elsewhere."""

    def __init__(self, runs: int, kept: int):
        self._runs, self._kept, self._started = runs, kept, time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._shown, self._seconds_at = -1, self._started

    def show(self, tally: Tally, running: int) -> None:
        """Shows the tally."""
        if tally.done != self._shown:
            self._shown, self._seconds_at = tally.done, time.monotonic()
        elif not self._terminal:
            return
        new, left = tally.done - self._kept, ''
        if new:
            each = (self._seconds_at - self._started) / new
            rest = each * (self._runs - tally.done) - (time.monotonic() - self._seconds_at)
            seconds = max(round(rest), 0)
            left = f', {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left'
        words = (
            f'{tally.done}/{self._runs} runs, {tally.reached} reached the target, '
            f'{tally.missed} missed it, {tally.failed} failed; {running} running{left}'
        )
        if not self._terminal:
            print(words, flush=True)
            return
        # The bar has what the terminal leaves; a line that wraps could not be drawn over.
        columns = shutil.get_terminal_size().columns - 1
        width = min(30, columns - len(words) - 3)
        if width >= 5:
            filled = width * tally.done // self._runs
            words = f'[{"#" * filled}{"." * (width - filled)}] {words}'
        print(f'\r\x1b[K{words[:columns]}', end='', flush=True)

    def close(self) -> None:
        """Leaves the line."""
        if self._terminal:
            print()


def default_jobs() -> int:
    """Runs at a time: two cores each and memory enough; one where there is a GPU."""
    if shutil.which('nvidia-smi') and os.environ.get('JAX_PLATFORMS') != 'cpu':
        return 1
    memory = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    return max(1, min(len(os.sched_getaffinity(0)) // 2, int(memory / GIB_PER_RUN)))


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and the fields for main.py."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--config', default='configs/digits.py', help='FILE.py or FILE.py:ARGUMENT')
    parser.add_argument('--runs', type=int, required=True, metavar='N', help='in all')
    parser.add_argument('--jobs', type=int, metavar='J', help='at a time (default: what fits)')
    parser.add_argument('--out', type=Path, help='folder of the runs (default: runs/NAME-seeds)')
    flags, fields = parser.parse_known_args(arguments)
    strangers = [field for field in fields if not field.startswith(program.FLAG)]
    if strangers:
        parser.error(f'unknown argument {strangers[0]}')
    if flags.runs < 1 or (flags.jobs is not None and flags.jobs < 1):
        parser.error('--runs and --jobs must be at least 1')
    name = Path(flags.config.partition(':')[0]).stem
    flags.out = flags.out or ROOT / 'runs' / f'{name}-seeds'
    flags.jobs = flags.jobs or default_jobs()
    return flags, fields


def resolve(specification: str, fields: list[str]) -> Mapping[str, Any]:
    """The configuration of the runs.

    Raises:
      ValueError: when it has faults, or fixes the seed.
    """
    overrides = dict(field.removeprefix(program.FLAG).partition('=')[::2] for field in fields)
    config = hyperparameters.resolve(program.load_config(specification), overrides)
    if config['seed'] is not None:
        raise ValueError('every run draws its own seed; leave out --config.seed')
    return config


def finished(directory: Path, config: Mapping[str, Any]) -> int | None:
    """The exit status of the run in a work directory; None if it has not ended, or is not whole.

    Raises:
      ValueError: when it is a run of another configuration.
    """
    try:
        theirs = json.loads((directory / 'config.json').read_text())
    except (OSError, ValueError):  # Not begun, or damaged, which main.py will say.
        return None
    differences = hyperparameters.differences(dict(config) | {'seed': theirs.get('seed')}, theirs)
    if differences:
        raise ValueError(
            f'{directory} holds a run of another configuration ({"; ".join(differences)}); choose '
            'another folder with --out'
        )
    try:
        run = convergence.read_run(directory)
    except convergence.RunError:
        return None
    return program.EXIT_REACHED if run.reached else program.EXIT_MISSED


class Seeds:
    """The runs of a folder: what is to do, what runs, and how it ended."""

    def __init__(self, flags: argparse.Namespace, fields: list[str], config: Mapping[str, Any]):
        self._flags, self._fields = flags, fields
        self.tally = Tally()
        self.waiting: list[Path] = []
        self.running: dict[Path, subprocess.Popen] = {}
        self.asked = self.stopped = False
        width = max(3, len(str(flags.runs)))
        for number in range(1, flags.runs + 1):
            directory = flags.out / f'{number:0{width}}'
            status = finished(directory, config)
            if status is None:
                self.waiting.append(directory)
            else:
                self.tally.add(status)

    def start(self, directory: Path) -> None:
        """Starts, or goes on with, the run of a work directory."""
        command = [sys.executable, str(ROOT / 'main.py'), f'--config={self._flags.config}']
        command += [f'--workdir={directory}', *self._fields]
        with directory.with_suffix('.txt').open('a') as output:
            # A session of its own: Ctrl-C reaches this program alone, which passes it on once.
            self.running[directory] = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=launch.end_with_parent,
            )

    def collect(self) -> None:
        """Takes note of the runs that ended.

        Raises:
          ValueError: when a new one was refused, for all would be.
        """
        for directory, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[directory]
            if self.stopped and status not in (program.EXIT_REACHED, program.EXIT_MISSED):
                continue
            if status == program.EXIT_REFUSED:
                self._refused(directory)
            else:
                self.tally.add(status)

    def _refused(self, directory: Path) -> None:
        said = directory.with_suffix('.txt').read_text().strip().splitlines()
        text = f'run {directory.name} was refused: {said[-1] if said else "no word"}'
        if not (directory / 'config.json').exists():
            raise ValueError(text)
        # It may be in use and healthy, so nothing is moved here.
        print(
            f'\n{text}. If it is damaged, rename {directory} to '
            f'{directory.name}{convergence.DAMAGED}1: the same command then repeats it',
            flush=True,
        )
        self.tally.add(program.EXIT_REFUSED)

    def ask(self, *_) -> None:
        """The handler of signals: the loop acts on it where nothing is half done."""
        self.asked = True

    def stop(self) -> None:
        """Lets every run save and end. Tells them once: a second time they would not save."""
        if self.stopped:
            return
        self.stopped = True
        self.waiting.clear()
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)

    def to_the_end(self, bar: Bar) -> None:
        """Keeps the jobs busy until all is done."""
        try:
            while self.waiting or self.running:
                if self.asked:
                    self.stop()
                while self.waiting and len(self.running) < self._flags.jobs:
                    self.start(self.waiting.pop(0))
                bar.show(self.tally, len(self.running))
                time.sleep(0.2)
                self.collect()
            bar.show(self.tally, 0)
        finally:
            if self.running:
                self.stop()
            for process in self.running.values():
                process.wait()
            bar.close()


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    flags, fields = parse_flags(arguments)
    try:
        config = resolve(flags.config, fields)
        flags.out.mkdir(parents=True, exist_ok=True)
        seeds = Seeds(flags, fields, config)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # As nohup leaves it.
                signal.signal(number, seeds.ask)
        seeds.to_the_end(Bar(flags.runs, seeds.tally.done))
    except (ValueError, OSError) as error:
        return program.complain(error, program.EXIT_REFUSED)
    if seeds.stopped:
        print(f'{flags.out}: interrupted; the same command goes on', flush=True)
        return program.EXIT_INTERRUPTED
    if seeds.tally.failed:
        print(f'{flags.out}: {seeds.tally.failed} runs failed; see {flags.out}/*.txt', flush=True)
        return program.EXIT_FAILED
    return program.EXIT_MISSED if seeds.tally.missed else program.EXIT_REACHED


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
