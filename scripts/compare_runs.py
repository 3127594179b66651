# SPDX-License-Identifier: Apache-2.0
"""Says whether two runs are the same, or between which two recorded steps they part.

    compare_runs.py WORKDIR WORKDIR

Compares what both have recorded in metrics.jsonl: the fingerprint at every evaluation, and the
step's own loss at every line of metrics, which is a sum of integers divided once. Runs of one seed
are the same on any number of devices and processes, interrupted or not. If they part, what differs
in configuration, versions and machine is listed. Exit status: 0 they are the same as far as both
have come, 1 they part, 2 they cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.page import flat
from settings import hyperparameters, loading
from workloads import by_name

# What a line of metrics.jsonl tells of the run at its step.
RECORDED = ('step_loss', 'fingerprint')
# What of environment.json decides how kernels round.
ENVIRONMENT = ('versions', 'machine', 'device_kind', 'commit')


def recorded(workdir: Path) -> dict[tuple[int, str], Any]:
    """What a run has recorded, by step and kind; the loss of a step comes before its evaluation.

    Raises:
      ValueError: when there is nothing, or a line is damaged.
    """
    path = workdir / 'metrics.jsonl'
    found: dict[tuple[int, str], Any] = {}
    try:
        for line in map(json.loads, path.read_text().splitlines()):
            found |= {(int(line['step']), kind): line[kind] for kind in RECORDED if kind in line}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f'{path} cannot be read ({error}); name a work directory') from error
    if not found:
        raise ValueError(f'{path} has no fingerprints: it is of an earlier version')
    return dict(sorted(found.items(), key=lambda item: (item[0][0], RECORDED.index(item[0][1]))))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What has other values in another mapping."""
    a, b = dict(flat(ours)), dict(flat(theirs))
    return [f'{n}: {a.get(n)!r}, {b.get(n)!r}' for n in a | b if a.get(n) != b.get(n)]


def settings(workdir: Path) -> dict[str, Any]:
    """What decides what a run computes, and how it rounds: of config.json, environment.json.

    Raises:
      ValueError: when one of them cannot be read.
    """
    config = loading.read_object(workdir / 'config.json')
    decisive = hyperparameters.decisive(config, by_name.config_type(config))
    environment = loading.read_object(workdir / 'environment.json')
    return decisive | {name: environment.get(name) for name in ENVIRONMENT}


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workdirs', type=Path, nargs=2, metavar='WORKDIR')
    workdirs = parser.parse_args(arguments).workdirs
    try:
        ours, theirs = map(recorded, workdirs)
        both = [key for key in ours if key in theirs]
        if not both:
            raise ValueError('the runs have recorded nothing at the same step')
        parted = next((i for i, key in enumerate(both) if ours[key] != theirs[key]), None)
        if parted is None:
            print(f'the same run in all {len(both)} records of both, up to step {both[-1][0]}')
            return 0
        step, kind = both[parted]
        before = f'the same up to step {both[parted - 1][0]}' if parted else 'different at once'
        print(f'{before}; at step {step} {kind} is {ours[step, kind]} and {theirs[step, kind]}')
        for difference in differences(*map(settings, workdirs)):
            print(f'  {difference}')
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
