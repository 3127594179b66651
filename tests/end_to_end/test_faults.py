# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a run, the same command goes on with it: real processes, real signals."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from reporting.verdicts import accepted
from tests.end_to_end.conftest import THREE_EPOCHS
from tests.harness import is_same

pytestmark = pytest.mark.slow
TRAINING = 'step 10/'  # It has trained so far when it has said this.


def judged(run):
    return accepted(run.workdir / 'mlperf.log', '4.0.0')


def assert_as_if_undisturbed(run, undisturbed):
    """The same weights bit for bit, the same evaluations, one valid log."""
    assert is_same(run.checkpoint(), undisturbed.checkpoint())
    assert run.accuracies() == undisturbed.accuracies()
    assert run.evaluated() == undisturbed.evaluated()
    for key in ('init_start', 'init_stop', 'run_start', 'run_stop'):
        assert len(run.events(key)) == 1, key
    valid, said = judged(run)
    assert valid, said


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_leaves_and_a_damaged_checkpoint_is_passed_over(
    program, undisturbed, number
):
    run = program(**THREE_EPOCHS).start()
    run.until_said('step 25/')
    before = time.monotonic()
    run.process.send_signal(number)
    assert run.wait() == 75, run.said()
    assert time.monotonic() - before < 30
    assert 'the same command resumes it' in run.said()
    stopped, previous = sorted(run.steps(), reverse=True)

    data = max((run.workdir / 'checkpoints' / str(stopped) / 'state').rglob('*'), key=size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert run.run() == 1, run.said()
    assert f'{run.workdir / "checkpoints" / str(stopped)} is damaged' in run.said()
    assert 'Traceback' not in run.said()
    assert previous < stopped
    assert_as_if_undisturbed(run, undisturbed)


def size(path):
    return path.stat().st_size if path.is_file() else 0


@pytest.mark.parametrize('whom', ['one', 'all'])
def test_a_signal_to_one_process_or_to_all_stops_all_at_the_same_step(program, whom):
    run = program(**THREE_EPOCHS).start(cpus=2)
    run.until_said(TRAINING)
    before = time.monotonic()
    for child in run.children()[-1:] if whom == 'one' else run.children():
        os.kill(child, signal.SIGTERM)
    assert run.wait() == 75, run.said()
    assert time.monotonic() - before < 30
    assert max(run.steps()) >= 10


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(
    program, undisturbed, victim
):
    run = program(**THREE_EPOCHS).start(cpus=2)
    run.until_said('step 20/')
    before = time.monotonic()
    os.kill(run.children()[victim], signal.SIGKILL)
    assert run.wait() == 3, run.said()
    assert time.monotonic() - before < 60
    assert f'process {victim} was ended by SIGKILL; ending the others' in run.said()
    assert not [found for found in run.leftovers() if found.startswith('process')]
    assert run.run() == 1, run.said()
    assert run.accuracies() == undisturbed.accuracies()


def test_a_run_that_hangs_says_where_ends_and_resumes(program, undisturbed):
    """One process is alive and does nothing, and the others wait for it."""
    run = program(**THREE_EPOCHS, stall_seconds=8).start(cpus=2)
    run.until_said('step 20/')
    os.kill(run.children()[1], signal.SIGSTOP)
    assert run.wait() == 75, run.said()
    assert '[0] error: nothing has happened for stall_seconds=8 since ' in run.said()
    assert 'in train_block' in run.said()
    assert 'process 0 was ended by SIGALRM; ending the others' in run.said()
    assert not [found for found in run.leftovers() if found.startswith('process')]
    assert run.run() == 1, run.said()
    assert run.accuracies() == undisturbed.accuracies()


def test_a_peer_that_dies_ends_a_process_that_nobody_supervises(program):
    """As on several machines, where no launcher sees both."""
    from scripts.launch import free_port

    place = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
    first, second = program('peers', **THREE_EPOCHS), program('peers', **THREE_EPOCHS)
    second.output = second.output.with_suffix('.second')
    first.start(more=[*place, '--process_id=0'])
    second.start(more=[*place, '--process_id=1'])
    first.until_said(TRAINING)
    before = time.monotonic()
    second.process.kill()
    assert first.wait() not in (0, 1, 75)
    assert time.monotonic() - before < 60
    assert 'another process' in first.said() or 'another task died' in first.said()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(program):
    wild = THREE_EPOCHS | {'learning_rate': 1e6, 'warmup_epochs': 1, 'checkpoint_every_steps': 1}
    run = program(**wild)
    assert run.run() == 3, run.said()
    assert 'is not finite at step' in run.said()
    assert 'is good' not in run.said()
    step = int(run.said().partition('is not finite at step ')[2].partition(';')[0])
    kept = run.checkpoint()
    assert int(kept['step']) < step
    import jax
    import numpy as np

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds one checkpoint and not two."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs', str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip('mounting a small file system needs root')
    yield disk
    subprocess.run(['umount', '--lazy', str(disk)], check=True)


def test_a_full_disk_does_not_end_the_run_and_is_reported(program, small_disk, undisturbed):
    run = program(**THREE_EPOCHS)
    run.workdir.mkdir()
    (run.workdir / 'checkpoints').symlink_to(small_disk)
    (run.workdir / 'config.json').write_text((undisturbed.workdir / 'config.json').read_text())
    assert run.run() == 1, run.said()
    assert 'a checkpoint could not be saved' in run.said()
    assert 'Traceback' not in run.said()
    assert len([x for x in run.said().splitlines() if 'No space' in x]) == run.said().count('saved')
    assert run.accuracies() == undisturbed.accuracies()
    (run.workdir / 'checkpoints').unlink()


def fill_up(path):
    with contextlib.suppress(OSError), path.open('ab', buffering=0) as file:
        while True:
            file.write(bytes(1000))


def test_a_disk_that_fills_up_ends_the_run_and_the_same_command_resumes(
    program, small_disk, undisturbed
):
    run = program(**THREE_EPOCHS | {'checkpoint_every_steps': None, 'log_every_steps': 1})
    run.workdir.symlink_to(small_disk)
    run.start().until_said(TRAINING)
    fill = small_disk / 'lock'  # A file that a run has, and does not read.
    fill_up(fill)
    assert run.wait() == 3, run.said()
    said = run.said()
    assert 'Traceback' not in said
    assert 'error: the disk is full: ' in said
    assert 'the same command then resumes' in said
    os.truncate(fill, 0)
    assert run.run() == 1, run.said()
    assert run.accuracies() == undisturbed.accuracies()
    assert judged(run) == judged(undisturbed)
    run.workdir.unlink()


@pytest.mark.parametrize('name', ['.', 'mlperf.log', 'metrics.jsonl', 'config.json'])
def test_a_run_whose_files_are_deleted_does_not_end_well(program, name):
    run = program(**THREE_EPOCHS).start()
    run.until_said(TRAINING)
    if name == '.':
        shutil.rmtree(run.workdir, ignore_errors=True)
    else:
        (run.workdir / name).unlink()
    assert run.wait() == 3, run.said()
    assert 'Traceback' not in run.said()
    assert str(run.workdir / name) in run.said() or name in run.said()
    assert not run.events('run_stop')


# When to kill: at a random moment after the start, or when it is seen to do something.
def in_the_start(run, rng):
    time.sleep(rng.uniform(0, 5))


def in_a_step(run, rng):
    seen = len(run.said())
    run.until(lambda: 'step ' in run.said()[seen:])
    time.sleep(rng.uniform(0, 0.3))


def in_a_save(run, rng):
    checkpoints = run.workdir / 'checkpoints'
    run.until(lambda: any('tmp' in path.name for path in checkpoints.glob('*')))
    time.sleep(rng.uniform(0, 0.05))


def in_an_evaluation(run, rng):
    before = len(run.events('eval_start'))
    run.until(lambda: len(run.events('eval_start')) > before)
    time.sleep(rng.uniform(0, 0.02))


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(program):
    """To the target, killed in steps, saves, starts and evaluations, at random moments."""
    rng = random.Random(5)
    config = {'checkpoint_every_steps': 5, 'log_every_steps': 2}
    undisturbed, run = program('calm', **config), program('killed', **config)
    assert undisturbed.run() == 0, undisturbed.said()
    moments = [in_a_step, in_a_save, in_the_start, in_an_evaluation]
    for i in range(20):
        run.start()
        moments[i % len(moments)](run, rng)
        assert run.process.poll() is None, 'it was done before it was killed'
        run.process.kill()
        run.wait()
    assert run.run() == 0, run.said()
    assert_as_if_undisturbed(run, undisturbed)


def test_kills_with_a_change_of_processes_end_at_the_same_accuracy(program, undisturbed):
    run, rng = program(**THREE_EPOCHS), random.Random(6)
    for how, moment in (({'cpus': 2}, in_a_step), ({'devices': 4}, in_a_save)):
        run.start(**how)
        moment(run, rng)
        victims = run.children() if 'cpus' in how else [run.process.pid]
        os.kill(rng.choice(victims), signal.SIGKILL)
        run.wait()
    assert run.run() == 1, run.said()
    assert run.accuracies() == undisturbed.accuracies()
    assert len(run.events('run_stop')) == 1
    assert judged(run)[0]
