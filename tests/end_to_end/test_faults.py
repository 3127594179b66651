# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a run, the same command resumes it: real processes, real signals."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.end_to_end import moments
from tests.end_to_end.conftest import THREE_EPOCHS
from tests.end_to_end.program import assert_as_if_undisturbed, share_programs

pytestmark = pytest.mark.slow
TRAINING = 'step 10/'  # It has trained so far when it has said this.


def test_a_signal_saves_and_leaves_and_a_damaged_checkpoint_is_skipped(program, undisturbed):
    run = program(**THREE_EPOCHS).start()
    run.until_said('step 25/')
    before = time.monotonic()
    run.process.send_signal(signal.SIGINT)
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


@pytest.mark.alone
def test_a_signal_to_one_process_stops_all_at_the_same_step(program):
    run = program(**THREE_EPOCHS).start(cpus=2)
    run.until_said(TRAINING)
    before = time.monotonic()
    os.kill(run.children()[1], signal.SIGTERM)
    assert run.wait() == 75, run.said()
    assert time.monotonic() - before < 30
    assert max(run.steps()) >= 10


def test_a_killed_process_ends_the_others_and_the_same_command_resumes(program, undisturbed):
    """The one that the others find each other by, and that writes; see also the next but one."""
    run = program(**THREE_EPOCHS).start(cpus=2)
    run.until_said('step 20/')
    before = time.monotonic()
    os.kill(run.children()[0], signal.SIGKILL)
    assert run.wait() == 3, run.said()
    assert time.monotonic() - before < 60
    assert 'process 0 was ended by SIGKILL; ending the others' in run.said()
    assert not [found for found in run.leftovers() if found.startswith('process')]
    assert run.run() == 1, run.said()
    assert run.accuracies() == undisturbed.accuracies()


@pytest.mark.alone
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
    assert 'of several processes' in first.said() or 'another task died' in first.said()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(program):
    wild = THREE_EPOCHS | {'learning_rate': 1e6, 'warmup_epochs': 1, 'checkpoint_every_steps': 1}
    run = program(**wild)
    assert run.run() == 3, run.said()
    assert 'not finite or out of range at step' in run.said()
    assert 'is good' not in run.said()
    step = int(run.said().partition('out of range at step ')[2].partition(':')[0])
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
    share_programs(tmp_path)
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
    assert run.verdict() == undisturbed.verdict()
    run.workdir.unlink()


# Its other files: tests/run_files/test_progress.py and test_work_directory.py.
@pytest.mark.parametrize('name', ['.', 'mlperf.log'])
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


@pytest.mark.alone
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(program, undisturbed):
    """In steps, saves, starts and evaluations, at random moments; experiments/kills.py has more."""
    rng, run = random.Random(5), program(**THREE_EPOCHS)
    for number in range(5):
        run.start()
        moments.ALL[number % len(moments.ALL)](run, rng)
        assert run.is_running(), 'it was done before it was killed'
        run.process.kill()
        run.wait()
    assert run.run() == 1, run.said()
    assert_as_if_undisturbed(run, undisturbed)
