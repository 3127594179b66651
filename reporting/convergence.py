# SPDX-License-Identifier: Apache-2.0
"""Finished runs, read from their work directories.

In: folders as `main.py` leaves them (see `work_directory`). Out: `FinishedRun`s, whose logs are
known to be whole, of one run, and of this benchmark; and what sets runs apart from each other.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants

import hyperparameters
import mlperf_log

DAMAGED = '.damaged-'  # In the name of work directories that were set aside.
_ONCE = (constants.INIT_STOP, constants.RUN_START, constants.RUN_STOP, constants.SEED)


class RunError(ValueError):
    """A run, or a set of runs, that cannot be used; the text says which and what to do."""


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
    def minutes(self) -> float:
        """From run_start to run_stop."""
        start, stop = self._first(constants.RUN_START), self._first(constants.RUN_STOP)
        return (stop['time_ms'] - start['time_ms']) / 60_000

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = (self.directory / 'metrics.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]

    def spans(self, start: str, stop: str) -> list[tuple[Mapping[str, Any], float]]:
        """The (metadata of the start, seconds) of every interval between two keys of the log."""
        spans, begun = [], None
        for event in self.events:
            if event['key'] == start:
                begun = event
            elif event['key'] == stop and begun is not None:
                spans.append((begun['metadata'], (event['time_ms'] - begun['time_ms']) / 1000))
        return spans

    def logged(self, key: str) -> Any:
        """The value of the log's line with this key."""
        return self._first(key)['value']

    def _first(self, key: str) -> Mapping[str, Any]:
        return next(event for event in self.events if event['key'] == key)


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
    if any(a['time_ms'] > b['time_ms'] for a, b in itertools.pairwise(events)):
        return 'its times go backwards: the logs of several runs are mixed'
    missing = [key for key in (*_ONCE, constants.EVAL_ACCURACY) if key not in keys]
    if missing:
        return (
            f'it is not whole: {missing[0]} is missing, the last event is {keys[-1]}; the same '
            'command as before goes on with an interrupted run'
        )
    return None


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events of a log of one finished run.

    Raises:
      RunError: when it is missing, damaged, unfinished, mixed of several runs, or of another
        benchmark.
    """
    try:
        events = mlperf_log.read(log)
    except OSError as error:
        raise RunError(f'{log} cannot be read ({error.strerror})') from error
    except mlperf_log.LogError as error:
        raise RunError(str(error)) from error
    fault = check_events(events)
    if fault:
        raise RunError(f'{log} cannot be used: {fault}')
    return events


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f'{path} cannot be read ({error}); it belongs to every work directory of main.py'
        ) from error


def read_run(directory: Path) -> FinishedRun:
    """The run of a work directory.

    Raises:
      RunError: when it has not ended, or its files cannot be used.
    """
    return FinishedRun(
        directory=directory,
        config=_read_json(directory / 'config.json'),
        environment=_read_json(directory / 'environment.json'),
        events=read_events(directory / 'mlperf.log'),
    )


def survey(directory: Path) -> tuple[list[FinishedRun], list[RunError]]:
    """The finished runs in a folder of work directories, by name, and the faults of others.

    A work directory itself counts as a folder of one.

    Raises:
      RunError: when there is no run at all.
    """
    logs = [path for path in sorted(directory.glob('*/mlperf.log')) if DAMAGED not in str(path)]
    logs = [directory / 'mlperf.log'] if (directory / 'mlperf.log').exists() else logs
    if not logs:
        raise RunError(
            f'there are no runs in {directory}: it must hold work directories of main.py, as '
            f'scripts/run_seeds.py --out={directory} makes them'
        )
    runs, faults = [], []
    for log in logs:
        try:
            runs.append(read_run(log.parent))
        except RunError as error:
            faults.append(error)
    return runs, faults


def read_runs(directory: Path) -> list[FinishedRun]:
    """The runs in a folder of work directories, by name.

    Raises:
      RunError: when there is none, or one of them has not ended or cannot be used.
    """
    runs, faults = survey(directory)
    if faults:
        raise faults[0]
    return runs


def differences(runs: Iterable[FinishedRun]) -> list[str]:
    """What keeps runs from being repetitions of one experiment, as sentences.

    Their hyperparameters, code version, data and seeds are compared.
    """
    first, *others = runs
    faults = []
    for run in (first, *others):
        starts = (*run.environment.get('earlier', ()), run.environment)
        commits = list(dict.fromkeys(start['commit'] for start in starts))
        if len(commits) > 1:
            versions = ', then '.join(commits)
            faults.append(f'{run.directory.name} was run by several code versions: {versions}')
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
        faults += [f'{name} differ in {what}' for what in found]
        seed = run.config['seed']
        if seed in seen:
            faults.append(f'{run.directory.name} and {seen[seed]} have the same seed {seed}')
        seen[seed] = run.directory.name
    return faults


def refuse_mixture(runs: Sequence[FinishedRun]) -> None:
    """Checks that runs are repetitions of one experiment.

    Raises:
      RunError: listing what differs.
    """
    faults = differences(runs)
    if faults:
        shown = '\n  '.join(
            faults[:10] + ([f'… and {len(faults) - 10} more'] if faults[10:] else [])
        )
        raise RunError(
            f'the runs in {runs[0].directory.parent} are not of one experiment:\n  {shown}\n'
            'Keep only those that belong together in the folder.'
        )
