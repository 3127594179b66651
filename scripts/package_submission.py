# SPDX-License-Identifier: Apache-2.0
"""Makes an MLPerf submission tree from finished runs, and has the official checkers judge it.

    package_submission.py DIR --org=ORG --system=SYSTEM [--out=DIR] [--system_description=FILE]

DIR holds the work directories of one experiment (see run_seeds.py); the first five by name are the
result. Everything is checked first, and what is missing is named; then OUT/ORG is written:

    systems/SYSTEM.json                     what the system is, read from this machine
    results/SYSTEM/resnet/result_0…4.txt    the logs, byte for byte
    benchmarks/resnet/implementations/…     the code of the runs, from git

ORG and SYSTEM must be what the logs say. They are set before the runs:

    run_seeds.py --runs=5 --out=DIR --config.org=ORG --config.platform=SYSTEM …

Exit status: 0 the official checkers accept the tree, 1 they do not, 2 there is no tree to judge.
"""

import argparse
import csv
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

from mlperf_logging.mllog import constants

from reporting import convergence, system_description, verdicts
from reporting.convergence import FinishedRun, RunError
from reporting.verdicts import RULESET, RUNS_PER_RESULT
from run_files import mlperf_log
from settings import json_object

ROOT = Path(__file__).resolve().parent.parent


def choose(runs: Sequence[FinishedRun], org: str, system: str) -> list[FinishedRun]:
    """The runs of the result: the first five, unchosen.

    Raises:
      RunError: naming everything that keeps them from being a result.
    """
    folder = runs[0].directory.parent
    convergence.reject_mixture(runs)
    problems = []
    if len(runs) < RUNS_PER_RESULT:
        problems.append(
            f'{len(runs)} of {RUNS_PER_RESULT} runs are there. This makes the others:\n    '
            + convergence.repeat(runs[0], RUNS_PER_RESULT, folder)
        )
    runs = runs[:RUNS_PER_RESULT]
    missed = [run.directory.name for run in runs if not run.reached]
    if len(missed) > 1:
        problems.append(f'{len(missed)} runs missed their target ({", ".join(missed)}); one may')
    logged = [
        (run.logged(constants.SUBMISSION_ORG), run.logged(constants.SUBMISSION_PLATFORM))
        for run in runs
    ]
    others = [names for names in logged if names != (org, system)]
    if others:
        remedy = convergence.repeat(
            runs[0], RUNS_PER_RESULT, folder.with_name(f'{folder.name}-renamed'),
            f'--config.org={org}', f'--config.platform={system}',
        )  # fmt: skip
        problems.append(
            f'{len(others)} of the logs are of --org={others[0][0]} --system={others[0][1]}, as '
            'given to main.py or run_seeds.py with --config.org and --config.platform. Package '
            f'them as such, or repeat the runs with other names:\n    {remedy}'
        )
    for run in runs:
        accepted, text = verdicts.complies(run.log)
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


def read_description(path: Path) -> dict[str, Any]:
    """A system description from a JSON file.

    Raises:
      RunError: when it is none.
    """
    try:
        return json_object.read(path)
    except ValueError as error:
        raise RunError(f'the system description cannot be used: {error}') from error


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


def unpack(archive: bytes, to: Path) -> None:
    """Unpacks code, without the dot-files that the official repository checker rejects."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [
            member
            for member in tar.getmembers()
            if not any(part.startswith('.') for part in Path(member.name).parts)
        ]
        tar.extractall(to, members, filter='data')


def write(
    tree: Path, runs: Sequence[FinishedRun], description: Mapping[str, Any], archive: bytes
) -> None:
    """Writes the submission tree of one organisation."""
    system, benchmark = runs[0].logged(constants.SUBMISSION_PLATFORM), mlperf_log.BENCHMARK
    results = tree / 'results' / system / benchmark
    results.mkdir(parents=True)
    for number, run in enumerate(runs):
        shutil.copyfile(run.log, results / f'result_{number}.txt')
    systems = tree / 'systems'
    systems.mkdir()
    (systems / f'{system}.json').write_text(json.dumps(description, indent=2) + '\n')
    code = tree / 'benchmarks' / benchmark / 'implementations' / f'{system}-jax'
    code.mkdir(parents=True)
    unpack(archive, code)
    (code / 'run_config.json').write_text(
        json.dumps(dict(runs[0].config) | {'seed': None}, indent=2) + '\n'
    )


def judge(tree: Path) -> tuple[float | None, str]:
    """The verdicts of the official package checker and result summarizer on a submission tree.

    Returns:
      The result in minutes, None if the tree is rejected; and what the checkers said.
    """
    _, said = verdicts.official('package_checker', tree.resolve(), 'training', RULESET)
    if 'PACKAGE CHECKER FOUND NO ERRORS' not in said:
        return None, said
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / 'summary.csv'
        arguments = (tree.resolve(), 'training', RULESET, '--csv', table)
        succeeded, said = verdicts.official('result_summarizer', *arguments)
        if not succeeded or 'ERROR' in said or not table.exists():
            return None, said
        with table.open() as file:
            rows = list(csv.DictReader(file))
    if len(rows) != 1 or not rows[0][mlperf_log.BENCHMARK]:
        return None, f'the result summarizer found no result:\n{said}'
    return float(rows[0][mlperf_log.BENCHMARK]), 'package_checker, result_summarizer: SUCCESS'


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
        runs = choose(convergence.read_runs(flags.directory), flags.org, flags.system)
        if tree.exists():
            raise RunError(f'{tree} is there already; remove it, or choose another --out')
        if flags.system_description:
            description = read_description(flags.system_description)
        else:
            description = system_description.describe(runs[0].config, runs[0].environment)
        write(tree, runs, description, code_of(runs[0].environment['commit']))
        minutes, said = judge(tree)
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
