# SPDX-License-Identifier: Apache-2.0
"""The launcher: which device each process sees, how they are asked to stop, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import end_with_parent
from settings import errors

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name('launched.py')


def launch(*flags, program, **environment):
    """Starts the launcher on the program and its arguments."""
    return subprocess.Popen(
        [sys.executable, ROOT / 'scripts' / 'launch.py', *flags, '--', PROGRAM, *program],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_that_they_end(*pids):
    """All these processes, in some seconds."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def test_each_process_is_bound_to_one_gpu_and_its_lines_are_prefixed():
    run = launch('--gpus=2', program=['show'], CUDA_VISIBLE_DEVICES='3,GPU-5,6')
    lines = sorted(run.communicate(timeout=60)[0].splitlines())
    assert run.returncode == 0
    assert lines[0].startswith("[0] ('--coordinator=127.0.0.1:")
    assert lines[0].endswith("'--num_processes=2', '--process_id=0') cuda 3")
    assert lines[1].endswith("'--num_processes=2', '--process_id=1') cuda GPU-5")


@pytest.mark.parametrize(('visible', 'count'), [('0,1', 2), ('', 0)])
def test_more_gpus_than_are_visible_are_rejected(visible, count):
    run = launch('--gpus=3', program=['show'], CUDA_VISIBLE_DEVICES=visible)
    assert f'names only {count}' in run.communicate(timeout=60)[0]
    assert run.returncode == 2


@pytest.mark.parametrize(('codes', 'status'), [('0,0', 0), ('1,1', 1), ('75,75', 75), ('0,2', 2)])
def test_the_runs_status_is_that_of_its_processes(codes, status):
    run = launch('--cpus=2', program=['exits', codes])
    run.communicate(timeout=60)
    assert run.returncode == status


@pytest.mark.parametrize(
    ('number', 'status'),
    [(signal.SIGALRM, errors.INTERRUPTED), (signal.SIGUSR1, errors.FAILED)],
    ids=['hangs, so that it is to be resumed', 'failed'],
)
def test_one_that_ends_itself_by_a_signal_ends_the_others(number, status):
    run = launch('--cpus=2', '--grace=0.5', program=['is_ended_by', str(int(number))])
    said = run.communicate(timeout=60)[0]
    assert f'process 1 was ended by {number.name}; ending the others' in said
    assert run.returncode == status


def test_one_that_is_killed_ends_the_others_and_their_helpers(tmp_path):
    """Also those that ignore SIGTERM."""
    run = launch('--cpus=3', '--grace=0.5', program=['has_helpers', str(tmp_path)])
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 3
    assert 'process 1 was ended by SIGKILL; ending the others' in said
    pids = [int(path.name.removeprefix('pid-')) for path in tmp_path.iterdir()]
    assert len(pids) == 6
    assert_that_they_end(*pids)


@pytest.mark.parametrize(
    ('number', 'becomes'),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),  # A terminal that is lost.
    ],
    ids=lambda number: number.name,
)
def test_signals_are_passed_on_to_all(number, becomes):
    run = launch('--cpus=2', program=['saves', '1'])
    ready = [run.stdout.readline() for _ in range(2)]
    assert all('pid' in line for line in ready)
    run.send_signal(number)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 75
    assert sorted(said.splitlines()) == [f'[{i}] got {int(becomes)}' for i in range(2)]


def test_a_launcher_whose_output_nobody_reads_passes_signals_on():
    run = launch('--cpus=1', program=['saves', '20000'])  # More than a pipe holds.
    run.stdout.readline()
    run.stdout.close()
    run.terminate()
    assert run.wait(timeout=20) == 75


def test_a_signal_before_anything_can_be_saved_ends_the_run_with_the_signals_status():
    run = launch('--cpus=1', program=['sleeps'])
    run.stdout.readline()
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM


def test_killing_the_launcher_ends_the_processes():
    run = launch('--cpus=2', program=['sleeps'])
    pids = [int(run.stdout.readline().split()[-1]) for _ in range(2)]
    run.kill()
    run.wait()
    assert_that_they_end(*pids)


def test_a_process_whose_parent_died_before_it_started_does_not_start():
    command = end_with_parent.wrap(['echo', 'started'])
    command[2] = '1'
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b'')


@pytest.mark.parametrize(
    ('status', 'becomes'),
    [
        (errors.REACHED, errors.REACHED),
        (errors.REJECTED, errors.REJECTED),
        (128 + signal.SIGALRM, errors.INTERRUPTED),
        (128 + signal.SIGUSR1, errors.FAILED),
        (128 + signal.SIGTERM, 128 + signal.SIGTERM),
    ],
)
def test_shell_scripts_know_what_a_signal_means(status, becomes):
    done = subprocess.run(
        ['bash', '-c', f'source {ROOT}/scripts/lib.sh && exit_status {status}'],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(done.stdout) == becomes
