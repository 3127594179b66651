# SPDX-License-Identifier: Apache-2.0
"""The page about a set of runs: from `FinishedRun`s, charts and verdicts to HTML.

Whatever folders, configurations, environments and logs say is escaped: `Markup` alone is HTML.
"""

import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from reporting import run_sets
from reporting.charts import Chart
from reporting.finished_run import FinishedRun, RunError
from settings import hyperparameters

_TEMPLATE = Path(__file__).with_name('page.html')
Verdict = tuple[str, bool | None, str]  # A question, its answer or None if it cannot be asked, why.


def fill(template: str, **values: Any) -> str:
    """HTML with `$name` replaced by values, escaped; control characters are shown as codes."""
    text = string.Template(template).substitute({k: escape(v) for k, v in values.items()})
    return ''.join(c if c.isprintable() or c in '\n\t' else repr(c)[1:-1] for c in text)


def _all(template: str, items: Iterable[Sequence[Any]]) -> Markup:
    return Markup('\n').join(Markup(template).format(*item) for item in items)


def _rows(rows: Iterable[Sequence[Any]]) -> Markup:
    """Rows of a table; the first column heads its row."""
    cells = Markup('<td>{}</td>')
    parts = ((first, Markup().join(map(cells.format, others))) for first, *others in rows)
    return _all('<tr><th>{}</th>{}</tr>', parts)


def flat(values: Mapping[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
    """The leaves of nested mappings, with their paths."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def summary(runs: Sequence[FinishedRun]) -> str:
    """What came out, in a sentence or two."""
    reached, target = [run.count for run in runs if run.reached], runs[0].plan.target
    text = (
        f'{len(reached)} of {len(runs)} runs reached {target.words} of at '
        f'{"least" if target.at_least else "most"} {target.value:g}'
    )
    if not reached:
        return f'{text}.'
    whole = statistics.median(run.seconds for run in runs)
    working = statistics.median(run.working_seconds for run in runs)
    return (
        f'{text}, after {run_sets.spread(reached, runs[0].units)}. Median time from run_start to '
        f'run_stop: {whole:.1f} s; of training, evaluation and checkpoints, without the pauses of '
        f'interrupted runs: {working:.1f} s.'
    )


def machine(run: FinishedRun) -> str:
    """What a run was made on, in a sentence."""
    environment = run.environment
    count, kind = environment['devices'], environment['device_kind']
    text = f'{run.directory.name} ran on {count} × {kind} in {run.config.dtype}'
    facts = environment.get('machine')
    if isinstance(facts, Mapping) and {'processor', 'usable_cores'} <= facts.keys():
        text += f', with {facts["usable_cores"]} cores of {facts["processor"] or "a CPU"}'
    return f'{text}; code version {environment["commit"]}.'


def speed(run: FinishedRun) -> tuple[str, str]:
    """Throughput and MFU of a run's training; '–' where there is none."""
    throughput, mfu = run.average('throughput'), run.average('mfu')
    return (
        '–' if throughput is None else f'{throughput:,.0f}',
        '–' if mfu is None else f'{mfu:.1%}',
    )


def make(
    runs: Sequence[FinishedRun],
    problems: Sequence[RunError],
    charts: Iterable[Chart],
    verdicts: Iterable[Verdict],
) -> str:
    """The whole page.

    Args:
      runs: of one experiment, at least one.
      problems: why others are left out.
      charts: of the runs.
      verdicts: on the runs.
    """
    first = runs[0]
    answers = {True: 'yes', False: Markup('<span class="no">NO</span>'), None: '–'}
    left_out = Markup()
    if problems:
        left_out = Markup('<h2>Left out: {} that cannot be used</h2>\n').format(len(problems))
        left_out += _all('<pre>{}</pre>', ([problem] for problem in problems))
    return fill(
        _TEMPLATE.read_text(),
        title=f'{first.config.model} on {first.config.dataset}: {len(runs)} runs',
        summary=summary(runs),
        machine=machine(first),
        charts=_all(
            '<figure>{}<figcaption>{}</figcaption></figure>', ((c.svg, c.caption) for c in charts)
        ),
        verdicts=_rows((question, answers[passed], why) for question, passed, why in verdicts),
        left_out=left_out,
        configuration=_rows(
            (name, getattr(first.config, name), entry.help)
            for name, entry in hyperparameters.table(type(first.config)).items()
            if name not in ('seed', 'data_dir')  # Each run's own; a folder of one machine.
        ),
        first=first.directory.name,
        environment=_rows(flat(first.environment)),
        units=first.units,
        throughput=first.plan.course.throughput_unit,
        metric=first.plan.target.words,
        runs=_rows(
            (run.directory.name, run.config.seed, 'reached' if run.reached else 'MISSED',
             run.count, f'{run.results[-1][1]:.5f}', f'{run.seconds:.1f}',
             f'{run.working_seconds:.1f}', *speed(run), run.fingerprint)
            for run in runs
        ),
    )  # fmt: skip
