# SPDX-License-Identifier: Apache-2.0
"""The program as a user meets it: real runs in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from run_files import mlperf_log
from tests.harness import is_same
from training import checkpointing

ROOT = Path(__file__).parents[2]


def run(workdir, data_dir, *flags, cwd=ROOT):
    """Runs main.py; returns the finished process."""
    environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    command = [sys.executable, str(ROOT / 'main.py'), f'--workdir={workdir}']
    command += [f'--config.data_dir={data_dir}', *flags]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300
    )


def newest(workdir):
    steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
    return checkpointing.read(workdir / 'checkpoints' / str(max(steps)))[0]


def metrics(workdir):
    """Every metric that is not a time."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    times = ('images_per_second', 'input_wait')
    return [
        {key: value for key, value in line.items() if key not in times and 'seconds' not in key}
        for line in lines
    ]


def environment_with(**variables):
    kept = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    return kept | variables


@pytest.mark.slow
def test_run_and_time_reaches_the_target_and_the_checker_accepts(digits_dir, tmp_path):
    """From another folder, with a space in a path."""
    workdir = tmp_path / 'a run'
    done = subprocess.run(
        [ROOT / 'scripts' / 'run_and_time.sh', f'--workdir={workdir}',
         f'--config.data_dir={digits_dir}'],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
        env=environment_with(VENV=sys.prefix, LOCK='cpu'),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'accepted by the compliance checker (4.0.0)' in done.stdout
    result = done.stdout.splitlines()[-1].split(',')
    seed = json.loads((workdir / 'config.json').read_text())['seed']
    assert result[:3] == ['RESULT', 'digits', str(seed)]
    assert 0 < int(result[3]) < 300
    top1 = [line['eval_top1'] for line in metrics(workdir) if 'eval_top1' in line]
    target = json.loads((workdir / 'config.json').read_text())['target_top1']
    assert top1[-1] >= target
    assert max(top1[:-1], default=0) < target
    assert list((workdir / 'tensorboard').glob('events*'))


@pytest.mark.slow
def test_same_seed_is_bitwise_equal_and_missing_the_target_is_told(digits_dir, tmp_path):
    flags = ('--config.seed=11', '--config.max_epochs=4', '--config.eval_every_epochs=2',
             '--config.eval_offset_epochs=0')  # fmt: skip
    first = run(tmp_path / 'a', digits_dir, *flags)
    again = run(tmp_path / 'b', digits_dir, *flags, '--config.data_threads=1')
    assert first.returncode == again.returncode == 1, first.stderr
    assert 'the target was missed' in first.stdout
    assert is_same(newest(tmp_path / 'a'), newest(tmp_path / 'b'))
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')
    events = mlperf_log.read(tmp_path / 'a' / 'mlperf.log')
    assert [e['value'] for e in events if e['key'] == 'seed'] == [11]
    assert [e['metadata']['status'] for e in events if e['key'] == 'run_stop'] == ['aborted']
    assert [e['value'] for e in events if e['key'] == 'train_samples'] == [1437]

    # The finished run is not run again, and its work directory is no other run's.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*.*')}
    assert run(tmp_path / 'a', digits_dir, *flags).returncode == 1
    other = run(tmp_path / 'a', digits_dir, *flags, '--config.learning_rate=1.0')
    assert other.returncode == 2
    assert 'another configuration (learning_rate' in other.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*.*')}

    # What was written can be fed back.
    recorded = f'--config={ROOT}/configs/from_json.py:{tmp_path}/a/config.json'
    third = run(tmp_path / 'c', digits_dir, recorded)
    assert third.returncode == 1, third.stderr
    assert is_same(newest(tmp_path / 'a'), newest(tmp_path / 'c'))


def refused(done):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith('error: ')
    assert 'Traceback' not in done.stderr
    return done.stderr


def test_a_bad_configuration_is_refused_whole_before_anything_is_written(tmp_path):
    flags = ('--config.weight_decay=0.0003', '--config.momentum=0.5', '--config.batch=64')
    text = refused(run(tmp_path / 'w', tmp_path, *flags))
    assert 'weight_decay' in text
    assert 'momentum' in text
    assert 'batch is no hyperparameter' in text
    assert list(tmp_path.iterdir()) == []


def test_a_missing_configuration_file_is_told(tmp_path):
    assert 'digits.py' in refused(run(tmp_path / 'w', tmp_path, '--config=configs/digit.py'))
    text = refused(run(tmp_path / 'w', tmp_path, '--config=configs/from_json.py:nowhere.json'))
    assert 'nowhere.json' in text


def test_a_missing_data_set_is_refused(tmp_path):
    assert 'scripts/download_dataset.sh digits' in refused(run(tmp_path / 'w', tmp_path))
    assert not (tmp_path / 'w').exists()


def test_a_batch_that_does_not_fit_is_refused(digits_dir, tmp_path):
    text = refused(run(tmp_path / 'w', digits_dir, '--config.per_device_batch=48'))
    assert 'those that fit' in text
    assert not (tmp_path / 'w').exists()


def test_a_strange_work_directory_is_left_alone(digits_dir, tmp_path):
    workdir = tmp_path / 'thesis'
    workdir.mkdir()
    (workdir / 'chapter').write_text('1')
    assert 'not empty and holds no run' in refused(run(workdir, digits_dir))
    assert (workdir / 'chapter').read_text() == '1'


def test_a_work_directory_that_cannot_be_made_is_refused(digits_dir, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot be written' in refused(run(tmp_path / 'file' / 'w', digits_dir))


ONE_EPOCH = ('--config.seed=3', '--config.max_epochs=1')


@pytest.fixture(scope='module')
def corrected(digits_dir, tmp_path_factory):
    """The work directory of a run of one epoch, and its output; two wrong commands came first."""
    workdir = tmp_path_factory.mktemp('corrected') / 'w'
    for wrong in ('image_size=9', f'init_from={workdir.parent}/none/checkpoints/3'):
        text = refused(run(workdir, digits_dir, *ONE_EPOCH, f'--config.{wrong}'))
        assert wrong.partition('=')[0] in text
        assert not workdir.exists()
    done = run(workdir, digits_dir, *ONE_EPOCH)
    assert done.returncode == 1, done.stderr
    return workdir, done.stdout


def test_a_wrong_command_leaves_nothing_and_the_right_one_says_what_it_does(corrected):
    workdir, said = corrected
    lines = said.splitlines()
    assert max(map(len, lines[: lines.index('compiling …')])) <= 80
    for line in ('devices     1 × cpu', 'seed        3', 'start       new run'):
        assert line in lines
    assert lines[-1] == f'{workdir}: the target was missed'
    assert 'compiled in ' in said


@pytest.fixture
def unfinished(corrected, tmp_path):
    """A copy of its work directory, as if it had been killed before its last line of the log."""
    workdir = tmp_path / 'w'
    shutil.copytree(corrected[0], workdir)
    lines = (workdir / 'mlperf.log').read_text().splitlines(keepends=True)
    assert 'run_stop' in lines[-1]
    (workdir / 'mlperf.log').write_text(''.join(lines[:-1]))
    return workdir


def contents(workdir):
    return {p: p.is_file() and p.read_bytes() for p in sorted(workdir.rglob('*'))}


def delete_the_log(workdir):
    (workdir / 'mlperf.log').unlink()


def cut_the_log(workdir):
    lines = (workdir / 'mlperf.log').read_text().splitlines(keepends=True)
    (workdir / 'mlperf.log').write_text(''.join(lines[: len(lines) // 2]))


def set_the_clock_back(workdir):
    log = workdir / 'mlperf.log'
    *lines, last = log.read_text().splitlines(keepends=True)
    time_ms = json.loads(last.partition(' ')[2])['time_ms']
    log.write_text(''.join(lines) + last.replace(str(time_ms), str(time_ms + 86_400_000)))


def forget_the_seed(workdir):
    values = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps(values | {'seed': None}))


def log_another_seed(workdir):
    log = workdir / 'mlperf.log'
    log.write_text(re.sub(r'("key": "seed", "value": )3', r'\g<1>4', log.read_text()))


def put_another_models_checkpoint_there(workdir):
    tree = newest(workdir)
    del tree['variables']['params']['conv1']
    checkpointing.write(workdir / 'checkpoints' / '99', tree, {})


REASONS = {
    delete_the_log: 'mlperf.log is missing or empty',
    cut_the_log: 'there is a checkpoint of step 12',
    set_the_clock_back: 'the clock was set back',
    forget_the_seed: '"seed" is null',
    log_another_seed: 'seed = 4, where this run writes seed = 3',
    put_another_models_checkpoint_there: 'another model',
}


@pytest.mark.parametrize(
    'damage',
    [delete_the_log, *(pytest.param(d, marks=pytest.mark.slow) for d in list(REASONS)[1:])],
    ids=lambda damage: damage.__name__,
)
def test_a_run_does_not_resume_from_what_it_has_not_left(digits_dir, unfinished, damage):
    damage(unfinished)
    before = contents(unfinished)
    assert REASONS[damage] in refused(run(unfinished, digits_dir, '--config.max_epochs=1'))
    assert contents(unfinished) == before


@pytest.mark.slow
def test_a_run_resumes_with_damaged_metrics(digits_dir, unfinished, corrected):
    """And with a newer checkpoint that is damaged."""
    metrics_file = unfinished / 'metrics.jsonl'
    content = bytearray(metrics_file.read_bytes())
    content[5] ^= 0x80
    metrics_file.write_bytes(bytes(content) + b'[]\n')
    (unfinished / 'checkpoints' / '99').mkdir()
    done = run(unfinished, digits_dir, *ONE_EPOCH)
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    assert 'resumed from step 12' in done.stdout
    assert '2 damaged line(s) dropped' in done.stdout
    assert f'{unfinished}/checkpoints/99 is damaged' in done.stdout
    assert metrics(unfinished) == metrics(corrected[0])[1:]


@pytest.mark.slow
def test_data_are_read_after_run_start_and_a_broken_record_stops_the_run(digits_dir, tmp_path):
    shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
    for shard in tmp_path.glob('digits/**/*array_record*'):
        shard.write_bytes(b'x' * shard.stat().st_size)
    done = run(tmp_path / 'w', tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert 'digits' in done.stderr
    events = [event['key'] for event in mlperf_log.read(tmp_path / 'w' / 'mlperf.log')]
    assert 'run_start' in events
    assert 'run_stop' not in events


def test_help_is_fast_and_lists_every_field():
    done = subprocess.run(
        [sys.executable, ROOT / 'main.py', '--help'], capture_output=True, text=True, check=True
    )
    assert '--config.bn_span' in done.stdout
    loaded = 'import sys, main; print(int("jax" in sys.modules))'
    done = subprocess.run(
        [sys.executable, '-c', loaded], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == '0'
