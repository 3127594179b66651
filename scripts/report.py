# SPDX-License-Identifier: Apache-2.0
"""Writes a page about finished runs: curves, distributions, verdicts, configuration, environment.

    report.py DIR [--out=FILE.html] [--open]

DIR holds the work directories of one experiment (see run_seeds.py), or is one. The page is one
file that needs nothing else; its charts are also written as PNGs into a folder beside it.
"""

import argparse
import html
import statistics
import sys
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hyperparameters
from reporting import charts, convergence, verdicts
from reporting.convergence import FinishedRun, RunError

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


def escape(value: Any) -> str:
    """Text for a page."""
    return html.escape(str(value))


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table of texts; the first column heads its row."""
    lines = [f'<tr>{"".join(f"<th>{escape(cell)}</th>" for cell in head)}</tr>'] if head else []
    for first, *others in rows:
        cells = ''.join(f'<td>{escape(cell)}</td>' for cell in others)
        lines.append(f'<tr><th>{escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


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
    text += f', after {statistics.mean(reached):.2f} epochs on average'
    if len(reached) > 1:
        text += (
            f' (standard deviation {statistics.stdev(reached):.2f}, '
            f'{min(reached)} to {max(reached)})'
        )
    minutes = statistics.median(run.minutes for run in runs)
    return f'{text}. Median time from run_start to run_stop: {60 * minutes:.1f} s.'


def judge(runs: Sequence[FinishedRun]) -> list[tuple[str, bool | None, str]]:
    """The checkers' verdicts: (question, whether it holds or None if it cannot be asked, why)."""
    found = []
    refused = [(run, *verdicts.complies(run.log)) for run in runs]
    refused = [(run, text) for run, passed, text in refused if not passed]
    words = f'{len(runs) - len(refused)} of {len(runs)} logs'
    if refused:
        words += f'; the first that is refused, {refused[0][0].directory.name}: {refused[0][1]}'
    found.append((f'compliance checker, ruleset {verdicts.RULESET}', not refused, words))
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


def verdict_table(found: Iterable[tuple[str, bool | None, str]]) -> str:
    """The verdicts as a table; a refusal is bold and underlined."""
    words = {True: 'yes', False: '<span class="no">NO</span>', None: '–'}
    rows = ''.join(
        f'<tr><th>{escape(question)}</th><td>{words[passed]}</td><td>{escape(text)}</td></tr>'
        for question, passed, text in found
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


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


def page(runs: Sequence[FinishedRun], faults: Sequence[RunError], drawn: Mapping[str, Any]) -> str:
    """The whole page."""
    first = runs[0]
    title = f'{first.config["model"]} on {first.config["dataset"]}: {len(runs)} runs'
    shown = ''.join(
        f'<figure>{charts.svg(figure, caption)}<figcaption>{escape(caption)}</figcaption></figure>'
        for caption, figure in drawn.values()
    )
    unfinished = ''.join(f'<pre>{escape(fault)}</pre>' for fault in faults)
    if faults:
        unfinished = f'<h2>Left out: {len(faults)} that cannot be used</h2>{unfinished}'
    config = [
        (entry.name, first.config[entry.name], entry.help)
        for entry in hyperparameters.TABLE
        if entry.name not in ('seed', 'data_dir')  # Each run's own; a folder of one machine.
    ]
    results = [
        (run.directory.name, run.config['seed'], 'reached' if run.reached else 'MISSED', run.epochs,
         f'{run.accuracies[-1][1]:.5f}', f'{60 * run.minutes:.1f}')
        for run in runs
    ]  # fmt: skip
    head = ('run', 'seed', 'target', 'epochs', 'last top-1', 'seconds')
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p>{escape(summary(runs))}</p>'
        f'<div class="charts">{shown}</div>'
        f'<h2>Verdicts</h2>{verdict_table(judge(runs))}{unfinished}'
        f'<h2>Configuration</h2><div class="help">{table(config)}</div>'
        f'<h2>Environment of {escape(first.directory.name)}</h2>{table(flat(first.environment))}'
        f'<h2>Runs</h2><details><summary>Every run</summary>{table(results, head)}</details>'
        '</body></html>\n'
    )


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
        runs, faults = convergence.survey(flags.directory)
        if not runs:
            raise faults[0]
        drawn = figures(runs)
        pictures = out.with_suffix('')
        pictures.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in drawn.items():
            charts.png(figure, pictures / f'{name}.png')
        out.write_text(page(runs, faults, drawn))
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{summary(runs)}\nwritten to {out} and {pictures}/')
    if flags.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
