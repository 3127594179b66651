# SPDX-License-Identifier: Apache-2.0
"""The program as its users start it: real processes, in a work directory of the test's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from reporting.verdicts import accepted
from run_files import mlperf_log
from tests.harness import is_same
from training import checkpointing

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = Path(__file__).parent / 'without_torch'
# What runs have compiled; those of all tests share it.
PROGRAMS = Path(os.environ.get('JAX_COMPILATION_CACHE_DIR', ROOT / '.cache' / 'jax')) / 'runs'


def share_programs(folder: Path) -> Path:
    """Lets the runs whose work directories are in this folder use what others have compiled."""
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    (folder / 'compilation_cache').symlink_to(PROGRAMS, target_is_directory=True)
    return folder


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Of a program on CPU devices, as users have it; the tests' own has eight devices."""
    kept = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    kept |= {'PYTHONPATH': str(WITHOUT_TORCH), 'JAX_PLATFORMS': 'cpu'}
    # Else the path of the cache would be part of a program's key in it.
    kept |= {'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES': 'none'}
    return kept | {'JAX_NUM_CPU_DEVICES': str(devices)} | variables


def run(
    program: str | Path, *arguments: object, cwd: Path = ROOT, devices: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the repository to its end."""
    command = [str(ROOT / program), *map(str, arguments)]
    if command[0].endswith('.py'):
        command.insert(0, sys.executable)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(devices, **variables),
        timeout=600,
    )


class Program:
    """A run of main.py; as several processes if `cpus` is given, else one with `devices` devices.

    Output goes to WORKDIR.log, which every start begins anew.
    """

    def __init__(self, workdir: Path, data_dir: Path, **config: object):
        self.workdir, self.output = workdir, Path(f'{workdir}.log')
        self._process: subprocess.Popen[bytes] | None = None
        config = {'data_dir': data_dir, 'seed': 7} | config
        self._arguments = [str(ROOT / 'main.py'), f'--workdir={workdir}']
        self._arguments += [f'--config.{name}={value}' for name, value in config.items()]

    def start(self, *, cpus=None, devices=1, more=(), wrapper=()) -> 'Program':
        """Starts it, by a command if there is a wrapper; what it has said before is forgotten."""
        command = [*self._arguments, *more]
        if cpus:
            command = [str(ROOT / 'scripts' / 'launch.py'), f'--cpus={cpus}', '--', *command]
        with self.output.open('w') as output:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, *command],
                env=environment(devices),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd='/',
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """That of its last start: its launcher, if it has several."""
        assert self._process, 'it was not started'
        return self._process

    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """What it has printed since it was started."""
        return self.output.read_text()

    def wait(self, timeout=900) -> int:
        """Waits for its end; its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def run(self, **how) -> int:
        """Starts it and waits for its end."""
        return self.start(**how).wait()

    def until(self, holds, timeout=900) -> None:
        """Waits until a condition holds, or the program has ended."""
        end = time.monotonic() + timeout
        while not holds() and self.is_running():
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)

    def until_said(self, text: str) -> None:
        """Waits until it has printed this."""
        self.until(lambda: text in self.said())
        assert text in self.said(), self.said()

    def children(self) -> list[int]:
        """Process ids of the processes that the launcher started, by their number."""
        path = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children')
        return sorted(map(int, path.read_text().split()))

    def end(self) -> None:
        """Kills whatever of it is left."""
        if self.is_running():
            for child in self.children():
                os.kill(child, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def leftovers(self) -> list[str]:
        """What must not be there after its end: processes that use its work directory, parts."""
        found = []
        for entry in Path('/proc').glob('[0-9]*/cmdline'):
            try:
                if f'--workdir={self.workdir}' in entry.read_text().split('\0'):
                    found.append(f'process {entry.parent.name}')
            except OSError:
                continue
        found += [str(path) for path in self.workdir.rglob('*') if 'tmp' in path.name]
        return found + [str(path) for path in self.workdir.rglob('*.part')]

    def checkpoint(self, step=None):
        """The tree of the checkpoint of a step, or of the newest."""
        step = step or max(self.steps())
        return checkpointing.read(self.workdir / 'checkpoints' / str(step))[0]

    def steps(self) -> list[int]:
        """The steps of its checkpoints."""
        return [int(p.name) for p in (self.workdir / 'checkpoints').iterdir() if p.name.isdigit()]

    def events(self, key=None) -> list[dict]:
        """The events of its MLPerf log, of one key or all."""
        path = self.workdir / 'mlperf.log'
        events = mlperf_log.read(path) if path.exists() else []
        return [event for event in events if key in (None, event['key'])]

    def verdict(self) -> tuple[bool, str]:
        """Whether the official checker accepts its MLPerf log, and what it says."""
        return accepted(self.workdir / 'mlperf.log', '4.0.0')

    def accuracies(self) -> list[float]:
        """What its evaluations have found."""
        return [event['value'] for event in self.events('eval_accuracy')]

    def evaluated(self) -> list[dict]:
        """The evaluations in metrics.jsonl, without what depends on the clock."""
        lines = [json.loads(line) for line in (self.workdir / 'metrics.jsonl').open()]
        return [
            {name: value for name, value in line.items() if 'seconds' not in name}
            for line in lines
            if 'eval_top1' in line
        ]


def assert_as_if_undisturbed(run: Program, undisturbed: Program) -> None:
    """The same weights bit for bit, the same evaluations, one valid log."""
    assert is_same(run.checkpoint(), undisturbed.checkpoint()), 'other weights'
    assert run.accuracies() == undisturbed.accuracies(), run.accuracies()
    assert run.evaluated() == undisturbed.evaluated(), run.evaluated()
    for key in ('init_start', 'init_stop', 'run_start', 'run_stop'):
        assert len(run.events(key)) == 1, key
    valid, said = run.verdict()
    assert valid, said
