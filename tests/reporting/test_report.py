# SPDX-License-Identifier: Apache-2.0
"""Reports: one file holds everything, true to its runs, legible on a phone and without colour."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from markupsafe import Markup

from reporting import charts, finished_run, run_sets
from reporting.page import fill, summary
from scripts import report
from scripts.dev import hyperparameter_table
from settings.plan import Target
from tests.synthetic_runs import curve, plan_of, resolve, write_run, write_runs

EPOCHS = [10, 11, 10, 12, 11, 9]
CHARTS = {'quality', 'loss', 'to_target', 'learning_rate', 'throughput', 'time'}
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))), None)


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """A report on six runs that met their target, one that missed it and one that was cut off."""
    runs = tmp_path_factory.mktemp('report') / 'runs'
    config = resolve('digits', org='<b>&"us"')
    write_runs(runs, config, EPOCHS)
    write_run(runs / '007', config, [0.4] * len(plan_of(config).evaluations))
    write_run(runs / '008', config, [0.4])
    assert report.main([str(runs)]) == 0
    return runs / 'report.html'


def test_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r'<(?:link|script|img|iframe|object)\b', text)
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|\d+/)', text)  # Runs' files are in its folder.
    assert not re.findall(r'url\((?!#)|@import', text)
    assert page.stat().st_size < 2**20
    # Nor do charts have colours of their own, which a dark page would hide.
    assert not re.findall(r'(?:fill|stroke): *#', text)


def test_page_shows_what_the_runs_did(page):
    text = html.unescape(re.sub('<[^>]*>', ' ', page.read_text()))
    assert '6 of 7 runs reached top-1 of at least 0.98' in text
    assert 'after 10.50 epochs on average (sample standard deviation 1.05, 9 to 12)' in text
    for run in run_sets.survey(page.parent)[0]:
        assert f'{run.directory.name}  {run.config.seed}  ' in text
    assert re.search('007 +[0-9]+ +MISSED +40', text)
    assert 'target 0.98' in text
    shown = re.sub(r'\s+', ' ', text)
    for fact in (
        'target reached 6 of 7 runs',
        'epochs to the target 10.50 ± 1.05',
        'throughput 100 images/s',
        'precision float32',
        'verdicts ✘ no',
        'As configs/digits.py, but for: org <b>&"us" ',
    ):
        assert fact in shown, fact
    for name in ('mlperf.log', 'metrics.jsonl'):
        (link,) = re.findall(f'href="(003/{name})"', page.read_text())
        assert (page.parent / link).is_file()
    assert '<b>&"us"' in text
    assert '<b>&' not in page.read_text()
    # The verdicts, and the run that is left out.
    assert re.search(
        'compliance checker, ruleset 4.0.0 +✘ no +6 of 7 logs; .* 007: .*aborted', text
    )
    assert re.search('seed checker +✔ yes', text)
    assert re.search('one experiment.* +✔ yes', text)
    assert re.search('008/mlperf.log cannot be used: it is not whole', text)


HOSTILE = (
    "' onload='alert(1)", '</script><script>alert(1)</script>', "'", '&', '<svg onload=alert(1)>',
    '"><img src=x onerror=alert(1)>', '</style>', '</svg>', '&lt;b&gt;', '$x_1$', '<!--', '--><b>',
    '{x}', '%s', '<![CDATA[',
)  # fmt: skip


class Elements(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and all its texts."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))
        self.texts += [value or '' for _, value in attrs]

    def handle_endtag(self, tag):
        self.found.append((f'/{tag}',))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.found.append(('comment',))


def page_with(folder, text) -> Elements:
    """A page in which everything that a user, a machine or a log can say is that text."""
    config = resolve('digits', org=text, platform=text, init_from=text, data_dir=text)
    name = text.replace('/', '∕')  # No folder's name has a slash.
    write_run(folder / f'1{name}', config, curve(config, 9), seed=1, commit=text, digest=text)
    write_run(folder / f'2{name}', config, curve(config, 8), seed=2, commit=f'other{text}')
    write_run(folder / f'3{name}', config, [0.4], seed=3)  # Left out, in words.
    for path in folder.glob('*/environment.json'):
        environment = json.loads(path.read_text())
        environment |= {'python': text, 'system': text, 'device_kind': text, 'more': {text: text}}
        environment['dataset']['name'] = text
        environment['machine'] = {'processor': text, 'usable_cores': text, text: [text]}
        environment['versions'] |= {'jax': text, text: text}
        path.write_text(json.dumps(environment))
    assert report.main([str(folder)]) == 0
    elements = Elements()
    elements.feed((folder / 'report.html').read_text(encoding='utf-8'))
    elements.close()
    return elements


@pytest.fixture(scope='module')
def harmless(tmp_path_factory):
    return page_with(tmp_path_factory.mktemp('harmless'), 'harmless')


@pytest.mark.parametrize('text', ['" onload="alert(1)', ''.join(HOSTILE)])
def test_no_text_becomes_an_element_or_an_attribute(tmp_path, harmless, text):
    """Whatever folders, configurations, environments, commits and logs say."""
    found = page_with(tmp_path / 'runs', text)
    assert found.found == harmless.found
    assert found.texts.count(text) >= 8
    assert any(f'longest run, 1{text.replace("/", "∕")}.' in label for label in found.texts)


@pytest.mark.parametrize('text', [*HOSTILE, 'a\x1b[31m', 'a\u202e', '\x7f', 'a\0', '\udcff', 'ä\r'])
def test_texts_stay_texts(text):
    """Control characters, and names that are no UTF-8, are shown as codes."""
    elements = Elements()
    template = '<p class="$text" aria-label="$text">$text$seven$inner</p>'
    inner = Markup('<b>{}</b>').format(text)
    made = fill(template, text=text, seven=7, inner=inner)
    elements.feed(made.encode().decode())
    elements.close()
    assert elements.found == [('p', 'class', 'aria-label'), ('b',), ('/b',), ('/p',)]
    shown = (
        text
        if text.isprintable()
        else ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    )
    assert ''.join(elements.texts) == f'{shown}{shown}{shown}7{shown}'


def test_every_chart_is_in_the_page_and_a_png(page):
    assert page.read_text().count('<svg role="img" aria-label="') == len(CHARTS)
    pictures = page.with_suffix('')
    assert {path.stem for path in pictures.glob('*.png')} == CHARTS
    for path in pictures.glob('*.png'):
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        # Ink on paper also without colour: something very dark, and mostly white.
        assert picture.min() < 80
        assert np.median(picture) > 250


def test_lines_differ_without_colour():
    """By lightness, or else by dashes: runs and their median are drawn alike, the target is not."""
    rgb = [
        np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (charts.RUN, charts.MEDIAN)
    ]
    light = [float(c @ [0.299, 0.587, 0.114]) for c in rgb]
    assert light[0] - light[1] > 100


def test_official_points_of_a_loss_are_shown_in_sequences(tmp_path):
    """Of the twenty official runs with this batch nine took 172,032, ten 184,320, one 196,608."""
    runs = write_runs(tmp_path / 'runs', resolve('llama31_8b'), [172_032, 184_320])
    metrics = runs / '002' / 'metrics.jsonl'
    metrics.write_text(metrics.read_text().replace('"loss"', '"mfu": 0.4, "loss"'))
    assert report.main([str(runs)]) == 0
    text = re.sub('<[^>]*>', ' ', (runs / 'report.html').read_text())
    assert 'these runs (n = 2, mean 178,176.00)' in text
    assert 'official reference (n = 20, mean 179,404.80)' in text
    rows = re.sub(r'\s+', ' ', text)
    assert 'without pauses tokens/s MFU fingerprint' in rows
    assert re.search('001 .* reached 172,032 [^–]* 100 – – mlperf.log metrics.jsonl', rows)
    assert re.search('002 .* reached 184,320 [^–]* 100 40.0% – mlperf.log', rows)


def test_an_accuracy_is_drawn_as_its_error(tmp_path):
    """With a dot where a run met the target, and an error of 0 as half an example's."""
    config = resolve('digits')
    runs = write_runs(tmp_path / 'runs', config, [3, 4])
    write_run(runs / '003', config, [0.5, 1.0])
    read = run_sets.read_runs(runs)
    (axes,) = charts.quality(read).axes
    assert (axes.get_yscale(), axes.get_ylabel()) == ('log', '1 − top-1')
    assert axes.lines[2].get_ydata()[0] == pytest.approx(0.02)
    dots = axes.lines[-1].get_xydata()
    assert [x for x, _ in dots] == [3, 4, 2]
    assert [y for _, y in dots] == pytest.approx(
        [1 - read[0].results[-1][1], 1 - read[1].results[-1][1], 0.5 / 360]
    )


def test_time_split_adds_up_to_the_run(page):
    run = run_sets.survey(page.parent)[0][0]
    split = charts.time_split(run)
    assert sum(split.values()) == pytest.approx(run.seconds)
    # Of each epoch: a second of training, a quarter of it waiting; half a second of evaluation.
    epochs = EPOCHS[0]
    assert split['waiting for input'] == pytest.approx(0.25 * epochs)
    assert split['training step'] == pytest.approx(0.75 * epochs)
    assert split['evaluation'] == pytest.approx(0.5 * epochs)
    assert split['checkpoint'] == pytest.approx(0.25 * epochs)
    assert split['pauses, start and end'] == pytest.approx(run.seconds - 1.75 * epochs)
    assert [rate for _, rate in charts.curve(run, 'throughput')] == [100.0] * epochs


@pytest.mark.parametrize(
    ('epochs', 'verdict'), [([40, 40, 40, 44, 40], '✔ yes'), ([32, 32, 32, 28, 32], '✘ no')]
)
def test_official_points_are_shown_where_the_batch_has_some(tmp_path, epochs, verdict):
    config = resolve('imagenet', division='closed')
    runs = write_runs(tmp_path / 'runs', config, epochs)
    assert report.main([str(runs)]) == 0
    text = re.sub('<[^>]*>', ' ', (runs / 'report.html').read_text())
    assert 'official reference (n = 10, mean 40.00)' in text
    assert re.search(
        f'RCP checker, official reference points +{verdict} +of the first 5 runs', text
    )


def test_single_work_directory_has_a_report(tmp_path):
    config = resolve('digits')
    run = write_run(tmp_path / 'run', config, curve(config, 5))
    assert report.main([str(run), '--out', str(tmp_path / 'one.html')]) == 0
    assert '1 of 1 runs reached' in (tmp_path / 'one.html').read_text()


def test_a_folder_whose_name_is_no_utf8_is_linked(tmp_path):
    config, name = resolve('digits'), os.fsdecode(b'a:\xff')
    write_run(tmp_path / name, config, curve(config, 5))
    assert report.main([str(tmp_path)]) == 0
    assert 'href="a%3A%FF/mlperf.log"' in (tmp_path / 'report.html').read_text()


def test_run_with_damaged_metrics_is_left_out_in_words(tmp_path):
    config = resolve('digits')
    runs = write_runs(tmp_path / 'runs', config, [5, 6])
    (runs / '002' / 'metrics.jsonl').write_text('{"loss": 1}\n')
    assert report.main([str(runs)]) == 0
    text = (runs / 'report.html').read_text()
    assert 'Left out: 1 that cannot be used' in text
    assert re.search('line 1 of .*002/metrics.jsonl is damaged', text)


def test_folder_without_runs_is_rejected(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert 'there are no runs' in capsys.readouterr().err


def chromium(folder, *arguments):
    if CHROMIUM is None:
        pytest.skip('there is no Chromium')
    return subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=10000',
         f'--user-data-dir={folder / "profile"}', *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_page_fits_a_phone(page, tmp_path):
    """In a frame of 360 pixels nothing sticks out, and the text in the charts is legible."""
    frame = f'<iframe width=360 height=800 srcdoc="{html.escape(page.read_text())}"></iframe>'
    probe = """<pre id=out></pre><script>
    onload = () => {
      const page = document.querySelector('iframe').contentDocument;
      const texts = [...page.querySelectorAll('svg text')];
      document.getElementById('out').textContent = JSON.stringify([
        page.documentElement.scrollWidth, page.querySelectorAll('svg').length,
        Math.min(...texts.map(text => text.getBoundingClientRect().height))]);
    }</script>"""
    (tmp_path / 'frame.html').write_text(f'<!DOCTYPE html>{frame}{probe}')
    done = chromium(tmp_path, '--dump-dom', f'file://{tmp_path}/frame.html')
    found = re.search(r'<pre id="out">\[([\d.]+),([\d.]+),([\d.]+)\]</pre>', done.stdout)
    assert found, done.stderr[-1000:]
    width, count, smallest = map(float, found.groups())
    assert width <= 360
    assert count == len(CHARTS)
    assert smallest >= 8


def test_page_is_printed_on_few_sheets(page, tmp_path):
    """Strip and charts fill one and a half; a row of the runs is a line."""
    printed = tmp_path / 'page.pdf'
    done = chromium(tmp_path, f'--print-to-pdf={printed}', f'file://{page}')
    assert printed.exists(), done.stderr[-1000:]
    assert 1 <= len(re.findall(rb'/Type\s*/Page\b', printed.read_bytes())) <= 2


def test_readme_has_the_table_of_hyperparameters():
    """Renew it with scripts/dev/hyperparameter_table.py."""
    assert hyperparameter_table.main(['--check']) == 0


def test_readme_that_differs_from_the_table_is_noticed(tmp_path, capsys):
    begin = hyperparameter_table.BEGIN.format('resnet')
    markers = f'a\n{begin}\nold\n{hyperparameter_table.END}\nb\n'
    readme = tmp_path / 'README.md'
    readme.write_text(markers)
    assert hyperparameter_table.main(['--check', str(readme)]) == 1
    assert hyperparameter_table.main([str(readme)]) == 0
    assert hyperparameter_table.main(['--check', str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith('a\n')
    assert text.endswith('b\n')
    assert '| `optimizer` | one of lars, sgd | `opt_name` |' in text
    readme.write_text(text.replace('any in (0, 1)', 'any'))
    assert hyperparameter_table.main(['--check', str(readme)]) == 1
    readme.write_text('no markers')
    assert hyperparameter_table.main(['--check', str(readme)]) == 2
    assert 'must have the line' in capsys.readouterr().err


def test_an_evaluation_loss_that_is_not_known_is_left_out(tmp_path):
    folder = write_runs(tmp_path / 'runs', resolve('digits'), [5, 6])
    path = folder / '001' / 'metrics.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [line for line in lines if 'eval_loss' in line]
    evaluations[0]['eval_loss'] = None
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    runs = run_sets.read_runs(folder)
    assert charts.loss(runs).axes
    evaluations[0]['eval_loss'] = 'x'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    with pytest.raises(finished_run.RunError, match='eval_loss must be'):
        _ = finished_run.read_run(folder / '001').metrics


def test_a_quality_that_falls_and_is_counted_in_examples(tmp_path):
    """As of a language model: lower is better, without a largest value; no epochs."""
    config = resolve('digits')
    run = finished_run.read_run(write_run(tmp_path / 'run', config, curve(config, 5)))
    lines = (run.directory / 'metrics.jsonl').read_text()
    (run.directory / 'metrics.jsonl').write_text(lines.replace('"epoch"', '"sequences"'))
    evaluations = tuple(dataclasses.replace(e, count=4096 * e.count) for e in run.plan.evaluations)
    course = dataclasses.replace(
        run.plan.course,
        evaluations=evaluations,
        target=Target('eval_loss', 'log perplexity', 3.3, at_least=False),
        unit='sequences',
        examples='sequences',
        examples_per_unit=1,
    )
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, course=course))
    assert run.count == 5 * 4096
    said = summary([run])
    assert '1 of 1 runs reached log perplexity of at most 3.3, after 20,480.00 sequences' in said
    (axes,) = charts.quality([run]).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('sequences', 'log perplexity')
    assert list(axes.lines[-1].get_xydata()[0]) == [5 * 4096, run.results[-1][1]]
    (axes,) = charts.to_target([run], []).axes
    assert axes.get_xlabel() == 'sequences to the target'
    assert axes.patches[0].get_width() == pytest.approx(0.8 * 4096)
    assert charts.throughput([run]).axes[0].get_ylabel() == 'sequences/s'
    assert len(charts.draw([run], [])) == len(CHARTS)


def test_a_report_is_a_file(page, capsys):
    with pytest.raises(SystemExit):
        report.main([str(page.parent), f'--out={page.parent}/report'])
    assert 'report.html' in capsys.readouterr().err


def test_runs_without_a_line_of_metrics_have_a_chart(page, monkeypatch):
    """They are shorter than the interval between lines."""
    runs = run_sets.survey(page.parent)[0]
    monkeypatch.setattr(charts, 'curve', lambda run, key: [])
    assert charts.loss(runs).axes
