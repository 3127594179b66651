# SPDX-License-Identifier: Apache-2.0
"""Charts of a set of runs: from `FinishedRun`s to figures, as SVG for a page and PNG for the rest.

Made for black and white, for dark pages and for narrow screens: what must be told apart differs in
lightness and in dashes, text is large against the figure, and every figure is legible at 360 pixels
of width. In the SVG, colours are variables of the page's style.
"""

import io
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from reporting.finished_run import FinishedRun
from settings.plan import Target

WIDTH, HEIGHT = 4.6, 3.0  # Inches.
RUN, MEDIAN, TARGET, GRID, BAR = '#9a9a9a', '#000000', '#b00020', '#e4e4e4', '#5c5c5c'
_VARIABLES = {
    RUN: 'run',
    MEDIAN: 'ink',
    TARGET: 'target',
    GRID: 'grid',
    BAR: 'bar',
    '#ffffff': 'paper',
}
MOST_SEEDS = 100  # More lines than this add weight to the page and nothing to see.
_STYLE: Any = {
    'font.size': 9,
    'font.family': 'sans-serif',
    'svg.fonttype': 'none',
    'svg.hashsalt': 'charts',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': GRID,
    'axes.axisbelow': True,
    'legend.frameon': False,
    'legend.fontsize': 8,
}
Curve = list[tuple[float, float]]


class Chart(NamedTuple):
    """A figure for a page, and as a PNG file's bytes."""

    caption: str
    svg: Markup
    png: bytes


def draw(runs: Sequence[FinishedRun], official: Sequence[int]) -> dict[str, Chart]:
    """The charts of a set of runs by name.

    Args:
      runs: of one experiment.
      official: where the official reference's runs with the same batch met the target; empty if
        there are none.

    Raises:
      RunError: when the metrics of a run cannot be used.
    """
    longest = max(runs, key=lambda run: run.count)
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    with matplotlib.rc_context(_STYLE):
        figures = {
            'quality': (f'{"Error" if _is_error(runs[0].plan.target) else "Quality"} on the '
                        'evaluation set. A dot is where a run met the target.', quality(runs)),
            'to_target': (f'{runs[0].units.capitalize()} to the target.',
                          to_target(runs, official)),
            'loss': ('Training loss, as the optimizer sees it, and evaluation loss.', loss(runs)),
            'learning_rate': (f'Learning rate of the longest run, {longest.directory.name}.',
                              learning_rate(longest)),
            'throughput': ('Throughput while training.', throughput(runs)),
            'time': (f'Where the {middle.seconds:,.1f} s of the median run, '
                     f'{middle.directory.name}, went.', time_bars(time_split(middle))),
        }  # fmt: skip
        return {
            name: Chart(caption, _svg(figure, caption), _png(figure))
            for name, (caption, figure) in figures.items()
        }


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout='constrained')
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    """Makes the y axis so, with labels between powers of ten where there is room."""
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element that scales to the width of its place."""
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    start, rest = file.getvalue().partition('<svg')[2].split('>', 1)
    box = start.partition('viewBox="')[2].split('"')[0]
    opening = Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(label, box)
    for colour, name in _VARIABLES.items():
        rest = rest.replace(colour, f'var(--{name})')
    return opening + Markup(rest)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=150)
    return file.getvalue()


def curve(run: FinishedRun, key: str) -> Curve:
    """(position, value) of the lines of a run's metrics that have a value of this name."""
    unit = run.plan.course.unit
    return [(line[unit], line[key]) for line in run.metrics if line.get(key) is not None]


def _median(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Positions and medians. Positions that fewer than half of the runs reached are left out."""
    points = defaultdict(list)
    for x, y in itertools.chain.from_iterable(curves):
        points[x].append(y)
    kept = sorted(x for x, ys in points.items() if 2 * len(ys) >= len(curves))
    return kept, [statistics.median(points[x]) for x in kept]


def _all_and_median(axes: Axes, curves: Sequence[Curve]) -> None:
    """Every run's curve in grey, and the median of those that still run in black."""
    curves = [curve for curve in curves if curve]
    axes.add_collection(LineCollection(curves[:MOST_SEEDS], colors=RUN, linewidths=0.6, alpha=0.7))
    axes.plot(*_median(curves), color=MEDIAN, linewidth=1.8, label='median')
    axes.plot([], [], color=RUN, linewidth=0.8, label='each seed')
    axes.autoscale_view()


def _is_error(target: Target) -> bool:
    """Whether what is missing from the best possible quality is drawn, and not the quality."""
    return target.at_least and math.isfinite(target.largest)


def quality(runs: Sequence[FinishedRun]) -> Figure:
    """The result of each evaluation on a logarithmic axis, with the target.

    A quality that is better when larger, and has a largest value, is drawn as the error. One of 0
    is drawn as half an example's.
    """
    plan = runs[0].plan
    target, is_error = plan.target, _is_error(plan.target)

    def drawn(value: float) -> float:
        return max(target.largest - value, 0.5 / plan.num_eval) if is_error else value

    words = f'{target.largest:g} − {target.words}' if is_error else target.words
    figure, axes = _figure(plan.course.unit, words)
    _logarithmic(axes)
    _all_and_median(axes, [[(x, drawn(y)) for x, y in run.results] for run in runs])
    label = f'target {target.value:g}'
    axes.axhline(drawn(target.value), color=TARGET, linestyle='--', linewidth=1.2, label=label)
    crossings = [(run.count, drawn(run.results[-1][1])) for run in runs if run.reached]
    if crossings:
        axes.plot(*zip(*crossings, strict=True), 'o', color=TARGET, markersize=3, alpha=0.6)
    axes.legend(loc='lower left' if is_error else 'upper right')
    return figure


def loss(runs: Sequence[FinishedRun]) -> Figure:
    """Training and evaluation loss."""
    figure, axes = _figure(runs[0].plan.course.unit, 'loss')
    _logarithmic(axes)
    _all_and_median(axes, [curve(run, 'loss') for run in runs])
    medians = _median([curve(run, 'eval_loss') for run in runs])
    axes.plot(*medians, color=MEDIAN, linestyle=':', linewidth=1.5, label='median, evaluation')
    axes.legend(loc='upper right')
    return figure


def to_target(runs: Sequence[FinishedRun], official: Sequence[int]) -> Figure:
    """How many runs met their target after how many units; for `official` see `draw`."""
    figure, axes = _figure(f'{runs[0].units} to the target', 'runs')
    evaluated = [0, *(evaluation.count for evaluation in runs[0].plan.evaluations)]
    width = 0.8 * min(after - before for before, after in itertools.pairwise(evaluated))
    reached = [run.count for run in runs if run.reached]
    for values, label, style in (
        (reached, 'these runs', {'color': BAR}),
        (official, 'official reference', {'fill': False, 'hatch': '////', 'edgecolor': MEDIAN}),
    ):
        if values:
            counts = sorted(Counter(values).items())
            label = f'{label} (n = {len(values)}, mean {statistics.mean(values):,.2f})'
            places, heights = zip(*counts, strict=True)
            axes.bar(places, heights, width, label=label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if 0 < len({*reached, *official}) <= 5:
        axes.set_xticks(sorted({*reached, *official}))
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(y=0.25)
    axes.legend(loc='upper left')
    return figure


def learning_rate(run: FinishedRun) -> Figure:
    """The rate that the optimizer used."""
    figure, axes = _figure(run.plan.course.unit, 'learning rate')
    axes.plot(*zip(*curve(run, 'learning_rate'), strict=True), color=MEDIAN, linewidth=1.5)
    axes.set_ylim(bottom=0)
    return figure


def throughput(runs: Sequence[FinishedRun]) -> Figure:
    """What was trained on per second, without evaluations and pauses."""
    course = runs[0].plan.course
    figure, axes = _figure(course.unit, course.throughput_unit)
    _all_and_median(axes, [curve(run, 'throughput') for run in runs])
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
    return split | {'pauses, start and end': max(run.seconds - working, 0.0)}


def time_bars(split: Mapping[str, float]) -> Figure:
    """A bar for each part."""
    figure, axes = _figure('seconds', '')
    labels = [f'{name}\n{seconds:,.1f} s' for name, seconds in split.items()]
    axes.barh(labels, list(split.values()), height=0.6, color=BAR)
    axes.invert_yaxis()
    axes.grid(axis='y', visible=False)
    return figure
