# SPDX-License-Identifier: Apache-2.0
"""One finished run, read from its work directory.

In: a folder as `main.py` leaves it (see `work_directory`). Out: a `FinishedRun`, whose files are
known to be whole and to belong together.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants

from run_files import log_check, mlperf_log
from settings import loading
from settings.errors import ConfigError
from settings.hyperparameters import Config
from settings.plan import Plan, make_plan
from workloads import by_name

_OLDEST_MS = 946_684_800_000  # 2000-01-01
_TOLERANCE_MS = 86_400_000  # By which the clock of another machine may be ahead: a day.
# What is read of environment.json: paths and types.
_ENVIRONMENT = {
    'versions.jax': str, 'python': str, 'system': str, 'devices': int, 'device_kind': str,
    'processes': int, 'commit': str, 'dataset.name': str, 'dataset.num_train': int,
    'dataset.num_eval': int,
}  # fmt: skip
# What is read of a line of metrics.jsonl, besides its position and `elapsed_seconds`.
_TRAINING = ('loss', 'learning_rate', 'throughput', 'input_wait', 'seconds')
_EVALUATION = ('eval_seconds', 'checkpoint_seconds')


class RunError(ValueError):
    """A run, or a set of runs, that cannot be used; the text says which and what to do."""


class LogRejectedError(RunError):
    """The log of a run that ended is not one that this program writes."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that ended, whether it met its target or not.

    Attributes:
      directory: its work directory.
      config: the resolved configuration, with the seed.
      environment: what environment.json says: versions, devices, commit, data.
      events: of the MLPerf log, in order.
      plan: on the devices that it last ran on.
    """

    directory: Path
    config: Config
    environment: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    plan: Plan

    @property
    def ruleset(self) -> str:
        """The version of MLPerf Training's rules by which it is judged."""
        return self.plan.course.ruleset.version

    @property
    def log(self) -> Path:
        """The MLPerf log."""
        return self.directory / 'mlperf.log'

    @property
    def reached(self) -> bool:
        """Whether it met its target."""
        return self._first(constants.RUN_STOP)['metadata']['status'] == constants.SUCCESS

    @property
    def results(self) -> list[tuple[int, float]]:
        """(count, quality) of every evaluation; the count is in the unit of `plan.course`."""
        values = [e['value'] for e in self.events if e['key'] == constants.EVAL_ACCURACY]
        # The log has been checked: its evaluations are the first of the plan's, in order.
        return [(e.count, value) for e, value in zip(self.plan.evaluations, values, strict=False)]

    @property
    def count(self) -> int:
        """The count of the last evaluation: where it met its target, if it did."""
        return self.results[-1][0]

    @property
    def units(self) -> str:
        """What `count` counts: 'epochs', or what the examples are called."""
        course = self.plan.course
        return course.unit if course.unit == course.examples else f'{course.unit}s'

    @property
    def start_ms(self) -> int:
        """When the clock started, in milliseconds since the epoch."""
        return self._first(constants.RUN_START)['time_ms']

    @property
    def seconds(self) -> float:
        """From run_start to run_stop."""
        return (self._first(constants.RUN_STOP)['time_ms'] - self.start_ms) / 1000

    @functools.cached_property
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
        if not lines:
            raise RunError(f'{path} is empty')
        unit = self.plan.course.unit
        return [_metrics_of(x, unit, f'line {n} of {path}') for n, x in enumerate(lines, start=1)]

    @property
    def fingerprint(self) -> str:
        """Of the state at the last evaluation; '–' for a run of before there were fingerprints."""
        return self.metrics[-1].get('fingerprint', '–')

    def average(self, name: str) -> float | None:
        """Of a metric of training, such as 'throughput', over the time; None if there is none.

        Raises:
          RunError: when metrics.jsonl cannot be used.
        """
        lines = [line for line in self.metrics if {name, 'seconds'} <= line.keys()]
        seconds = sum(line['seconds'] for line in lines)
        return sum(line[name] * line['seconds'] for line in lines) / seconds if seconds else None

    @property
    def working_seconds(self) -> float:
        """Seconds of training, evaluation and checkpoints, without the pauses of interruptions.

        What a killed process had done since its last checkpoint is done again, and counts once.

        Raises:
          RunError: when metrics.jsonl cannot be used.
        """
        working = self.metrics[-1]['elapsed_seconds']
        if working > self.seconds + 1:
            raise RunError(
                f'{self.directory / "metrics.jsonl"} has {working:.6g} s of work, more than the '
                'log of the whole run'
            )
        return working

    def _first(self, key: str) -> Mapping[str, Any]:
        return next(event for event in self.events if event['key'] == key)


def _is_quantity(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _metrics_of(line: str, unit: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f'{where} is damaged ({error})') from error
    if not isinstance(values, dict):
        raise RunError(f'{where} is damaged: it is no JSON object')
    names = (unit, *(_TRAINING if 'loss' in values else _EVALUATION), 'elapsed_seconds')
    names += tuple({'mfu'} & values.keys())  # Where the devices' peak is known.
    wrong = [name for name in names if not _is_quantity(values.get(name))]
    if values.get('eval_loss') is not None and not _is_quantity(values['eval_loss']):
        wrong.append('eval_loss')  # None: it was not finite.
    if wrong:
        raise RunError(f'{where} is damaged: {", ".join(wrong)} must be numbers from 0')
    return values


def _problem_of(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What keeps a log's events from being those of a finished run; None if nothing does.

    What else they must be follows from the run's configuration, and is checked by `log_check`.
    """
    keys = [event['key'] for event in events]
    if constants.SUBMISSION_BENCHMARK not in keys:
        return 'it holds no MLPerf log of a training run'
    newest = time.time_ns() // 1_000_000 + _TOLERANCE_MS
    for at in (event['time_ms'] for event in events):
        if type(at) is not int or not _OLDEST_MS <= at <= newest:
            return f'its time_ms {at} is not between the year 2000 and now, in whole milliseconds'
    if constants.RUN_STOP not in keys:
        return (
            f'it is not whole: run_stop is missing, the last event is {keys[-1]}; to resume an '
            'interrupted run, repeat the command that started it'
        )
    return None


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events of the log of a finished run.

    Raises:
      RunError: when it is missing or unfinished.
      LogRejectedError: when the run has ended, but the log is damaged, or its times are impossible.
    """
    try:
        events = mlperf_log.read(log)
        problem = _problem_of(events)
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
        return loading.read_object(path)
    except ValueError as error:
        raise RunError(f'{error}; every work directory of main.py has one') from error


def _at(values: Any, path: str) -> Any:
    """The value at a path such as a.b in nested mappings; None if there is none."""
    for name in path.split('.'):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _read_environment(path: Path) -> dict[str, Any]:
    environment = _read_json(path)
    wrong = [
        name for name, kind in _ENVIRONMENT.items() if type(_at(environment, name)) is not kind
    ]
    if type(environment.get('starts', 1)) is not int:
        wrong.append('starts')
    earlier = environment.get('earlier', [])
    if type(earlier) is not list or any(type(_at(x, 'commit')) is not str for x in earlier):
        wrong.append('earlier')
    if wrong:
        raise RunError(f'{path} is damaged: {", ".join(wrong)} is missing or of another type')
    return environment


def _read_config(path: Path) -> Config:
    values = _read_json(path)
    try:
        # The closed division fixes the seed to none, from which a run draws its own.
        config = by_name.configure(values, {'seed': 'none'})
    except ConfigError as error:
        raise RunError(
            f'{path} is damaged, or of another version of this program (environment.json beside it '
            f'names the commit): {error}'
        ) from error
    if type(values.get('seed')) is not int:
        raise RunError(f'{path} is damaged: its seed is {values.get("seed")!r:.100}, no number')
    return dataclasses.replace(config, seed=values['seed'])


def read_run(directory: Path) -> FinishedRun:
    """The run of a work directory.

    Raises:
      RunError: when it has not ended, or its files cannot be used.
      LogRejectedError: when it has ended, but with a log that this run does not write.
    """
    if not directory.is_dir():
        raise RunError(f'there is no folder {directory}')
    config = _read_config(directory / 'config.json')
    environment = _read_environment(directory / 'environment.json')
    log = directory / 'mlperf.log'
    events = read_events(log)
    workload, data = by_name.load(config.benchmark), environment['dataset']
    try:
        plan = make_plan(
            config,
            workload.course(config, data['num_train']),
            num_train=data['num_train'],
            num_eval=data['num_eval'],
            num_devices=environment['devices'],
        )
        log_check.check(mlperf_log.EventLog(log), config, plan, plan.total_steps + 1)
    except mlperf_log.LogError as error:
        raise LogRejectedError(f'{log} cannot be used: {error}') from error
    except (ValueError, ArithmeticError) as error:
        raise RunError(f'the files in {directory} contradict each other: {error}') from error
    return FinishedRun(directory, config, environment, events, plan)
