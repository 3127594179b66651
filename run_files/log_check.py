# SPDX-License-Identifier: Apache-2.0
"""Whether an MLPerf log is the one that a run has written so far.

A run writes its events in one order that its configuration and its results decide. So a log that
has lost lines, or belongs to another run, is known before anything is added to it.
"""

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlperf_logging.mllog import constants

from run_files.mlperf_log import REMEDY, EventLog, LogError, facts, is_same
from settings.hyperparameters import Config
from settings.plan import Plan


def check(log: EventLog, config: Config, plan: Plan, step: int) -> None:
    """Checks that a log is this run's and whole, before anything is added to it.

    Args:
      log: as it was read; one without a file passes.
      config, plan: the run's.
      step: of the checkpoint that it resumes from, 0 without one. The log must hold every event
        up to it, and may hold later ones, which the run then passes once more.

    Raises:
      LogError: when a line is missing, was added or changed, or lies in the future.
    """
    if log.path is None:
        return
    results = [e['value'] for e in log.recorded if e['key'] == constants.EVAL_ACCURACY]
    if not all(isinstance(x, int | float) and 0 <= x <= plan.target.largest for x in results):
        raise LogError(f'an eval_accuracy of {log.path} is impossible; {REMEDY}')
    expected, due = _script(config, plan, results)
    for number, event in enumerate(log.recorded, start=1):
        ours = expected[number - 1] if number <= len(expected) else None
        if ours is None or not is_same(event, ours):
            raise LogError(
                f'event {number} of {log.path} is {_described(event)}, where this run writes '
                f'{_described(ours) if ours else "nothing more"}: lines were lost, changed or '
                f'added, or it is the log of another run; {REMEDY}'
            )
    needed = sum(at <= step for at in due)
    if len(log.recorded) < needed:
        state = f'ends after {len(log.recorded)} events' if log.recorded else 'is missing or empty'
        raise LogError(
            f'{log.path} {state}, but there is a checkpoint of step {step}, before which the '
            f'run writes {needed}; the first that is missing is '
            f'{_described(expected[len(log.recorded)])}. {REMEDY.capitalize()}'
        )
    lines = log.path.read_bytes().count(b'\n') if log.path.exists() else 0
    if lines != len(log.recorded):
        raise LogError(
            f'{log.path} has {lines - len(log.recorded)} lines that are no events; {REMEDY}'
        )
    times = [event['time_ms'] for event in log.recorded]
    if times != sorted(times):
        raise LogError(f'the times in {log.path} run backwards; {REMEDY}')
    now = log.now_ms()
    if times and now < times[-1] and log.status is None:
        raise LogError(
            f'the last event of {log.path} is of {_utc(times[-1])}, and now it is '
            f'{_utc(now)}: the clock was set back, and the time of the run would be wrong; set '
            'the clock right, or start in a new work directory (--workdir)'
        )


def _script(
    config: Config, plan: Plan, results: Sequence[float]
) -> tuple[list[dict[str, Any]], list[int]]:
    """What a run with these results writes, if its next ones miss the target, in order.

    Returns:
      The events, and for each the first step whose checkpoint is made after it.
    """
    log = EventLog(None)
    due: list[int] = []

    def due_at(step: int) -> None:
        due.extend([step] * (len(log.events) - len(due)))

    log.cache_clear(drop=False)
    log.init_start()
    log.header(config, plan)
    log.init_stop()
    log.run_start()
    due_at(1)
    missed = 0.0 if plan.target.at_least else math.inf
    qualities = itertools.chain(results, itertools.repeat(missed))
    reached, before = False, 0
    for evaluation, quality in zip(plan.evaluations, qualities, strict=False):
        log.block_start(evaluation)
        due_at(before + 1)
        log.block_stop(evaluation)
        log.tracked_stats(evaluation, {})
        due_at(evaluation.step)
        log.eval_start(evaluation)
        log.eval_stop(evaluation, quality)
        due_at(evaluation.step + 1)
        before, reached = evaluation.step, plan.target.is_met(quality)
        if reached:
            break
    log.run_stop(reached)
    due_at(before + 1)
    return log.events, due


def _described(event: Mapping[str, Any]) -> str:
    value = [] if event['value'] is None else [f'= {event["value"]!r}']
    about = [f'({name} {fact})' for name, fact in facts(event).items()]
    return ' '.join([event['key'], *value, *about])[:200]


def _utc(time_ms: int) -> str:
    seconds = datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC)
    return f'{seconds:%Y-%m-%d %H:%M:%S} UTC'
