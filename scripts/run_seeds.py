# SPDX-License-Identifier: Apache-2.0
"""Runs a configuration many times, each time with another seed from the system's entropy.

    run_seeds.py --config=configs/digits.py --runs=N [--jobs=J] [--out=DIR] [--config.NAME=VALUE …]

Run i has the work directory DIR/i and appends its output to DIR/i.txt. The same command resumes:
finished runs are kept, whether they met their target or not; interrupted ones continue from their
checkpoint with their seed. One that cannot resume counts as failed and is left alone.
Ctrl-C, SIGTERM and SIGHUP let the runs save and end; should this program itself be killed, the
system sends them SIGTERM.
Exit status: 0 all runs met their target, 1 some did not, 2 rejected, 3 some failed, 75 interrupted.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from reporting import finished_run, run_sets
from run_files.terminal import show
from scripts import end_with_parent
from settings import errors, hyperparameters, loading
from settings.command_line import DEFAULT_CONFIG
from settings.hyperparameters import Config
from workloads import by_name

ROOT = Path(__file__).resolve().parent.parent
GIB_PER_RUN = 2  # What a small run needs; the default number of jobs is meant for small runs.


class Display:
    """A bar with the time left on a terminal, a line for every finished run elsewhere.

    Args:
      runs: in all.
      kept: that had ended before.
    """

    def __init__(self, runs: int, kept: int):
        self._runs, self._kept, self._started = runs, kept, time.monotonic()
        self._terminal, self._shown = sys.stdout.isatty(), -1

    def show(self, ended: list[int], running: int) -> None:
        """Shows how runs ended, by their exit statuses, and how many are running."""
        if len(ended) == self._shown and not self._terminal:
            return
        self._shown = len(ended)
        reached, missed = ended.count(errors.REACHED), ended.count(errors.MISSED)
        text = tqdm.format_meter(
            len(ended),
            self._runs,
            time.monotonic() - self._started,
            # A line that wraps could not be drawn over.
            ncols=shutil.get_terminal_size().columns - 1 if self._terminal else None,
            ascii='.#',
            bar_format=('[{bar}] ' if self._terminal else '') + '{desc}, {remaining} left',
            prefix=f'{len(ended)}/{self._runs} runs, {reached} reached the target, {missed} '
            f'missed it, {len(ended) - reached - missed} failed; {running} running',
            initial=self._kept,
        )
        show(f'\r\x1b[K{text}' if self._terminal else f'{text}\n', end='')

    def close(self) -> None:
        """Leaves the line."""
        if self._terminal:
            show('')


def default_jobs() -> int:
    """Runs at a time: two cores each and memory enough; one where there is a GPU."""
    if shutil.which('nvidia-smi') and os.environ.get('JAX_PLATFORMS') != 'cpu':
        return 1
    memory = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    return max(1, min(len(os.sched_getaffinity(0)) // 2, int(memory / GIB_PER_RUN)))


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The program's own flags, and the configuration's fields for main.py, as texts by name."""
    own, overrides = loading.split(arguments)
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--config', default=DEFAULT_CONFIG, help='FILE.py or FILE.py:ARGUMENT')
    parser.add_argument('--runs', type=int, required=True, metavar='N', help='in all')
    parser.add_argument('--jobs', type=int, metavar='J', help='at a time (default: what fits)')
    parser.add_argument('--out', type=Path, help='folder of the runs (default: runs/NAME-seeds)')
    flags = parser.parse_args(own)
    if flags.runs < 1 or (flags.jobs is not None and flags.jobs < 1):
        parser.error('--runs and --jobs must be at least 1')
    name = Path(flags.config.partition(':')[0]).stem
    flags.out = flags.out or ROOT / 'runs' / f'{name}-seeds'
    flags.jobs = flags.jobs or default_jobs()
    return flags, overrides


def resolve(specification: str, overrides: Mapping[str, str]) -> Config:
    """The configuration of the runs.

    Raises:
      ConfigError: when it has errors, or fixes the seed.
    """
    config = by_name.configure(loading.load(specification), overrides)
    if config.seed is not None:
        raise errors.ConfigError('every run draws its own seed; leave out --config.seed')
    return config


def finished(directory: Path, config: Config) -> int | None:
    """The exit status of the run in a work directory; None if it has not ended, or is not whole.

    Raises:
      ValueError: when it is a run of another configuration.
    """
    try:
        theirs = loading.read_object(directory / 'config.json')
    except ValueError:  # Not begun, or damaged, which main.py will say.
        return None
    ours = dataclasses.replace(config, seed=theirs.get('seed'))
    differences = hyperparameters.differences(ours, theirs)
    if differences:
        raise ValueError(
            f'{directory} holds a run of another configuration ({"; ".join(differences)}); choose '
            'another folder with --out'
        )
    try:
        run = finished_run.read_run(directory)
    except finished_run.RunError:
        return None
    return errors.REACHED if run.reached else errors.MISSED


class Seeds:
    """The runs of a folder.

    Attributes:
      waiting: work directories of runs that are still to be started or resumed.
      running: the processes of those that run.
      ended: exit statuses of those that will not be tried again.
      asked: whether a signal asked for the end.
      stopped: whether the runs were told.
    """

    def __init__(self, flags: argparse.Namespace, command: list[str], config: Config):
        self._jobs, self._command = flags.jobs, command
        self.ended: list[int] = []
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
                self.ended.append(status)

    def start(self, directory: Path) -> None:
        """Starts, or resumes, the run of a work directory."""
        with directory.with_suffix('.txt').open('a') as output:
            # A session of its own: Ctrl-C reaches this program alone, which passes it on once.
            self.running[directory] = subprocess.Popen(
                end_with_parent.wrap([*self._command, f'--workdir={directory}']),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def collect(self) -> None:
        """Takes note of the runs that ended.

        Raises:
          RejectedError: when a new one was rejected, for all would be.
        """
        for directory, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[directory]
            if self.stopped and status not in (errors.REACHED, errors.MISSED):
                continue
            if status == errors.REJECTED:
                self._rejected(directory)
            else:
                self.ended.append(status)

    def _rejected(self, directory: Path) -> None:
        said = directory.with_suffix('.txt').read_text().strip().splitlines()
        text = f'run {directory.name} was rejected: {said[-1] if said else "it printed nothing"}'
        if not (directory / 'config.json').exists():
            raise errors.RejectedError(text)
        # It may be in use and healthy, so nothing is moved here.
        show(
            f'\n{text}. If it is damaged, rename {directory} to '
            f'{directory.name}{run_sets.DAMAGED}1: the same command then repeats it'
        )
        self.ended.append(errors.REJECTED)

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

    def run(self, display: Display) -> None:
        """Keeps the jobs busy until all is done."""
        try:
            while self.waiting or self.running:
                if self.asked:
                    self.stop()
                while self.waiting and len(self.running) < self._jobs:
                    self.start(self.waiting.pop(0))
                display.show(self.ended, len(self.running))
                time.sleep(0.2)
                self.collect()
            display.show(self.ended, 0)
        finally:
            if self.running:
                self.stop()
            for process in self.running.values():
                process.wait()
            display.close()


def main(arguments: list[str], program: Path = ROOT / 'main.py') -> int:
    """Runs `program` with many seeds; the exit status."""
    try:
        flags, overrides = parse_flags(arguments)
        command = [sys.executable, str(program), f'--config={flags.config}']
        command += [f'{loading.FLAG}{name}={text}' for name, text in overrides.items()]
        config = resolve(flags.config, overrides)
        flags.out.mkdir(parents=True, exist_ok=True)
        seeds = Seeds(flags, command, config)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # As nohup leaves it.
                signal.signal(number, seeds.ask)
        seeds.run(Display(flags.runs, len(seeds.ended)))
    except (errors.RejectedError, ValueError, OSError) as error:
        show(f'error: {error}', file=sys.stderr)
        return errors.REJECTED
    if seeds.stopped:
        show(f'{flags.out}: interrupted; the same command resumes the runs')
        return errors.INTERRUPTED
    failed = sum(status not in (errors.REACHED, errors.MISSED) for status in seeds.ended)
    if failed:
        show(f'{flags.out}: {failed} runs failed; see {flags.out}/*.txt')
        return errors.FAILED
    return max(seeds.ended)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
