# SPDX-License-Identifier: Apache-2.0
"""Writes a page about finished runs: curves, distributions, verdicts, configuration, environment.

    report.py DIR [--out=FILE.html] [--open]

DIR holds the work directories of one experiment (see run_seeds.py), or is one. The page is one
file that needs nothing else; its charts are also written as PNGs into a folder beside it.
"""

import argparse
import statistics
import sys
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting import charts, convergence, verdicts
from reporting.convergence import FinishedRun, RunError
from reporting.markup import Markup, element, join, opening
from settings import hyperparameters

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
.charts { display: grid; gap: 1.5rem;
          grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
th { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
.no { font-weight: 700; text-decoration: underline; }
@media (max-width: 40rem) { .help td:last-child { display: none; } }
@media print { h2, figure { break-inside: avoid; } }
"""


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> Markup:
    """A table of texts; the first column heads its row."""
    lines = [element('tr', *(element('th', cell) for cell in head))] if head else []
    for first, *others in rows:
        lines.append(element('tr', element('th', first), *(element('td', c) for c in others)))
    return element('div', element('table', *lines), class_='scroll')


def official_epochs(config: Mapping[str, Any]) -> list[int]:
    """Epochs of the official reference's runs with the same batch; none but for ImageNet."""
    if config['dataset'] != 'imagenet2012' or config['model'] != 'resnet50':
        return []
    return [
        epoch
        for record in verdicts.official_points().values()
        if record['BS'] == config['global_batch_size']
        and record['Hyperparams']['optimizer'] == config['optimizer']
        for epoch in record['Epochs to converge']
    ]


def summary(runs: Sequence[FinishedRun]) -> str:
    """What came out, in a sentence or two."""
    reached = [run.epochs for run in runs if run.reached]
    target = runs[0].config['target_top1']
    text = f'{len(reached)} of {len(runs)} runs reached a top-1 accuracy of {target:g}'
    if not reached:
        return f'{text}.'
    text += f', after {convergence.spread(reached)}'
    minutes = statistics.median(run.minutes for run in runs)
    working = statistics.median(run.working_seconds for run in runs)
    return (
        f'{text}. Median time from run_start to run_stop: {60 * minutes:.1f} s; of training, '
        f'evaluation and checkpoints, without the pauses of interrupted runs: {working:.1f} s.'
    )


def machine(run: FinishedRun) -> str:
    """What a run was made on, in a sentence."""
    environment = run.environment
    count, kind = environment['devices'], environment['device_kind']
    text = f'{run.directory.name} ran on {count} × {kind} in {run.config["dtype"]}'
    facts = environment.get('machine')
    if isinstance(facts, Mapping) and {'processor', 'usable_cores'} <= facts.keys():
        text += f', with {facts["usable_cores"]} cores of {facts["processor"] or "a CPU"}'
    return f'{text}; code version {environment["commit"]}.'


def judge(runs: Sequence[FinishedRun]) -> list[tuple[str, bool | None, str]]:
    """The checkers' verdicts: (question, whether it holds or None if it cannot be asked, why)."""
    found = []
    rejected = [(run, *verdicts.complies(run.log)) for run in runs]
    rejected = [(run, text) for run, passed, text in rejected if not passed]
    words = f'{len(runs) - len(rejected)} of {len(runs)} logs'
    if rejected:
        words += f'; the first that is rejected, {rejected[0][0].directory.name}: {rejected[0][1]}'
    found.append((f'compliance checker, ruleset {verdicts.RULESET}', not rejected, words))
    found.append(('seed checker', *verdicts.seeds_differ([run.log for run in runs])))
    mixed = convergence.differences(runs)
    found.append((
        'one experiment: hyperparameters, code version and data are the same',
        not mixed,
        '; '.join(mixed[:3]),
    ))  # fmt: skip
    question = 'RCP checker, official reference points, first five runs'
    if not official_epochs(runs[0].config):
        found.append((question, None, 'there are none for this model, data and batch'))
    elif len(runs) < verdicts.RUNS_PER_RESULT:
        found.append((question, None, f'takes {verdicts.RUNS_PER_RESULT} runs'))
    else:
        logs = [run.log for run in runs[: verdicts.RUNS_PER_RESULT]]
        found.append((question, *verdicts.converges_as(logs, verdicts.official_points())))
    return found


def verdict_table(found: Iterable[tuple[str, bool | None, str]]) -> Markup:
    """The verdicts as a table; a rejection is bold and underlined."""
    words = {True: 'yes', False: element('span', 'NO', class_='no'), None: '–'}
    return table((question, words[passed], text) for question, passed, text in found)


def figures(runs: Sequence[FinishedRun]) -> dict[str, tuple[str, Any]]:
    """The charts by name: (caption, figure)."""
    longest = max(runs, key=lambda run: run.epochs)
    middle = sorted(runs, key=lambda run: run.minutes)[len(runs) // 2]
    return {
        'accuracy': ('Accuracy on the evaluation set.', charts.accuracy(runs)),
        'loss': ('Training loss (with label smoothing) and evaluation loss (without).',
                 charts.loss(runs)),
        'epochs': ('Epochs to the target.',
                   charts.epochs(runs, official_epochs(runs[0].config))),
        'learning_rate': (f'Learning rate of the longest run, {longest.directory.name}.',
                          charts.learning_rate(longest)),
        'throughput': ('Throughput while training.', charts.throughput(runs)),
        'time': (f'Where the time of the median run, {middle.directory.name}, went.',
                 charts.time_bar(charts.time_split(middle))),
    }  # fmt: skip


def flat(values: Mapping[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
    """The leaves of nested mappings, with their paths."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def left_out(problems: Sequence[RunError]) -> Markup:
    """Why some runs are not in the report."""
    if not problems:
        return Markup()
    title = element('h2', f'Left out: {len(problems)} that cannot be used')
    return join([title, *(element('pre', problem) for problem in problems)])


def page(
    runs: Sequence[FinishedRun], problems: Sequence[RunError], drawn: Mapping[str, Any]
) -> Markup:
    """The whole page."""
    first = runs[0]
    title = f'{first.config["model"]} on {first.config["dataset"]}: {len(runs)} runs'
    shown = (
        element('figure', charts.svg(figure, caption), element('figcaption', caption))
        for caption, figure in drawn.values()
    )
    config = [
        (entry.name, first.config[entry.name], entry.help)
        for entry in hyperparameters.TABLE
        if entry.name not in ('seed', 'data_dir')  # Each run's own; a folder of one machine.
    ]
    results = [
        (run.directory.name, run.config['seed'], 'reached' if run.reached else 'MISSED', run.epochs,
         f'{run.accuracies[-1][1]:.5f}', f'{60 * run.minutes:.1f}', f'{run.working_seconds:.1f}')
        for run in runs
    ]  # fmt: skip
    head = ('run', 'seed', 'target', 'epochs', 'last top-1', 'seconds', 'without pauses')
    viewport = 'width=device-width, initial-scale=1'
    body = (
        element('h1', title),
        element('p', summary(runs)),
        element('p', f'Machine: {machine(first)}'),
        element('div', *shown, class_='charts'),
        element('h2', 'Verdicts'),
        verdict_table(judge(runs)),
        left_out(problems),
        element('h2', 'Configuration'),
        element('div', table(config), class_='help'),
        element('h2', f'Environment of {first.directory.name}'),
        table(flat(first.environment)),
        element('h2', 'Runs'),
        element('details', element('summary', 'Every run'), table(results, head)),
    )
    return join([
        Markup('<!DOCTYPE html>'),
        element(
            'html',
            element(
                'head',
                opening('meta', charset='utf-8'),
                opening('meta', name='viewport', content=viewport),
                element('title', title),
                element('style', Markup(STYLE)),
            ),
            element('body', *body),
            lang='en',
        ),
        Markup('\n'),
    ])  # fmt: skip


def with_metrics(
    runs: Sequence[FinishedRun],
) -> tuple[list[FinishedRun], list[RunError]]:
    """The runs whose metrics can be drawn, and the errors of others."""
    good, problems = [], []
    for run in runs:
        try:
            _ = run.working_seconds
            good.append(run)
        except RunError as error:
            problems.append(error)
    return good, problems


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
    try:
        finished, problems = convergence.survey(flags.directory)
        runs, unknown = with_metrics(finished)
        problems += unknown
        if not runs:
            raise problems[0]
        drawn = figures(runs)
        pictures = out.with_suffix('')
        pictures.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in drawn.items():
            charts.png(figure, pictures / f'{name}.png')
        out.write_text(page(runs, problems, drawn), encoding='utf-8')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{summary(runs)}\nwritten to {out} and {pictures}/')
    if flags.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
