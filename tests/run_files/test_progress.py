# SPDX-License-Identifier: Apache-2.0
"""What a run shows and keeps of its metrics, on terminals of any width and after any damage."""

import builtins
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import time

import pytest

from run_files import banner, progress
from run_files.line_file import SaveError
from settings.plan import Course, Evaluation, Plan, Ruleset, Target
from tests.harness import resolve


def plan(num_train, num_eval, batch, last: Evaluation):
    course = Course(
        evaluations=(last,),
        target=Target('eval_top1', 'top-1', 0.98),
        unit='epoch',
        examples_per_unit=num_train,
        examples='images',
        ruleset=Ruleset('4.0.0'),
    )
    return Plan(course, num_train, num_eval, batch, batch, num_devices=1)


DIGITS = plan(1437, 360, 256, Evaluation(225, 40, {}, {}, {}))
IMAGENET = plan(1281167, 50000, 4096, Evaluation(28151, 90, {}, {}, {}))
FIRST = Evaluation(1, 1, {}, {}, {})
TRAINING = {'loss': 6.90776, 'learning_rate': 10.0, 'throughput': 123456.0, 'seconds': 3.0}
MARK = '0123456789abcdef'
EVALUATION = {'eval_top1': 0.75912, 'eval_loss': 1.5, 'eval_seconds': 2.0}


@pytest.fixture
def terminal(monkeypatch):
    """Lets a run believe that it speaks to a terminal of a width."""

    def of(columns):
        monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
        monkeypatch.setattr(shutil, 'get_terminal_size', lambda: os.terminal_size((columns, 24)))

    return of


@pytest.mark.parametrize('columns', [*range(40, 201, 8), 80])
@pytest.mark.parametrize('plan', [DIGITS, IMAGENET], ids=['digits', 'imagenet'])
def test_progress_line_fits_the_terminal(tmp_path, capsys, terminal, plan, columns):
    terminal(columns)
    shown = progress.Progress(tmp_path, plan, 0)
    for step in (1, plan.total_steps - 1):
        capsys.readouterr()
        shown.training(step, TRAINING)
        line = capsys.readouterr().out.removeprefix('\r\x1b[K')
        assert '\n' not in line
        assert len(line) < columns
        assert line.startswith(f'epoch {plan.position(step):6.2f}')
        fields = line.split('  ')
        assert fields == [field for field in complete(plan, step, fields) if field in fields]
        assert f'step {step}/{plan.total_steps}' in fields
        if columns >= 80:
            assert any(field.startswith('at most ') for field in fields)


def complete(plan, step, fields):
    """Every field of a line, whole; the time left as it was shown."""
    left = [field for field in fields if field.startswith('at most ') and field.endswith(' left')]
    epoch = f'epoch {plan.position(step):6.2f}'.split('  ')
    return [
        *epoch, f'step {step}/{plan.total_steps}', 'loss 6.9078', 'rate 10', '123,456 images/s',
        *left,
    ]  # fmt: skip


def test_without_a_terminal_every_line_is_complete(tmp_path, capsys):
    shown = progress.Progress(tmp_path, IMAGENET, 0)
    shown.training(28000, TRAINING)
    line = capsys.readouterr().out
    for text in ('step 28000/28151', 'loss 6.9078', 'rate 10', '123,456 images/s', 'left\n'):
        assert text in line
    assert '\x1b' not in line


def test_the_part_of_the_peak_is_shown_where_it_is_known(tmp_path, capsys, terminal):
    shown = progress.Progress(tmp_path, IMAGENET, 0)
    shown.training(1, TRAINING | {'mfu': 0.4126})
    assert 'MFU 41.3%' in capsys.readouterr().out
    assert lines_of(tmp_path)[-1]['mfu'] == 0.4126
    shown.training(2, TRAINING)
    assert 'MFU' not in capsys.readouterr().out


def test_what_follows_the_progress_line_has_a_line_of_its_own(tmp_path, capsys, terminal):
    terminal(80)
    shown = progress.Progress(tmp_path, DIGITS, 0)
    for end in (
        lambda: shown.say('text'),
        lambda: shown.evaluation(FIRST, EVALUATION, MARK),
        shown.close,
    ):
        shown.training(1, TRAINING)
        capsys.readouterr()
        end()
        assert capsys.readouterr().out.startswith('\r\x1b[K')
    shown.close()
    assert capsys.readouterr().out == ''


def test_what_takes_long_is_said_every_few_seconds_and_no_more_after_it(
    tmp_path, capsys, monkeypatch
):
    shown = progress.Progress(tmp_path, DIGITS, 0)
    with shown.busy('what is quick'):
        pass
    monkeypatch.setattr(progress, 'BUSY_SECONDS', 0.05)
    with pytest.raises(ValueError), shown.busy('what takes long'):  # noqa: PT012
        time.sleep(0.5)
        raise ValueError
    assert set(re.sub('[0-9.]+ s', 'N s', capsys.readouterr().out).splitlines()) == {
        'what takes long: N s'
    }
    time.sleep(0.2)
    assert not capsys.readouterr().out


def test_an_evaluation_fits_the_screen_and_records_the_fingerprint(tmp_path, capsys):
    shown = progress.Progress(tmp_path, IMAGENET, 0)
    shown.evaluation(dataclasses.replace(FIRST, step=28151, count=90), EVALUATION, MARK)
    line = capsys.readouterr().out.strip()
    assert line == f'epoch     90  step 28151  top-1 0.75912  loss 1.5000  {MARK}'
    assert len(line) < 80
    assert [line['fingerprint'] for line in lines_of(tmp_path)] == [MARK]


def lines_of(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path):
    """Lines of steps 1, 2, 3 and of an evaluation after step 3, as they are in the file."""
    shown = progress.Progress(tmp_path, DIGITS, 0)
    for step in (1, 2, 3):
        shown.training(step, TRAINING)
    shown.evaluation(dataclasses.replace(FIRST, step=3), EVALUATION, MARK)
    shown.close()
    return (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)


DAMAGES = {
    'a flipped bit': lambda line: bytes([line[0] ^ 0x80]) + line[1:],
    'a flipped bit within': lambda line: line[:9] + bytes([line[9] ^ 0x80]) + line[10:],
    'zeros': lambda line: bytes(len(line)) + b'\n',
    'half': lambda line: line[: len(line) // 2] + b'\n',
    'a list': lambda _: b'[1, 2]\n',
    'a number': lambda _: b'3\n',
    'a text': lambda _: b'"step"\n',
    'null': lambda _: b'null\n',
    'no step': lambda _: b'{"loss": 1.0}\n',
    'a step of a wrong type': lambda _: b'{"step": "2"}\n',
    'a time of a wrong type': lambda line: line[:-2] + b', "elapsed_seconds": []}\n',
    'deep': lambda _: b'[' * 100_000 + b'\n',
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_line_of_metrics_costs_that_line(tmp_path, capsys, metrics, damage):
    for i in range(3):
        damaged = [*metrics[:i], DAMAGES[damage](metrics[i]), *metrics[i + 1 :]]
        (tmp_path / 'metrics.jsonl').write_bytes(b''.join(damaged))
        progress.Progress(tmp_path, DIGITS, 4).close()
        kept = [json.loads(line) for line in metrics[:i] + metrics[i + 1 :]]
        assert lines_of(tmp_path) == kept
        assert 'metrics.jsonl: 1 damaged line(s) dropped' in capsys.readouterr().out


def test_an_evaluation_whose_loss_overflows_is_recorded_without_it(tmp_path, capsys):
    """Its accuracy counts all the same, and what is written stays JSON."""
    shown = progress.Progress(tmp_path, DIGITS, 0)
    overflown = EVALUATION | {'eval_loss': float('nan')}
    shown.evaluation(dataclasses.replace(FIRST, step=12), overflown, MARK)
    (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()

    def strict(constant):
        raise ValueError(constant)

    values = json.loads(line, parse_constant=strict)
    assert values['eval_loss'] is None
    assert values['eval_top1'] == EVALUATION['eval_top1']
    assert 'loss nan' in capsys.readouterr().out


def test_metrics_after_the_step_are_dropped(tmp_path, metrics):
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(metrics) + b'{"step": 4, "lo')
    progress.Progress(tmp_path, DIGITS, 3).close()
    assert [line['step'] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert 'eval_top1' not in lines_of(tmp_path)[-1]


def test_the_pause_before_a_resumed_run_is_no_time_of_the_run(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    shown = progress.Progress(tmp_path, DIGITS, 0)
    now[0] += 50  # It compiles.
    shown.begin()
    now[0] += 7
    shown.training(1, TRAINING)
    now[0] += 9999
    shown = progress.Progress(tmp_path, DIGITS, 2)
    shown.begin()
    now[0] += 5
    shown.training(2, TRAINING)
    assert [line['elapsed_seconds'] for line in lines_of(tmp_path)] == [7, 12]


@pytest.mark.parametrize('loss', ['deleted', 'replaced', 'with its folder'])
def test_metrics_that_are_lost_end_the_run(tmp_path, loss):
    folder = tmp_path / 'run'
    folder.mkdir()
    shown = progress.Progress(folder, DIGITS, 0)
    shown.training(1, TRAINING)
    (folder / 'metrics.jsonl').unlink()
    if loss == 'replaced':
        (folder / 'metrics.jsonl').write_text('')
    if loss == 'with its folder':
        shutil.rmtree(folder)
    with pytest.raises(SaveError, match=r'metrics\.jsonl was deleted, replaced or changed'):
        shown.training(2, TRAINING)


def test_tensorboard_events_that_cannot_be_written_are_reported_once(tmp_path, capsys, monkeypatch):
    shown = progress.Progress(tmp_path, DIGITS, 0)
    assert list((tmp_path / 'tensorboard').glob('events*'))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    from tensorboardX.event_file_writer import EventsWriter

    monkeypatch.setattr(EventsWriter, 'write_event', full)
    for step in (1, 2):
        shown.training(step, TRAINING)
    shown.close()
    off = 'TensorBoard events: off (No space left on device)'
    assert capsys.readouterr().out.count(off) == 1
    assert [line['step'] for line in lines_of(tmp_path)] == [1, 2]


def test_without_tensorboardx_metrics_are_written_and_it_is_reported_once(
    tmp_path, capsys, monkeypatch
):
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith('tensorboardX'):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, '__import__', without)
    shown = progress.Progress(tmp_path, DIGITS, 0)
    shown.training(1, TRAINING)
    shown.close()
    said = capsys.readouterr().out
    assert said.count('TensorBoard events: off (tensorboardX is not installed)') == 1
    assert [line['step'] for line in lines_of(tmp_path)] == [1]


@pytest.mark.parametrize('name', ['run', 'a long name ' * 12, 'x' * 200])
def test_banner_says_what_runs_in_80_columns(tmp_path, name):
    config = resolve('imagenet', 'x', dtype='bfloat16', division='open', seed=2**63 - 1)
    digest = f'{"d1" * 8}-{"ce" * 8}'
    weights = {'params': {'kernel': progress_array((7, 7, 3, 64)), 'bias': progress_array((64,))}}
    about = (digest, weights, {'kernels': 'of a kind ' * 9})
    lines = banner.lines(config, IMAGENET, *about, tmp_path / name, 3130, MARK)
    assert max(map(len, lines)) <= 80
    text = '\n'.join(lines)
    for words in (
        '8 × cpu', '4096 images = 1 device(s) × 4096 × 1 accumulation step(s)', 'bfloat16',
        'resnet50, 9,472 parameters', 'imagenet2012: 1,281,167 images to train', 'd1d1',
        'kernels     of a kind', str(2**63 - 1), 'resumed from step 3130 (epoch 10.01)', MARK,
    ):  # fmt: skip
        assert words in text
    new = banner.lines(config, IMAGENET, *about, tmp_path, 0, '')
    assert 'new run' in '\n'.join(new)


def progress_array(shape):
    import jax

    return jax.ShapeDtypeStruct(shape, 'float32')
