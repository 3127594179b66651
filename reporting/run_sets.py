# SPDX-License-Identifier: Apache-2.0
"""Sets of finished runs: read from a folder, and judged to be repetitions of one experiment."""

import dataclasses
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from reporting.finished_run import FinishedRun, RunError, read_run
from settings import hyperparameters
from settings.command_line import DEFAULT_CONFIG

DAMAGED = '.damaged-'  # In the name of work directories that were set aside.
_ROOT = Path(__file__).resolve().parent.parent


def command(script: str, *arguments: str | Path) -> str:
    """A command line for a script of this repository, that can be pasted anywhere."""
    return shlex.join(['python', str(_ROOT / 'scripts' / script), *map(str, arguments)])


def repeat(run: FinishedRun, number: int, folder: Path, *overrides: str) -> str:
    """The command that makes runs like this one, with other seeds, until `folder` has `number`."""
    config = run.directory.resolve() / 'config.json'
    return command(
        'run_seeds.py', f'--config={config}', '--config.seed=none', *overrides,
        f'--runs={number}', f'--out={folder.resolve()}',
    )  # fmt: skip


def spread(counts: Sequence[int], units: str) -> str:
    """Mean, sample standard deviation and range of where runs met their target, in words."""
    text = f'{statistics.mean(counts):,.2f} {units} on average'
    if len(counts) < 2:
        return text
    return (
        f'{text} (sample standard deviation {statistics.stdev(counts):,.2f}, '
        f'{min(counts):,} to {max(counts):,})'
    )


def survey(directory: Path) -> tuple[list[FinishedRun], list[RunError]]:
    """The finished runs in a folder of work directories, by name, and the errors of others.

    A work directory itself counts as a folder of one.

    Raises:
      RunError: when there is no run at all.
    """
    if not directory.is_dir():
        raise RunError(f'there is no folder {directory}')
    logs = [x for x in sorted(directory.glob('*/mlperf.log')) if DAMAGED not in x.parent.name]
    if (directory / 'mlperf.log').exists():
        logs = [directory / 'mlperf.log']
    if not logs:
        out = f'--out={directory.resolve()}'
        makes = command('run_seeds.py', f'--config={DEFAULT_CONFIG}', '--runs=10', out)
        raise RunError(
            f'there are no runs in {directory}: it must hold work directories of main.py, such as '
            f'this makes:\n  {makes}'
        )
    runs, problems = [], []
    for log in logs:
        try:
            runs.append(read_run(log.parent))
        except RunError as error:
            problems.append(error)
    return runs, problems


def read_runs(directory: Path) -> list[FinishedRun]:
    """The runs in a folder of work directories, by name.

    Raises:
      RunError: when there is none, or one of them has not ended or cannot be used.
    """
    runs, problems = survey(directory)
    if problems:
        raise problems[0]
    return runs


def differences(runs: Sequence[FinishedRun]) -> list[str]:
    """What keeps runs from being repetitions of one experiment, as sentences.

    Their hyperparameters, code version, data and seeds are compared.
    """
    problems = []
    for run in runs:
        starts = (*run.environment.get('earlier', ()), run.environment)
        commits = list(dict.fromkeys(start['commit'] for start in starts))
        if len(commits) > 1:
            versions = ', then '.join(commits)
            problems.append(f'{run.directory.name} was run by several code versions: {versions}')
    first, *others = runs
    seen = {first.config.seed: first.directory.name}
    for run in others:
        theirs = dataclasses.asdict(run.config) | {'seed': first.config.seed}
        found = [f'hyperparameter {d}' for d in hyperparameters.differences(first.config, theirs)]
        for name, key in (('code version', 'commit'), ('data', 'dataset')):
            there, here = run.environment[key], first.environment[key]
            if there != here:
                found.append(f'{name}: {there} there, {here} here')
        name = f'{run.directory.name} and {first.directory.name}'
        problems += [f'{name} differ in {what}' for what in found]
        seed = run.config.seed
        if seed in seen:
            problems.append(f'{run.directory.name} and {seen[seed]} have the same seed {seed}')
        seen[seed] = run.directory.name
    return problems


def reject_mixture(runs: Sequence[FinishedRun]) -> None:
    """Checks that runs are repetitions of one experiment.

    Raises:
      RunError: listing what differs.
    """
    problems = differences(runs)
    if len(problems) > 10:
        problems = [*problems[:10], f'… and {len(problems) - 10} more']
    if problems:
        shown = '\n  '.join(problems)
        raise RunError(
            f'the runs in {runs[0].directory.parent} are not of one experiment:\n  {shown}\n'
            'Keep only those that belong together in the folder.'
        )


def shortcomings(runs: Sequence[FinishedRun], number: int, may_miss: int) -> list[str]:
    """What keeps runs from being a complete set, with remedies.

    Args:
      runs: of one experiment.
      number: how many there must be at least.
      may_miss: how many of them may have missed their target.
    """
    found, folder = [], runs[0].directory.parent
    missed = [run.directory.name for run in runs if not run.reached]
    if len(missed) > may_miss:
        names = ', '.join(missed[:5])
        found.append(
            f'{len(missed)} of {len(runs)} runs missed their target ({names}); '
            f'{"one" if may_miss else "none"} may'
        )
    if len(runs) < number:
        found.append(
            f'{len(runs)} runs are there, and it takes at least {number}. This makes the others:\n'
            f'    {repeat(runs[0], number, folder)}'
        )
    return found
