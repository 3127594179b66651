# SPDX-License-Identifier: Apache-2.0
"""Finished runs, read from their work directories.

In: folders as `main.py` leaves them (see `work_directory`). Out: `FinishedRun`s, whose files are
known to be whole, of one run, and of this benchmark; and what sets runs apart from each other.
"""

import dataclasses
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants

from run_files import log_check, mlperf_log
from settings import hyperparameters, json_object
from settings.plan import make_plan

DAMAGED = '.damaged-'  # In the name of work directories that were set aside.
_ONCE = (constants.INIT_STOP, constants.RUN_START, constants.RUN_STOP, constants.SEED)
_OLDEST_MS = 946_684_800_000  # 2000-01-01
_TOLERANCE_MS = 86_400_000  # By which the clock of another machine may be ahead: a day.
# What is read of environment.json: names and types.
_ENVIRONMENT: dict[str, Any] = {
    'versions': {'jax': str},
    'python': str,
    'system': str,
    'devices': int,
    'device_kind': str,
    'processes': int,
    'commit': str,
    'dataset': {'name': str, 'num_train': int, 'num_eval': int},
}
# What is read of a line of metrics.jsonl, by what tells its kind.
_METRICS = {
    'loss': (
        'epoch', 'loss', 'learning_rate', 'images_per_second', 'input_wait', 'seconds',
        'elapsed_seconds',
    ),
    'eval_loss': ('epoch', 'eval_seconds', 'checkpoint_seconds', 'elapsed_seconds'),
}  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent


class RunError(ValueError):
    """A run, or a set of runs, that cannot be used; the text says which and what to do."""


class LogRejectedError(RunError):
    """The log of a run that ended is not one that this program writes."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that ended, at its target or without.

    Attributes:
      directory: its work directory.
      config: the resolved configuration, with the seed.
      environment: what environment.json says: versions, devices, commit, data.
      events: of the MLPerf log, in order.
    """

    directory: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]

    @property
    def log(self) -> Path:
        """The MLPerf log."""
        return self.directory / 'mlperf.log'

    @property
    def reached(self) -> bool:
        """Whether it met its target."""
        return self._first(constants.RUN_STOP)['metadata']['status'] == constants.SUCCESS

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """The (epoch, top-1 accuracy) of every evaluation."""
        return [
            (event['metadata']['epoch_num'], event['value'])
            for event in self.events
            if event['key'] == constants.EVAL_ACCURACY
        ]

    @property
    def epochs(self) -> int:
        """The epoch of the last evaluation: where it met its target, if it did."""
        return self.accuracies[-1][0]

    @property
    def start_ms(self) -> int:
        """When the clock started, in milliseconds since the epoch."""
        return self._first(constants.RUN_START)['time_ms']

    @property
    def minutes(self) -> float:
        """From run_start to run_stop."""
        return (self._first(constants.RUN_STOP)['time_ms'] - self.start_ms) / 60_000

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
          RunError: when there is none, or one of them is damaged.
        """
        path = self.directory / 'metrics.jsonl'
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f'{path} cannot be read ({error})') from error
        return [_metrics_of(line, f'line {n} of {path}') for n, line in enumerate(lines, start=1)]

    @property
    def working_seconds(self) -> float:
        """Seconds of training, evaluation and checkpoints, without the pauses of interruptions.

        What a killed process had done since its last checkpoint is done again, and counts once.

        Raises:
          RunError: when metrics.jsonl does not tell.
        """
        lines, path = self.metrics, self.directory / 'metrics.jsonl'
        if not lines:
            raise RunError(f'{path} is empty')
        working = lines[-1]['elapsed_seconds']
        if working > 60 * self.minutes + 1:
            raise RunError(
                f'{path} has {working:.6g} s of work, more than the log of the whole run'
            )
        return working

    def logged(self, key: str) -> Any:
        """The value of the log's line with this key."""
        return self._first(key)['value']

    def _first(self, key: str) -> Mapping[str, Any]:
        return next(event for event in self.events if event['key'] == key)


def _is_quantity(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _metrics_of(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f'{where} is damaged ({error})') from error
    if not isinstance(values, dict):
        raise RunError(f'{where} is damaged: it is no JSON object')
    names = _METRICS['loss' if 'loss' in values else 'eval_loss']
    wrong = [name for name in names if not _is_quantity(values.get(name))]
    if values.get('eval_loss') is not None and not _is_quantity(values['eval_loss']):
        wrong.append('eval_loss')  # None: it was not finite.
    if wrong:
        raise RunError(f'{where} is damaged: {", ".join(wrong)} must be numbers from 0')
    return values


def check_events(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What keeps a log's events from being those of one finished run; None if nothing does."""
    keys = [event['key'] for event in events]
    if constants.SUBMISSION_BENCHMARK not in keys:
        return 'it holds no MLPerf log of a training run'
    benchmark = next(e['value'] for e in events if e['key'] == constants.SUBMISSION_BENCHMARK)
    if benchmark != mlperf_log.BENCHMARK:
        return f'it is of the benchmark {benchmark}, not {mlperf_log.BENCHMARK}'
    doubled = [key for key in _ONCE if keys.count(key) > 1]
    if doubled:
        count = keys.count(doubled[0])
        return f'it has {count} events {doubled[0]}: the logs of several runs are mixed'
    times = [event['time_ms'] for event in events]
    newest = time.time_ns() // 1_000_000 + _TOLERANCE_MS
    absurd = [x for x in times if type(x) is not int or not _OLDEST_MS <= x <= newest]
    if absurd:
        return (
            f'its time_ms {absurd[0]} is not between the year 2000 and now, in whole milliseconds'
        )
    if any(a > b for a, b in itertools.pairwise(times)):
        return (
            'its times run backwards: the clock was set back, or the logs of several runs are mixed'
        )
    missing = [key for key in (*_ONCE, constants.EVAL_ACCURACY) if key not in keys]
    if missing:
        return (
            f'it is not whole: {missing[0]} is missing, the last event is {keys[-1]}; to resume an '
            'interrupted run, repeat the command that started it'
        )
    if keys.index(constants.RUN_STOP) < keys.index(constants.RUN_START):
        return 'its run_stop comes before its run_start'
    return None


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events of a log of one finished run.

    Raises:
      RunError: when it is missing or unfinished.
      LogRejectedError: when the run has ended, but the log is damaged, mixed of several runs, of
        another benchmark, or its times are impossible.
    """
    try:
        events = mlperf_log.read(log)
        problem = check_events(events)
    except OSError as error:
        raise RunError(f'{log} cannot be read ({error.strerror})') from error
    except mlperf_log.LogError as error:
        problem = str(error)
    if problem:
        ended = b'"run_stop"' in log.read_bytes()
        raise (LogRejectedError if ended else RunError)(f'{log} cannot be used: {problem}')
    return events


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json_object.read(path)
    except ValueError as error:
        raise RunError(f'{error}; every work directory of main.py has one') from error


def _misshapen(value: Any, shape: Any, name: str) -> list[str]:
    """The names of what has not the types of `shape`."""
    if not isinstance(shape, dict):
        return [] if type(value) is shape else [name]
    if not isinstance(value, dict):
        return [name]
    parts = ((value.get(key), part, f'{name}.{key}') for key, part in shape.items())
    return [wrong for part in parts for wrong in _misshapen(*part)]


def _read_environment(path: Path) -> dict[str, Any]:
    environment = _read_json(path)
    earlier = environment.get('earlier', [])
    wrong = _misshapen(environment, _ENVIRONMENT, 'environment')
    wrong += _misshapen(earlier, list, 'earlier')
    wrong += _misshapen(environment.get('starts', 1), int, 'starts')
    if not wrong:
        wrong = [n for start in earlier for n in _misshapen(start, {'commit': str}, 'earlier')]
    if wrong:
        raise RunError(f'{path} is damaged: {", ".join(wrong)} is missing or of another type')
    return environment


def _read_config(path: Path) -> dict[str, Any]:
    values = _read_json(path)
    try:
        config = dict(hyperparameters.resolve(values, {'seed': 'none'}))
    except hyperparameters.ConfigError as error:
        raise RunError(
            f'{path} is damaged, or of another version of this program (environment.json beside it '
            f'names the commit): {error}'
        ) from error
    if type(values.get('seed')) is not int:
        raise RunError(f'{path} is damaged: its seed is {values.get("seed")!r:.100}, no number')
    return config | {'seed': values['seed']}


def _check_log(run: FinishedRun) -> None:
    """Checks that the log is the one that this run writes.

    Raises:
      LogRejectedError: when lines were lost, changed or added.
      RunError: when configuration and data do not fit together.
    """
    data = run.environment['dataset']
    try:
        plan = make_plan(
            run.config,
            num_train=data['num_train'],
            num_eval=data['num_eval'],
            num_devices=run.environment['devices'],
        )
        log_check.check(mlperf_log.EventLog(run.log), run.config, plan, plan.total_steps + 1)
    except mlperf_log.LogError as error:
        raise LogRejectedError(f'{run.log} cannot be used: {error}') from error
    except (ValueError, ArithmeticError) as error:
        raise RunError(f'the files in {run.directory} contradict each other: {error}') from error


def read_run(directory: Path) -> FinishedRun:
    """The run of a work directory.

    Raises:
      RunError: when it has not ended, or its files cannot be used.
      LogRejectedError: when it has ended, but with a log that this run does not write.
    """
    if not directory.is_dir():
        raise RunError(f'there is no folder {directory}')
    run = FinishedRun(
        directory=directory,
        config=_read_config(directory / 'config.json'),
        environment=_read_environment(directory / 'environment.json'),
        events=read_events(directory / 'mlperf.log'),
    )
    _check_log(run)
    return run


def command(script: str, *arguments: str | Path) -> str:
    """A command line for a script of this repository, that can be pasted anywhere."""
    return shlex.join(['python', str(_ROOT / 'scripts' / script), *map(str, arguments)])


def repeat(run: FinishedRun, number: int, folder: Path, *overrides: str) -> str:
    """The command that makes runs like this one, with other seeds, until `folder` has `number`."""
    config = run.directory.resolve() / 'config.json'
    return command(
        'run_seeds.py', f'--config={config}', '--config.seed=none', *overrides,
        f'--runs={number}', f'--out={folder.resolve()}',
    )  # fmt: skip


def spread(epochs: Sequence[int]) -> str:
    """Mean, sample standard deviation and range of epochs to a target, in words."""
    text = f'{statistics.mean(epochs):.2f} epochs on average'
    if len(epochs) < 2:
        return text
    return (
        f'{text} (sample standard deviation {statistics.stdev(epochs):.2f}, '
        f'{min(epochs)} to {max(epochs)})'
    )


def survey(directory: Path) -> tuple[list[FinishedRun], list[RunError]]:
    """The finished runs in a folder of work directories, by name, and the errors of others.

    A work directory itself counts as a folder of one.

    Raises:
      RunError: when there is no run at all.
    """
    if not directory.is_dir():
        raise RunError(f'there is no folder {directory}')
    found = sorted(directory.glob('*/mlperf.log'))
    logs = [path for path in found if DAMAGED not in path.parent.name]
    logs = [directory / 'mlperf.log'] if (directory / 'mlperf.log').exists() else logs
    if not logs:
        out = f'--out={directory.resolve()}'
        makes = command('run_seeds.py', '--config=configs/digits.py', '--runs=10', out)
        raise RunError(
            f'there are no runs in {directory}: it must hold work directories of main.py, such as '
            f'this makes:\n  {makes}'
        )
    runs, problems = [], []
    for log in logs:
        try:
            runs.append(read_run(log.parent))
        except RunError as error:
            problems.append(error)
    return runs, problems


def read_runs(directory: Path) -> list[FinishedRun]:
    """The runs in a folder of work directories, by name.

    Raises:
      RunError: when there is none, or one of them has not ended or cannot be used.
    """
    runs, problems = survey(directory)
    if problems:
        raise problems[0]
    return runs


def differences(runs: Iterable[FinishedRun]) -> list[str]:
    """What keeps runs from being repetitions of one experiment, as sentences.

    Their hyperparameters, code version, data and seeds are compared.
    """
    first, *others = runs
    problems = []
    for run in (first, *others):
        starts = (*run.environment.get('earlier', ()), run.environment)
        commits = list(dict.fromkeys(start['commit'] for start in starts))
        if len(commits) > 1:
            versions = ', then '.join(commits)
            problems.append(f'{run.directory.name} was run by several code versions: {versions}')
    seen = {first.config['seed']: first.directory.name}
    for run in others:
        name = f'{run.directory.name} and {first.directory.name}'
        ours, theirs = dict(first.config) | {'seed': 0}, dict(run.config) | {'seed': 0}
        found = [f'hyperparameter {d}' for d in hyperparameters.differences(ours, theirs)]
        if run.environment['commit'] != first.environment['commit']:
            found.append(
                f'code version: {run.environment["commit"]} there, '
                f'{first.environment["commit"]} here'
            )
        if run.environment['dataset'] != first.environment['dataset']:
            found.append(
                f'data: {run.environment["dataset"]} there, {first.environment["dataset"]} here'
            )
        problems += [f'{name} differ in {what}' for what in found]
        seed = run.config['seed']
        if seed in seen:
            problems.append(f'{run.directory.name} and {seen[seed]} have the same seed {seed}')
        seen[seed] = run.directory.name
    return problems


def reject_mixture(runs: Sequence[FinishedRun]) -> None:
    """Checks that runs are repetitions of one experiment.

    Raises:
      RunError: listing what differs.
    """
    problems = differences(runs)
    if problems:
        shown = '\n  '.join(
            problems[:10] + ([f'… and {len(problems) - 10} more'] if problems[10:] else [])
        )
        raise RunError(
            f'the runs in {runs[0].directory.parent} are not of one experiment:\n  {shown}\n'
            'Keep only those that belong together in the folder.'
        )
