# SPDX-License-Identifier: Apache-2.0
"""Makes an MLPerf submission tree from finished runs, and has the official checkers judge it.

    package_submission.py DIR --org=ORG --system=SYSTEM [--out=DIR] [--system_description=FILE]

DIR holds the work directories of one experiment (see run_seeds.py); the first five by name are the
result. Everything is checked first, and what is missing is named; then OUT/ORG is written:

    systems/SYSTEM.json                     what the system is, read from this machine
    results/SYSTEM/resnet/result_0…4.txt    the logs, byte for byte
    benchmarks/resnet/implementations/…     the code of the runs, from git

ORG and SYSTEM must be what the logs say (--config.org and --config.platform of the runs).
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlperf_logging.mllog import constants

import mlperf_log
from reporting import convergence, system_description, verdicts
from reporting.convergence import FinishedRun, RunError
from reporting.verdicts import RULESET, RUNS_PER_RESULT

ROOT = Path(__file__).resolve().parent.parent


def choose(runs: Sequence[FinishedRun], org: str, system: str) -> list[FinishedRun]:
    """The runs of the result: the first five, unchosen.

    Raises:
      RunError: naming everything that keeps them from being a result.
    """
    folder = runs[0].directory.parent
    convergence.refuse_mixture(runs)
    faults = []
    if len(runs) < RUNS_PER_RESULT:
        faults.append(
            f'{len(runs)} of {RUNS_PER_RESULT} runs are there; the others: '
            f'scripts/run_seeds.py --runs={RUNS_PER_RESULT} --out={folder}'
        )
    runs = runs[:RUNS_PER_RESULT]
    missed = [run.directory.name for run in runs if not run.reached]
    if len(missed) > 1:
        faults.append(f'{len(missed)} runs missed their target ({", ".join(missed)}); one may')
    for key, flag, field in (
        (constants.SUBMISSION_ORG, org, 'org'),
        (constants.SUBMISSION_PLATFORM, system, 'platform'),
    ):
        value = runs[0].logged(key)
        if value != flag:
            faults.append(
                f'the logs say {key}={value}, not {flag}; run with --config.{field}={flag}'
            )
    for run in runs:
        accepted, text = verdicts.complies(run.log)
        if not accepted and run.reached:
            faults.append(f'{run.log} is refused by the compliance checker:\n{text}')
    if faults:
        raise RunError(f'{folder} makes no submission yet:\n  ' + '\n  '.join(faults))
    return list(runs)


def code_of(commit: str) -> bytes:
    """The tracked files of a commit, as a tar archive.

    Raises:
      RunError: when git does not know the commit.
    """
    command = ['git', '-C', str(ROOT), 'archive', '--format=tar', commit]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise RunError(
            f'the code of the runs, commit {commit}, cannot be copied: '
            f'{done.stderr.decode().strip()}. Run from a clean git checkout, and package there'
        )
    return done.stdout


def unpack(archive: bytes, to: Path) -> None:
    """Unpacks code, without the dot-files that the official repository checker refuses."""
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
      The result in minutes, None if the tree is refused; and what the checkers said.
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
        runs = choose(convergence.read_runs(flags.directory), flags.org, flags.system)
        if tree.exists():
            raise RunError(f'{tree} is there already; remove it, or choose another --out')
        if flags.system_description:
            description = json.loads(flags.system_description.read_text())
        else:
            description = system_description.describe(runs[0].config, runs[0].environment)
        write(tree, runs, description, code_of(runs[0].environment['commit']))
        minutes, said = judge(tree)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(said)
    print(f'{tree}: {"REFUSED" if minutes is None else f"accepted, result {minutes:.3f} minutes"}')
    return 1 if minutes is None else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
