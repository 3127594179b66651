# SPDX-License-Identifier: Apache-2.0
"""Has a finished run's log judged by the official checker and prints its result.

    judge_run.py WORKDIR [--name=NAME]

The last line is RESULT,NAME,SEED,SECONDS,USER,START, with the seconds from run_start to run_stop.
Exit status: 0 the target was reached and the log is accepted, 1 not, 2 there is no finished run.
"""

import argparse
import datetime
import getpass
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlperf_log
from reporting import verdicts


def only(events: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The one event of that key."""
    return next(event for event in events if event['key'] == key)


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workdir', type=Path)
    parser.add_argument('--name', default='resnet')
    flags = parser.parse_args()
    log = flags.workdir / 'mlperf.log'
    try:
        events = mlperf_log.read(log) if log.is_file() else []
    except mlperf_log.LogError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if not any(event['key'] == 'run_stop' for event in events):
        print(f'error: {flags.workdir} holds no finished run', file=sys.stderr)
        return 2

    start, stop = only(events, 'run_start'), only(events, 'run_stop')
    evaluations = [event for event in events if event['key'] == 'eval_accuracy']
    best = max(evaluations, key=lambda event: event['value'])
    last = evaluations[-1]
    seconds = (stop['time_ms'] - start['time_ms']) / 1000
    epochs = last['metadata']['epoch_num']
    examples = epochs * only(events, 'train_samples')['value']
    reached = stop['metadata']['status'] == 'success'
    good, said = verdicts.accepted(log)

    verdict = 'accepted' if good else 'REFUSED'
    print(f'log        {log}: {verdict} by the compliance checker ({verdicts.RULESET})')
    if not good:
        print(said)
    print(f'accuracy   {last["value"]:.5f} top-1 after {epochs} epochs (best {best["value"]:.5f})')
    print(f'target     {"reached" if reached else "MISSED"}')
    print(f'time       {seconds:.1f} s, {examples / seconds:,.0f} images/s over the whole run')
    begun = datetime.datetime.fromtimestamp(start['time_ms'] / 1000, datetime.UTC)
    seed = only(events, 'seed')['value']
    user = getpass.getuser()
    print(f'RESULT,{flags.name},{seed},{seconds:.0f},{user},{begun:%Y-%m-%d %H:%M:%S}')
    return 0 if reached and good else 1


if __name__ == '__main__':
    sys.exit(main())
