# SPDX-License-Identifier: Apache-2.0
"""Makes an MLPerf submission tree from finished runs, and has the official checkers judge it.

    package_submission.py DIR --org=ORG --system=SYSTEM [--out=DIR] [--system_description=FILE]

DIR holds the work directories of one experiment (see run_seeds.py); the first by name, as many as
the benchmark asks for, are the result. Everything is checked first, and what is missing is named;
then OUT/ORG is written:

    systems/SYSTEM.json                     what the system is, read from this machine
    results/SYSTEM/BENCHMARK/result_N.txt   the logs, byte for byte
    benchmarks/BENCHMARK/implementations/…  the code of the runs, from git

ORG and SYSTEM must be what the logs say. They are set before the runs:

    run_seeds.py --runs=5 --out=DIR --config.org=ORG --config.platform=SYSTEM …

Exit status: 0 the official checkers accept the tree, 1 they do not, 2 there is no tree to judge.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting import run_sets, system_description, verdicts
from reporting.finished_run import FinishedRun, RunError
from settings import loading
from settings.plan import Ruleset

ROOT = Path(__file__).resolve().parent.parent


def choose(runs: Sequence[FinishedRun], org: str, system: str) -> list[FinishedRun]:
    """The runs of the result: as many as the benchmark asks for, from the first on.

    Raises:
      RunError: naming everything that keeps them from being a result.
    """
    folder = runs[0].directory.parent
    run_sets.reject_mixture(runs)
    number = verdicts.runs_per_result(runs[0].config.benchmark)
    runs = runs[:number]
    problems = run_sets.shortcomings(runs, number, may_miss=1)
    logged = [(run.config.org, run.config.platform) for run in runs]
    others = [names for names in logged if names != (org, system)]
    if others:
        remedy = run_sets.repeat(
            runs[0], number, folder.with_name(f'{folder.name}-renamed'),
            f'--config.org={org}', f'--config.platform={system}',
        )  # fmt: skip
        problems.append(
            f'{len(others)} of the logs are of --org={others[0][0]} --system={others[0][1]}, as '
            'given to main.py or run_seeds.py with --config.org and --config.platform. Package '
            f'them as such, or repeat the runs with other names:\n    {remedy}'
        )
    for run in runs:
        accepted, text = verdicts.accepted(run.log, run.ruleset, run.plan.course.ruleset.changes)
        if not accepted and run.reached:
            problems.append(f'{run.log} is rejected by the compliance checker:\n{text}')
    if problems:
        raise RunError(f'{folder} makes no submission yet:\n  ' + '\n  '.join(problems))
    return list(runs)


def check_name(flag: str, name: str) -> None:
    """Checks that a name can be that of a folder in the tree.

    Raises:
      RunError: when it cannot.
    """
    if not name.isprintable() or name != Path(name).name or name.startswith('.') or len(name) > 100:
        raise RunError(
            f'--{flag}={name[:200]!r} cannot be the name of a folder: give up to 100 characters '
            'without a slash, not beginning with a dot'
        )


def code_of(commit: str) -> bytes:
    """The tracked files of a commit, as a tar archive.

    Raises:
      RunError: when git does not know the commit.
    """
    command = ['git', '-C', str(ROOT), 'archive', '--format=tar', '--end-of-options', commit]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise RunError(
            f'the code of the runs, commit {commit}, cannot be copied: '
            f'{done.stderr.decode().strip()}. Run from a clean git checkout, and package there'
        )
    return done.stdout


def write(
    tree: Path, runs: Sequence[FinishedRun], description: Mapping[str, Any], archive: bytes
) -> None:
    """Writes the submission tree of one organisation."""
    config = runs[0].config
    results = tree / 'results' / config.platform / config.benchmark
    results.mkdir(parents=True)
    for number, run in enumerate(runs):
        shutil.copyfile(run.log, results / f'result_{number}.txt')
    systems = tree / 'systems'
    systems.mkdir()
    (systems / f'{config.platform}.json').write_text(json.dumps(description, indent=2) + '\n')
    code = tree / 'benchmarks' / config.benchmark / 'implementations' / f'{config.platform}-jax'
    code.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        # The official repository checker rejects dot-files.
        members = [
            member
            for member in tar.getmembers()
            if not any(part.startswith('.') for part in Path(member.name).parts)
        ]
        tar.extractall(code, members)
    repeated = dataclasses.asdict(config) | {'seed': None}
    (code / 'run_config.json').write_text(json.dumps(repeated, indent=2) + '\n')


def judge(tree: Path, benchmark: str, ruleset: Ruleset) -> tuple[float | None, str]:
    """The verdicts of the official package checker and result summarizer on a submission tree.

    Returns:
      The result in minutes, None if the tree is rejected; and what the checkers said.
    """
    version, changes = ruleset.version, ruleset.changes
    official = functools.partial(verdicts.official, ruleset=version, changes=changes)
    arguments = (tree.resolve(), 'training', version)
    _, said = official('package_checker', *arguments)
    if 'PACKAGE CHECKER FOUND NO ERRORS' not in said:
        return None, said
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / 'summary.csv'
        succeeded, said = official('result_summarizer', *arguments, '--csv', table)
        if not succeeded or 'ERROR' in said or not table.exists():
            return None, said
        with table.open() as file:
            rows = list(csv.DictReader(file))
    if len(rows) != 1 or not rows[0][benchmark]:
        return None, f'the result summarizer found no result:\n{said}'
    notes = [f'with a change of their rules: {old} is {new}' for old, new in changes.items()]
    verdict = '\n'.join(['package_checker, result_summarizer: SUCCESS', *notes])
    return float(rows[0][benchmark]), verdict


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directory', type=Path, metavar='DIR')
    parser.add_argument('--org', required=True)
    parser.add_argument('--system', required=True)
    parser.add_argument('--out', type=Path, help='default: DIR/submission')
    parser.add_argument('--system_description', type=Path, help='JSON; default: from this machine')
    flags = parser.parse_args(arguments)
    tree = (flags.out or flags.directory / 'submission') / flags.org
    try:
        check_name('org', flags.org)
        check_name('system', flags.system)
        runs = choose(run_sets.read_runs(flags.directory), flags.org, flags.system)
        first = runs[0]
        if tree.exists():
            raise RunError(f'{tree} is there already; remove it, or choose another --out')
        if flags.system_description:
            description = loading.read_object(flags.system_description)
        else:
            description = system_description.describe(first.config, first.environment)
        write(tree, runs, description, code_of(first.environment['commit']))
        minutes, said = judge(tree, first.config.benchmark, first.plan.course.ruleset)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(said)
    if minutes is None:
        print(f'{tree}: REJECTED')
        return 1
    names = ', '.join(run.directory.name for run in runs)
    print(f'{tree}: accepted, result {minutes:.3f} minutes, of the runs {names}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
