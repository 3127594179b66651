# SPDX-License-Identifier: Apache-2.0
"""The core runs a workload that it has never heard of, from the command line to the report."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from reporting import charts, finished_run
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
