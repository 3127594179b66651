# SPDX-License-Identifier: Apache-2.0
"""Writes reference convergence points, in the official JSON form, from finished runs.

    make_rcps.py DIR [DIR …] [--out=FILE] [--creator=NAME]

Each DIR holds the work directories of one experiment (see run_seeds.py) and gives one point. Runs
that differ in hyperparameters, code version or data, that share a seed, or that did not meet their
target are rejected. `python -m mlperf_logging.rcp_checker --custom_rcps FILE` reads the result; RCP
Mean, RCP Stdev and Min Epochs in it are that checker's own statistics, under its own names.
"""

import argparse
import datetime
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperf_logging.rcp_checker import rcp_checker

from reporting import run_sets, verdicts
from reporting.finished_run import FinishedRun, RunError
from settings import hyperparameters


def check(runs: Sequence[FinishedRun]) -> None:
    """Checks that runs can make a reference convergence point.

    Raises:
      RunError: naming everything that is wrong.
    """
    folder, commit = runs[0].directory.parent, runs[0].environment['commit']
    run_sets.reject_mixture(runs)
    # MLPerf training rules: twice a result's runs.
    smallest = 2 * verdicts.runs_per_result(runs[0].config.benchmark)
    problems = []
    if commit == 'unknown' or commit.endswith('-dirty'):
        elsewhere = folder.with_name(f'{folder.name}-committed')
        problems.append(
            f'their code version is {commit}: nobody could run it again. Commit the code, and '
            'repeat the runs from there in another folder:\n    '
            + run_sets.repeat(runs[0], smallest, elsewhere)
        )
    problems += run_sets.shortcomings(runs, smallest, may_miss=0)
    if problems:
        raise RunError(f'the runs in {folder} make no reference point:\n  ' + '\n  '.join(problems))


def point(runs: Sequence[FinishedRun], creator: str) -> dict[str, Any]:
    """The reference convergence point of a set of runs that `check` has passed."""
    first = runs[0]
    logged = hyperparameters.logged(first.config)
    fields = hyperparameters.table(type(first.config)).values()
    names = {entry.log_key for entry in fields if entry.group == 'run'}
    names |= {'seed', 'global_batch_size'}
    newest = max(run.events[-1]['time_ms'] for run in runs)
    day = datetime.datetime.fromtimestamp(newest / 1000, datetime.UTC)
    environment = first.environment
    facts = environment.get('machine')
    processor = facts.get('processor') if isinstance(facts, Mapping) else None
    kind = environment['device_kind'] + (f' ({processor})' if processor else '')
    return {
        'Benchmark': first.config.benchmark,
        'Creator': creator,
        'When': f'{day:%Y-%m-%d}',
        'Platform': f'{first.config.platform}: {environment["devices"]} × '
        f'{kind}, JAX {environment["versions"]["jax"]}',
        'BS': first.config.global_batch_size,
        'Hyperparams': {key: value for key, value in logged.items() if key not in names},
        'Epochs to converge': [run.count for run in runs],
        'Model': first.config.model,
        'Precision': first.config.dtype,
        'Target': first.plan.target.value,
        'Code version': environment['commit'],
        'Data': environment['dataset'],
    }


def with_statistics(
    points: Mapping[str, Mapping[str, Any]], benchmark: str, ruleset: str
) -> dict[str, dict[str, Any]]:
    """Points with the official checker's statistics of them.

    RCP Mean leaves out the fastest and the slowest run. RCP Stdev is the population's (divided by
    n, not n - 1), of all runs. A result whose own mean (again without fastest and slowest) is below
    Min Epochs is rejected.
    """
    file = io.StringIO(json.dumps(points))
    checker = rcp_checker.RCP_Checker('training', ruleset, benchmark, False, file)
    names = ('RCP Mean', 'RCP Stdev', 'Min Epochs')
    return {
        name: dict(point) | {key: round(float(checker.rcp_data[name][key]), 4) for key in names}
        for name, point in points.items()
    }


def make(sets: Mapping[Path, Sequence[FinishedRun]], creator: str | None) -> dict[str, Any]:
    """The reference convergence points of sets of runs, by name.

    Args:
      sets: the runs by folder.
      creator: None: the runs' organisation.

    Raises:
      RunError: when a set makes no point, or two do not belong into one file.
    """
    points: dict[str, dict[str, Any]] = {}
    first, *_ = next(iter(sets.values()))
    benchmark = first.config.benchmark
    for directory, runs in sets.items():
        check(runs)
        if runs[0].config.benchmark != benchmark:
            raise RunError(f'{directory} is not of the benchmark {benchmark}, as the first folder')
        record = point(runs, creator or runs[0].config.org)
        name = f'{benchmark}_ref_{record["BS"]}'
        if name in points:
            raise RunError(
                f'{directory} is a second experiment with a batch of {record["BS"]}; the '
                'official form has one point for each'
            )
        points[name] = record
    return with_statistics(points, benchmark, first.ruleset)


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directories', nargs='+', type=Path, metavar='DIR')
    parser.add_argument('--out', type=Path, help='default: rcps.json in the first DIR')
    parser.add_argument('--creator', help="default: the runs' organisation")
    flags = parser.parse_args(arguments)
    try:
        sets = {directory: run_sets.read_runs(directory) for directory in flags.directories}
        points = make(sets, flags.creator)
        out = flags.out or flags.directories[0] / 'rcps.json'
        out.write_text(json.dumps(points, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    first, *_ = sets[flags.directories[0]]
    for name, record in points.items():
        counts = record['Epochs to converge']
        print(
            f'{name}: {len(counts)} runs, {run_sets.spread(counts, first.units)}\n'
            '  by the official checker: mean without fastest and slowest '
            f"{record['RCP Mean']:.2f}, population's standard deviation "
            f'{record["RCP Stdev"]:.2f}, smallest passing mean {record["Min Epochs"]:.2f}'
        )
    rcps = shlex.quote(f'--custom_rcps={out.resolve()}')
    print(
        f'written to {out}; this uses it:\n  python -m mlperf_logging.rcp_checker {rcps} DIR\n'
        'DIR holds result_N.txt, as scripts/package_submission.py makes it: '
        f'submission/ORG/results/SYSTEM/{first.config.benchmark}'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
