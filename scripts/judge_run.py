# SPDX-License-Identifier: Apache-2.0
"""Runs the official checker on a finished run's log and prints the result.

    judge_run.py WORKDIR

The last line is RESULT,DATASET,SEED,SECONDS,USER,START, with the seconds from run_start to
run_stop, pauses included: the clock of the rules does not stop for them. Exit status: 0 the target
was reached and the log is accepted, 1 not, 2 there is no finished run.
"""

import argparse
import datetime
import getpass
import os
import sys
from pathlib import Path

from reporting import finished_run, verdicts
from reporting.finished_run import FinishedRun, LogRejectedError, RunError


def user() -> str:
    """Who judges; the number of an account without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def times(run: FinishedRun) -> str:
    """How long a run took, and how much of it was work."""
    text = f'{run.seconds:.1f} s from run_start to run_stop'
    try:
        working = run.working_seconds
    except RunError as error:
        return f'{text}; how much of it was training and evaluation is not known: {error}'
    text += f', of which {working:.1f} s of training, evaluation and checkpoints'
    starts = run.environment.get('starts', 1)
    if starts > 1:
        text += f'; interrupted {"once" if starts == 2 else f"{starts - 1} times"}'
    course = run.plan.course
    rate = course.throughput(run.count * course.examples_per_unit / max(working, 1e-3))
    return f'{text}\nspeed      {rate:,.0f} {course.throughput_unit} in that time'


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workdir', type=Path, metavar='WORKDIR')
    workdir = parser.parse_args(arguments).workdir
    try:
        run = finished_run.read_run(workdir)
    except LogRejectedError as error:
        print(f'log        REJECTED: {error}')
        return 1
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    changes = run.plan.course.ruleset.changes
    good, said = verdicts.accepted(run.log, run.ruleset, changes)
    verdict = 'accepted' if good else 'REJECTED'
    print(f'log        {run.log}: {verdict} by the compliance checker ({run.ruleset})')
    for old, new in changes.items():
        print(f'           with a change of its rules: {old} is {new}')
    if not good:
        print(said)
    target, qualities = run.plan.target, [quality for _, quality in run.results]
    print(
        f'quality    {target.words} {qualities[-1]:.5f} at {run.plan.course.unit} {run.count} '
        f'(best {target.best(qualities):.5f})'
    )
    print(f'target     {target.value:g} {"reached" if run.reached else "MISSED"}')
    print(f'time       {times(run)}')
    begun = datetime.datetime.fromtimestamp(run.start_ms / 1000, datetime.UTC)
    print(
        f'RESULT,{run.config.dataset},{run.config.seed},{run.seconds:.0f},{user()},'
        f'{begun:%Y-%m-%d %H:%M:%S}'
    )
    return 0 if run.reached and good else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
