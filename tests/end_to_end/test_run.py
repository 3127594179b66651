# SPDX-License-Identifier: Apache-2.0
"""The program as a user meets it: real runs in processes of their own."""

import json
import shutil

import pytest

from run_files import mlperf_log
from tests.end_to_end.conftest import EASY
from tests.end_to_end.program import assert_as_if_undisturbed, run, share_programs
from tests.harness import is_same
from training import checkpointing


def train(workdir, data_dir, *flags, **how):
    """Runs main.py; returns the finished process."""
    return run('main.py', f'--workdir={workdir}', f'--config.data_dir={data_dir}', *flags, **how)


def newest(workdir):
    steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
    return checkpointing.read(workdir / 'checkpoints' / str(max(steps)))[0]


def metrics(workdir):
    """Every metric that is not a time."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    times = {key for line in lines for key in line if 'second' in key}
    times |= {'input_wait', 'throughput'}
    return [{key: line[key] for key in line.keys() - times} for line in lines]


def test_a_run_that_is_killed_resumes_and_ends_as_if_it_had_not_been(program, reached):
    """By the same command, up to its target: the same weights, and a log that is accepted."""
    killed = program(**EASY).start()
    killed.until_said('step 10/')  # After an evaluation and a checkpoint.
    killed.process.kill()
    killed.wait()
    assert killed.steps()
    assert killed.run() == 0, killed.said()
    assert 'resumed from step ' in killed.said()
    assert_as_if_undisturbed(killed, reached)
    judged = run('scripts/judge_run.py', killed.workdir)
    assert judged.returncode == 0, judged.stdout
    assert 'accepted by the compliance checker' in judged.stdout


@pytest.mark.slow
def test_run_and_time_reaches_the_target_and_the_checker_accepts(
    digits_dir, tmp_path, own_environment
):
    """From another folder, with a space in a path."""
    workdir = tmp_path / 'a run'
    done = run(
        'scripts/run_and_time.sh', f'--workdir={workdir}', f'--config.data_dir={digits_dir}',
        cwd=share_programs(tmp_path), **own_environment,
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
def test_same_seed_is_bitwise_equal_and_missing_the_target_is_reported(digits_dir, tmp_path):
    share_programs(tmp_path)
    flags = ('--config.seed=11', '--config.max_epochs=2')
    first = train(tmp_path / 'a', digits_dir, *flags)
    assert first.returncode == 1, first.stderr
    assert 'the target was missed' in first.stdout
    events = mlperf_log.read(tmp_path / 'a' / 'mlperf.log')
    assert [e['value'] for e in events if e['key'] == 'seed'] == [11]
    assert [e['metadata']['status'] for e in events if e['key'] == 'run_stop'] == ['aborted']
    assert [e['value'] for e in events if e['key'] == 'train_samples'] == [1437]

    # The finished run is not run again, and its work directory is no other run's.
    before = contents(tmp_path / 'a')
    assert train(tmp_path / 'a', digits_dir, *flags).returncode == 1
    other = train(tmp_path / 'a', digits_dir, *flags, '--config.learning_rate=1.0')
    assert 'another configuration (learning_rate' in rejected(other)
    assert contents(tmp_path / 'a') == before

    # What was written can be fed back, with another number of threads.
    recorded = f'--config={tmp_path}/a/config.json'
    again = train(tmp_path / 'b', digits_dir, recorded, '--config.data_threads=1')
    assert again.returncode == 1, again.stderr
    assert is_same(newest(tmp_path / 'a'), newest(tmp_path / 'b'))
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')


def rejected(done):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith('error: ')
    assert 'Traceback' not in done.stderr
    return done.stderr


def test_a_bad_configuration_is_rejected_whole_before_anything_is_written(tmp_path):
    flags = ('--config.weight_decay=0.0003', '--config.momentum=0.5', '--config.batch=64')
    text = rejected(train(tmp_path / 'w', tmp_path, *flags))
    assert 'weight_decay' in text
    assert 'momentum' in text
    assert 'unknown hyperparameter batch' in text
    assert list(tmp_path.iterdir()) == []


def test_a_missing_configuration_file_is_reported(tmp_path):
    assert 'digits.py' in rejected(train(tmp_path / 'w', tmp_path, '--config=configs/digit.py'))
    text = rejected(train(tmp_path / 'w', tmp_path, '--config=nowhere.json'))
    assert 'nowhere.json' in text


def test_a_missing_data_set_is_rejected(tmp_path):
    assert 'scripts/download_dataset.sh digits' in rejected(train(tmp_path / 'w', tmp_path))
    assert not (tmp_path / 'w').exists()


def test_a_batch_that_does_not_fit_is_rejected(digits_dir, tmp_path):
    text = rejected(train(tmp_path / 'w', digits_dir, devices=3))
    assert 'Use a number of devices that divides them: 1, 2, 4, 8' in text
    assert not (tmp_path / 'w').exists()


def test_a_strange_work_directory_is_left_alone(digits_dir, tmp_path):
    workdir = tmp_path / 'thesis'
    workdir.mkdir()
    (workdir / 'chapter').write_text('1')
    assert 'not empty and holds no run' in rejected(train(workdir, digits_dir))
    assert (workdir / 'chapter').read_text() == '1'


def test_a_work_directory_that_cannot_be_made_is_rejected(digits_dir, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot be written' in rejected(train(tmp_path / 'file' / 'w', digits_dir))


@pytest.mark.parametrize('wrong', ['image_size=9', 'init_from=nowhere/checkpoints/3'])
def test_a_wrong_command_leaves_nothing(digits_dir, tmp_path, wrong):
    text = rejected(train(tmp_path / 'w', digits_dir, f'--config.{wrong}'))
    assert wrong.partition('=')[0] in text
    assert not (tmp_path / 'w').exists()


def test_a_run_says_what_it_does(reached):
    lines = reached.said().splitlines()
    assert max(map(len, lines[: lines.index('compiling …')])) <= 80
    for line in ('devices     1 × cpu', 'seed        7', 'start       new run'):
        assert line in lines
    assert 'compiled in ' in reached.said()
    assert lines[-1] == f'{reached.workdir}: the target was reached'


@pytest.fixture
def unfinished(program, reached):
    """A run with a copy of its files, as if it had been killed before its last line of the log."""
    copy = program(**EASY)
    shutil.copytree(reached.workdir, copy.workdir)
    lines = (copy.workdir / 'mlperf.log').read_text().splitlines(keepends=True)
    assert 'run_stop' in lines[-1]
    (copy.workdir / 'mlperf.log').write_text(''.join(lines[:-1]))
    return copy


def contents(workdir):
    return {p: p.is_file() and p.read_bytes() for p in sorted(workdir.rglob('*'))}


def delete_the_log(workdir):
    (workdir / 'mlperf.log').unlink()


def put_another_models_checkpoint_there(workdir):
    tree = newest(workdir)
    del tree['variables']['params']['conv1']
    checkpointing.write(workdir / 'checkpoints' / '999', tree, {})


# Other reasons: tests/run_files/test_mlperf_log.py and test_work_directory.py.
@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (delete_the_log, 'mlperf.log is missing or empty'),
        (put_another_models_checkpoint_there, 'another model'),
    ],
)
def test_a_run_does_not_resume_from_what_it_has_not_left(unfinished, damage, reason):
    damage(unfinished.workdir)
    before = contents(unfinished.workdir)
    assert unfinished.run() == 2
    assert unfinished.said().startswith('error: ')
    assert reason in unfinished.said()
    assert contents(unfinished.workdir) == before


@pytest.mark.slow
def test_a_run_resumes_with_damaged_metrics(unfinished, reached):
    """And with a newer checkpoint that is damaged."""
    metrics_file = unfinished.workdir / 'metrics.jsonl'
    content = bytearray(metrics_file.read_bytes())
    content[5] ^= 0x80
    metrics_file.write_bytes(bytes(content) + b'[]\n')
    (unfinished.workdir / 'checkpoints' / '999').mkdir()
    assert unfinished.run() == 0, unfinished.said()
    assert 'Traceback' not in unfinished.said()
    assert f'resumed from step {max(reached.steps())}' in unfinished.said()
    assert '2 damaged line(s) dropped' in unfinished.said()
    assert f'{unfinished.workdir}/checkpoints/999 is damaged' in unfinished.said()
    assert metrics(unfinished.workdir) == metrics(reached.workdir)[1:]


@pytest.mark.slow
def test_data_are_read_after_run_start_and_a_broken_record_stops_the_run(digits_dir, tmp_path):
    shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
    for shard in tmp_path.glob('digits/**/*array_record*'):
        shard.write_bytes(b'x' * shard.stat().st_size)
    done = train(share_programs(tmp_path) / 'w', tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert 'digits' in done.stderr
    events = [event['key'] for event in mlperf_log.read(tmp_path / 'w' / 'mlperf.log')]
    assert 'run_start' in events
    assert 'run_stop' not in events


def test_help_lists_every_field():
    done = run('main.py', '--help')
    assert done.returncode == 0
    assert '--config.bn_span' in done.stdout
