# SPDX-License-Identifier: Apache-2.0
"""Charts of a set of runs: from `FinishedRun`s to figures, as SVG for a page and PNG for the rest.

Made for black and white and for narrow screens: what must be told apart differs in lightness and
in dashes, text is large against the figure, and every figure is legible at 360 pixels of width.
"""

import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reporting.convergence import FinishedRun
from reporting.markup import Markup, opening

WIDTH, HEIGHT = 4.6, 3.0  # Inches.
RUN, MEDIAN, TARGET = '#9a9a9a', '#000000', '#b00020'
MOST_SEEDS = 100  # More lines than this add weight to the page and nothing to see.
matplotlib.rcParams.update({
    'font.size': 9,
    'font.family': 'sans-serif',
    'svg.fonttype': 'none',
    'svg.hashsalt': 'charts',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#e4e4e4',
    'axes.axisbelow': True,
    'legend.frameon': False,
    'legend.fontsize': 8,
})  # fmt: skip


def _figure(x: str, y: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element that scales to the width of its place."""
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    text = file.getvalue()
    text = text[text.index('<svg') :]
    start, rest = text.split('>', 1)
    box = start[start.index('viewBox="') :].split('"')[1]
    return Markup(f'{opening("svg", role="img", aria_label=label, viewBox=box)}{rest}')


def png(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG."""
    figure.savefig(path, dpi=150)


def _all_and_median(axes: Axes, curves: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Every run's curve in grey, and the median of those that still run in black."""
    axes.add_collection(
        LineCollection(list(curves)[:MOST_SEEDS], colors=RUN, linewidths=0.6, alpha=0.7)
    )
    points = defaultdict(list)
    for curve in curves:
        for x, y in curve:
            points[x].append(y)
    # Where most runs have ended, a median would be that of the slow ones.
    kept = sorted(x for x, ys in points.items() if 2 * len(ys) >= len(curves))
    axes.plot(kept, [statistics.median(points[x]) for x in kept], color=MEDIAN, linewidth=1.8)
    axes.plot([], [], color=RUN, linewidth=0.8, label='each seed')
    axes.plot([], [], color=MEDIAN, linewidth=1.8, label='median')
    axes.autoscale_view()


def accuracy(runs: Sequence[FinishedRun]) -> Figure:
    """Accuracy after each evaluation, with the target."""
    figure, axes = _figure('epoch', 'top-1 accuracy')
    _all_and_median(axes, [run.accuracies for run in runs])
    target = runs[0].config['target_top1']
    axes.axhline(target, color=TARGET, linestyle='--', linewidth=1.2, label=f'target {target:g}')
    axes.set_ylim(0, 1)
    axes.legend(loc='lower right')
    return figure


def loss(runs: Sequence[FinishedRun]) -> Figure:
    """Training and evaluation loss."""
    figure, axes = _figure('epoch', 'loss')
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    curves = [
        [(line['epoch'], line['loss']) for line in run.metrics if 'loss' in line] for run in runs
    ]
    _all_and_median(axes, curves)
    points = defaultdict(list)
    for run in runs:
        for line in run.metrics:
            if line.get('eval_loss') is not None:
                points[line['epoch']].append(line['eval_loss'])
    kept = sorted(x for x, ys in points.items() if 2 * len(ys) >= len(runs))
    medians = [statistics.median(points[x]) for x in kept]
    axes.plot(kept, medians, color=MEDIAN, linestyle=':', linewidth=1.5, label='median, evaluation')
    axes.legend(loc='upper right')
    return figure


def epochs(runs: Sequence[FinishedRun], official: Sequence[int]) -> Figure:
    """How many runs met their target after how many epochs.

    Args:
      runs: those that met it count.
      official: epochs of the official reference's runs with the same batch; empty if none exist.
    """
    figure, axes = _figure('epochs to the target', 'share of the runs')
    for values, label, style in (
        ([run.epochs for run in runs if run.reached], 'these runs', {'color': '#5c5c5c'}),
        (official, 'official reference', {'fill': False, 'hatch': '////', 'edgecolor': MEDIAN}),
    ):
        counts = sorted(Counter(values).items())
        if counts:
            x = [epoch for epoch, _ in counts]
            shares = [count / len(values) for _, count in counts]
            label = f'{label} (n = {len(values)}, mean {statistics.mean(values):.2f})'
            axes.bar(x, shares, width=0.8, label=label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.25)
    axes.legend(loc='upper left')
    return figure


def learning_rate(run: FinishedRun) -> Figure:
    """The rate that the optimizer used."""
    figure, axes = _figure('epoch', 'learning rate', height=2.4)
    lines = [line for line in run.metrics if 'learning_rate' in line]
    axes.plot([line['epoch'] for line in lines], [line['learning_rate'] for line in lines],
              color=MEDIAN, linewidth=1.5)  # fmt: skip
    axes.set_ylim(bottom=0)
    return figure


def images_per_second(run: FinishedRun) -> list[tuple[float, float]]:
    """The (epoch, images per second) of training, without evaluations and pauses."""
    lines = [line for line in run.metrics if 'images_per_second' in line]
    return [(line['epoch'], line['images_per_second']) for line in lines]


def throughput(runs: Sequence[FinishedRun]) -> Figure:
    """Images per second while training."""
    figure, axes = _figure('epoch', 'images/s', height=2.4)
    _all_and_median(axes, [images_per_second(run) for run in runs])
    axes.set_ylim(bottom=0)
    axes.legend(loc='lower right')
    return figure


def time_split(run: FinishedRun) -> Mapping[str, float]:
    """Seconds of a run between run_start and run_stop, by what they were spent on."""
    lines = run.metrics
    training = [line for line in lines if 'seconds' in line]
    waiting = sum(line['input_wait'] * line['seconds'] for line in training)
    split = {
        'waiting for input': waiting,
        'training step': sum(line['seconds'] for line in training) - waiting,
        'evaluation': sum(line.get('eval_seconds', 0.0) for line in lines),
        'checkpoint': sum(line.get('checkpoint_seconds', 0.0) for line in lines),
    }
    working = run.working_seconds
    split['other work'] = max(working - sum(split.values()), 0.0)
    return split | {'pauses, start and end': max(60 * run.minutes - working, 0.0)}


def time_bar(split: Mapping[str, float]) -> Figure:
    """One bar, split; told apart by lightness and hatching."""
    figure, axes = _figure('seconds', '', height=1.7)
    styles: list[dict[str, Any]] = [
        {'color': '#ffffff', 'hatch': '\\\\\\'}, {'color': '#bdbdbd'}, {'color': '#5c5c5c'},
        {'color': '#ffffff', 'hatch': '///'}, {'color': '#bdbdbd', 'hatch': 'xxx'},
        {'color': '#ffffff'},
    ]  # fmt: skip
    start = 0.0
    for (name, seconds), style in zip(split.items(), styles, strict=True):
        label = f'{name} {seconds:.1f} s'
        axes.barh(0, seconds, left=start, edgecolor='black', linewidth=0.8, label=label, **style)
        start += seconds
    axes.set_yticks([])
    axes.grid(visible=False)
    figure.legend(loc='outside upper left', ncols=2, fontsize=8)
    return figure
