# SPDX-License-Identifier: Apache-2.0
"""The page about a set of runs: from `FinishedRun`s, charts and verdicts to HTML.

Whatever folders, configurations, environments and logs say is escaped: `Markup` alone is HTML.
"""

import dataclasses
import os
import statistics
import string
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from reporting import run_sets
from reporting.charts import Chart
from reporting.finished_run import FinishedRun, RunError
from settings import hyperparameters, loading
from settings.hyperparameters import Config

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
    """What a run was made on."""
    environment = run.environment
    text = f'{environment["devices"]} × {environment["device_kind"]}'
    facts = environment.get('machine')
    if isinstance(facts, Mapping) and {'processor', 'usable_cores'} <= facts.keys():
        text += f', {facts["usable_cores"]} cores of {facts["processor"] or "a CPU"}'
    return text


def strip(runs: Sequence[FinishedRun], verdicts: Iterable[Verdict]) -> list[tuple[str, Any]]:
    """What a reader looks for first: (name, value)."""
    first = runs[0]
    reached = [run.count for run in runs if run.reached]
    mean, places = '–', 0
    if reached:
        places = 2 if max(reached) < 100 else 0
        mean = f'{statistics.mean(reached):,.{places}f}'
    if len(reached) > 1:
        mean += f' ± {statistics.stdev(reached):,.{places}f}'
    speeds = [speed for run in runs if (speed := run.average('throughput')) is not None]
    passed = [answer for _, answer, _ in verdicts if answer is not None]
    days = sorted({time.strftime('%Y-%m-%d', time.gmtime(r.start_ms / 1000)) for r in runs})
    return [
        ('target reached', f'{len(reached)} of {len(runs)} runs'),
        (f'{first.units} to the target', mean),
        ('median time', f'{statistics.median(run.seconds for run in runs):,.1f} s'),
        ('throughput', f'{statistics.median(speeds):,.0f} {first.plan.course.throughput_unit}'
                       if speeds else '–'),
        ('machine', machine(first)),
        ('precision', first.config.dtype),
        ('code version', first.environment['commit'][:12]),
        ('date', ' to '.join(dict.fromkeys((days[0], days[-1])))),
        ('verdicts', _mark(all(passed))),
    ]  # fmt: skip


def _mark(passed: bool | None) -> Markup | str:
    if passed is None:
        return '–'
    return Markup('<span class="{}">{}</span>').format(
        *(('yes', '✔ yes') if passed else ('no', '✘ no'))
    )


def nearest(config: Config) -> tuple[str, Mapping[str, Any]]:
    """The committed file that a configuration differs from least, and that file's values."""
    theirs = {name: loading.load(name) for name in loading.committed()}
    own = dataclasses.asdict(config)
    name = min(theirs, key=lambda name: len(_changed(own, theirs[name])))
    return name, theirs[name]


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of fields with another value; not those that each run or machine has for itself."""
    return [n for n in ours if n not in ('seed', 'data_dir') and ours[n] != theirs.get(n)]


def speed(run: FinishedRun) -> tuple[str, str]:
    """Throughput and MFU of a run's training; '–' where there is none."""
    throughput, mfu = run.average('throughput'), run.average('mfu')
    return (
        '–' if throughput is None else f'{throughput:,.0f}',
        '–' if mfu is None else f'{mfu:.1%}',
    )


def links(run: FinishedRun, folder: Path) -> Markup:
    """Links to a run's log and metrics."""
    start = urllib.parse.quote(os.fsencode(os.path.relpath(run.directory, folder)))
    link = '<a href="{}/{}">{}</a>'
    return _all(link, ((start, name, name) for name in ('mlperf.log', 'metrics.jsonl')))


def make(
    runs: Sequence[FinishedRun],
    problems: Sequence[RunError],
    charts: Iterable[Chart],
    verdicts: Iterable[Verdict],
    folder: Path,
) -> str:
    """The whole page.

    Args:
      runs: of one experiment, at least one.
      problems: why others are left out.
      charts: of the runs.
      verdicts: on the runs.
      folder: that the page will be in; links to the runs' files start there.
    """
    first, verdicts = runs[0], list(verdicts)
    name, committed = nearest(first.config)
    changed = _changed(dataclasses.asdict(first.config), committed)
    says = f'As {name}, but for:' if changed else f'That of {name}.'
    left_out = Markup()
    if problems:
        left_out = Markup('<h2>Left out: {} that cannot be used</h2>\n').format(len(problems))
        left_out += _all('<pre>{}</pre>', ([problem] for problem in problems))
    return fill(
        _TEMPLATE.read_text(),
        title=f'{first.config.model} on {first.config.dataset}: {len(runs)} runs',
        summary=summary(runs),
        strip=_all('<div><dt>{}</dt><dd>{}</dd></div>', strip(runs, verdicts)),
        charts=_all(
            '<figure>{}<figcaption>{}</figcaption></figure>', ((c.svg, c.caption) for c in charts)
        ),
        verdicts=_rows((question, _mark(passed), why) for question, passed, why in verdicts),
        left_out=left_out,
        committed=says,
        changed=_rows(
            (field, getattr(first.config, field), f'{committed.get(field)} there')
            for field in changed
        ),
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
             f'{run.count:,}', f'{run.results[-1][1]:.5f}', f'{run.seconds:.1f}',
             f'{run.working_seconds:.1f}', *speed(run), run.fingerprint, links(run, folder))
            for run in runs
        ),
    )  # fmt: skip
