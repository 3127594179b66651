# SPDX-License-Identifier: Apache-2.0
"""The core runs a workload that it has never heard of, from the command line to the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from reporting import charts, finished_run
from scripts.launch import free_port
from settings import errors
from tests import dummy_workload
from training import checkpointing
from workloads import by_name

PROGRAM = Path(__file__).with_name('dummy.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the runs are, beside their configuration."""
    folder = tmp_path_factory.mktemp('dummy')
    (folder / 'dummy.json').write_text(json.dumps(dummy_workload.config()))
    return folder


def run(folder, *arguments) -> tuple[int, str]:
    """Exit status and output of the program."""
    command = [sys.executable, PROGRAM, f'--config={folder}/dummy.json', *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='module')
def finished(folder):
    """A run to its target, and what it said."""
    status, said = run(folder, f'--workdir={folder}/whole', '--config.seed=3')
    assert status == errors.REACHED, said
    return folder / 'whole', said


def weights(workdir):
    newest = max((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))
    return [x.tobytes() for x in jax.tree.leaves(checkpointing.read(newest)[0]['variables'])]


def test_it_says_what_it_does_in_the_words_of_the_workload(finished):
    _, said = finished
    assert 'samples     32  step 2/64  loss' in said
    assert 'points/s' in said
    assert '\nform        a line\n' in said
    assert 'squared error 0.0' in said


def test_its_log_and_metrics_are_read_and_charted(finished, monkeypatch):
    entry = by_name.Entry(dummy_workload.DummyConfig, dummy_workload.__name__)
    monkeypatch.setitem(by_name.BENCHMARKS, 'dummy', entry)
    ended = finished_run.read_run(finished[0])
    assert ended.reached
    counts, qualities = zip(*ended.results, strict=True)
    assert counts == tuple(range(64, counts[-1] + 1, 64))
    assert all(quality > 0.05 for quality in qualities[:-1])
    assert qualities[-1] <= 0.05
    assert 'squared error' in charts.draw([ended], [])['quality'].svg
    stats = [event for event in ended.events if event['key'] == 'tracked_stats']
    assert [event['metadata']['samples_count'] for event in stats] == list(counts)
    assert {event['value']['throughput_unit'] for event in stats} == {'points/s'}
    # Of each block of 64 points; its own time, which lies within the time between its events.
    said = sum(64 / event['value']['throughput'] for event in stats)
    began = [event for event in ended.events if event['key'] == 'block_start']
    passed = sum(
        stop['time_ms'] + 1 - start['time_ms'] for start, stop in zip(began, stats, strict=True)
    )
    assert 0.1 * passed < 1000 * said < passed


def test_it_is_evaluated_alone(folder, finished):
    workdir, _ = finished
    (last,) = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()][-1:]
    checkpoint = workdir / 'checkpoints' / str(last['step'])
    status, said = run(folder, '--mode=eval', f'--config.init_from={checkpoint}')
    assert status == errors.REACHED, said
    result = json.loads(said.splitlines()[-1])
    assert result['examples'] == 30
    assert result['eval_loss'] == pytest.approx(last['eval_loss'], rel=1e-6)


def test_it_resumes_to_the_same_weights(folder, finished):
    command = (f'--workdir={folder}/parts', '--config.seed=3')
    status, said = run(folder, *command, '--config.stop_at=70')
    assert status == errors.INTERRUPTED, said
    status, said = run(folder, *command)
    assert status == errors.REACHED, said
    assert 'resumed from step ' in said
    assert weights(folder / 'parts') == weights(finished[0])


def test_a_quality_that_is_not_finite_ends_the_run(folder):
    """It can be neither logged nor met; without the error no later start could go on."""
    diverges = ('--config.learning_rate=1e9', '--config.eval_every_samples=16')
    status, said = run(folder, f'--workdir={folder}/diverged', *diverges)
    assert status == errors.FAILED, said
    assert 'error: squared error is not finite at step 1. Training has diverged' in said


ENDLESS = (
    '--config.target_error=1e-9',
    '--config.eval_every_samples=65536',
    '--config.max_samples=131072',
)


def started(folder, *arguments):
    """The program, in a process group of its own, and what it has said up to its first steps."""
    command = [sys.executable, PROGRAM, f'--config={folder}/dummy.json', *arguments]
    process: Any = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if '  step ' in line:
            break
    return process


def test_ctrl_c_in_a_terminal_saves_though_it_reaches_decoding_processes_too(folder):
    # A step of more micro-steps than there are batches ahead.
    several = ('--config.data_processes=2', '--config.global_batch_size=256')
    process = started(folder, *ENDLESS, *several, f'--workdir={folder}/terminal')
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == errors.INTERRUPTED, said
    assert 'the run was interrupted and saved' in said


def test_a_run_whose_output_nobody_reads_any_more_saves_and_ends(folder):
    """As under `| head`, or when the terminal is lost."""
    process = started(folder, *ENDLESS, f'--workdir={folder}/unread')
    process.stdout.close()
    time.sleep(0.5)  # Some lines long.
    process.terminate()
    assert process.wait(timeout=60) == errors.INTERRUPTED


def test_a_run_whose_errors_nobody_reads_fails_with_its_status(folder):
    process = started(folder, *ENDLESS, f'--workdir={folder}/fails')
    process.stdout.close()
    shutil.rmtree(folder / 'fails')
    assert process.wait(timeout=60) == errors.FAILED


def test_processes_that_do_not_share_the_work_directory_are_rejected_each_time(folder):
    """Nothing but a lock is written, so that the second start finds what the first one found."""
    for _ in range(2):
        place = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
        command = [sys.executable, PROGRAM, f'--config={folder}/dummy.json', *place]
        peers = [
            subprocess.Popen(
                [*command, f'--process_id={i}', f'--workdir={folder}/of-{i}'],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '1'},
            )
            for i in range(2)
        ]  # fmt: skip
        for peer in peers:
            said = peer.communicate(timeout=60)[0]
            assert peer.returncode == errors.REJECTED, said
            assert 'error: process 1 does not see' in said
        assert [path.name for path in (folder / 'of-0').iterdir()] == ['lock']
