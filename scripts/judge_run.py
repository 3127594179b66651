# SPDX-License-Identifier: Apache-2.0
"""Has a finished run's log judged by the official checker and prints its result.

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

from mlperf_logging.mllog import constants

from reporting import convergence, verdicts
from reporting.convergence import FinishedRun, LogRejectedError, RunError


def user() -> str:
    """Who judges; the number of an account without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def times(run: FinishedRun) -> str:
    """How long a run took, and how much of it was work."""
    seconds = 60 * run.minutes
    text = f'{seconds:.1f} s from run_start to run_stop'
    try:
        working = run.working_seconds
    except RunError as error:
        return f'{text}; how much of it was training and evaluation is not known: {error}'
    rate = run.epochs * run.logged(constants.TRAIN_SAMPLES) / max(working, 1e-3)
    text += f', of which {working:.1f} s of training, evaluation and checkpoints'
    starts = run.environment.get('starts', 1)
    if starts > 1:
        text += f'; interrupted {"once" if starts == 2 else f"{starts - 1} times"}'
    return f'{text}\nspeed      {rate:,.0f} images/s in that time'


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workdir', type=Path, metavar='WORKDIR')
    workdir = parser.parse_args(arguments).workdir
    try:
        run = convergence.read_run(workdir)
    except LogRejectedError as error:
        print(f'log        REJECTED: {error}')
        return 1
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    good, said = verdicts.accepted(run.log)
    verdict = 'accepted' if good else 'REJECTED'
    print(f'log        {run.log}: {verdict} by the compliance checker ({verdicts.RULESET})')
    if not good:
        print(said)
    top1s = [top1 for _, top1 in run.accuracies]
    print(f'accuracy   {top1s[-1]:.5f} top-1 after epoch {run.epochs} (best {max(top1s):.5f})')
    print(f'target     {"reached" if run.reached else "MISSED"}')
    print(f'time       {times(run)}')
    begun = datetime.datetime.fromtimestamp(run.start_ms / 1000, datetime.UTC)
    print(
        f'RESULT,{run.config["dataset"]},{run.config["seed"]},{60 * run.minutes:.0f},{user()},'
        f'{begun:%Y-%m-%d %H:%M:%S}'
    )
    return 0 if run.reached and good else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
