# SPDX-License-Identifier: Apache-2.0
"""Writes a page about finished runs: curves, distributions, verdicts, configuration, environment.

    report.py DIR [--out=FILE.html] [--open]

DIR holds the work directories of one experiment (see run_seeds.py), or is one. The page is one
file that needs nothing else; its charts are also written as PNGs into a folder beside it.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from reporting import charts, page, run_sets, verdicts
from reporting.finished_run import FinishedRun, RunError


def judge(runs: Sequence[FinishedRun]) -> list[page.Verdict]:
    """What the official checkers say of a set of runs."""
    first, ruleset, logs = runs[0], runs[0].ruleset, [run.log for run in runs]
    judged = [(run, *verdicts.complies(run)) for run in runs]
    rejected = [(run, text) for run, passed, text in judged if not passed]
    words = f'{len(runs) - len(rejected)} of {len(runs)} logs'
    if rejected:
        words += f'; the first that is rejected, {rejected[0][0].directory.name}: {rejected[0][1]}'
    mixed = run_sets.differences(runs)
    found: list[page.Verdict] = [
        (f'compliance checker, ruleset {ruleset}', not rejected, words),
        ('seed checker', *verdicts.seeds_differ(logs, ruleset)),
        ('one experiment: hyperparameters, code version and data are the same', not mixed,
         '; '.join(mixed[:3])),
    ]  # fmt: skip
    question = 'RCP checker, official reference points'
    if not verdicts.official_counts(first):
        return [*found, (question, None, 'there are none for this configuration')]
    number = verdicts.runs_per_result(first.config.benchmark)
    if len(runs) < number:
        return [*found, (question, None, f'takes {number} runs')]
    points = verdicts.official_points(first.config.benchmark, ruleset)
    passed, why = verdicts.converges_as(logs[:number], points, ruleset)
    return [*found, (question, passed, f'of the first {number} runs: {why}')]


def read(directory: Path) -> tuple[list[FinishedRun], list[RunError]]:
    """The runs that can be drawn, and the errors of others.

    Raises:
      RunError: when there are none.
    """
    finished, problems = run_sets.survey(directory)
    runs = []
    for run in finished:
        try:
            _ = run.working_seconds
            runs.append(run)
        except RunError as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    return runs, problems


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directory', type=Path, metavar='DIR')
    parser.add_argument('--out', type=Path, help='default: DIR/report.html')
    parser.add_argument('--open', action='store_true', help='show it in a browser')
    flags = parser.parse_args(arguments)
    out = flags.out or flags.directory / 'report.html'
    if not out.suffix:
        parser.error(f'--out={out} must be the name of a file, such as {out}.html')
    try:
        runs, problems = read(flags.directory)
        drawn = charts.draw(runs, verdicts.official_counts(runs[0]))
        pictures = out.with_suffix('')
        pictures.mkdir(parents=True, exist_ok=True)
        for name, chart in drawn.items():
            (pictures / f'{name}.png').write_bytes(chart.png)
        text = page.make(runs, problems, drawn.values(), judge(runs), out.parent)
        out.write_text(text, encoding='utf-8')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{page.summary(runs)}\nwritten to {out} and {pictures}/')
    if flags.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
