# SPDX-License-Identifier: Apache-2.0
"""Logs of real runs: of several processes, resumed, aborted; and from seeds to a submission."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reporting import finished_run, run_sets, verdicts
from scripts import make_rcps, report

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RULESET = '4.0.0'
EASY = ['--config.target_top1=0.6', '--config.eval_every_epochs=2']  # Met after 6 epochs or so.


def start(program, *arguments) -> subprocess.Popen:
    """A program of the repository, on one CPU device for each process."""
    environment = os.environ | {'XLA_FLAGS': ''}
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def end(process: subprocess.Popen, status: int) -> str:
    """Waits for a program to end with this status; what it said."""
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        process.terminate()
    assert process.returncode == status, said
    return said


def test_two_processes_stopped_and_gone_on_with_as_one_leave_one_good_log(digits_dir, tmp_path):
    run = [f'--workdir={tmp_path}/runs/1', f'--config.data_dir={digits_dir}', *EASY]
    process = start('scripts/launch.py', '--cpus=2', '--', ROOT / 'main.py', *run)
    log = tmp_path / 'runs/1/mlperf.log'
    until = time.monotonic() + 200
    while not (log.exists() and 'eval_stop' in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    end(process, 75)
    with pytest.raises(finished_run.RunError, match='run_stop is missing'):
        finished_run.read_events(log)
    end(start('main.py', *run), 0)
    passed, text = verdicts.complies(log, RULESET)
    assert passed, text
    epochs = [epoch for epoch, _ in finished_run.read_run(log.parent).results]
    assert epochs == sorted(set(epochs))


def test_run_that_misses_its_target_is_refused(digits_dir, tmp_path):
    run = [f'--workdir={tmp_path}/runs/1', f'--config.data_dir={digits_dir}']
    end(start('main.py', *run, '--config.max_epochs=1'), 1)
    passed, text = verdicts.complies(tmp_path / 'runs/1/mlperf.log', RULESET)
    assert not passed
    assert 'aborted' in text


def test_seeds_make_a_report_and_a_checked_set(digits_dir, tmp_path, capsys):
    """Real files of two real runs go through every reader of them."""
    out = tmp_path / 'seeds'
    seeds = [f'--out={out}', f'--config.data_dir={digits_dir}', *EASY]
    end(start('scripts/run_seeds.py', '--runs=2', *seeds), 0)
    runs = run_sets.read_runs(out)
    assert run_sets.differences(runs) == []
    assert verdicts.seeds_differ([run.log for run in runs], RULESET)[0]
    assert report.main([str(out)]) == 0
    assert '2 of 2 runs' in (out / 'report.html').read_text()
    for run in runs:
        assert verdicts.complies(run.log, run.ruleset)[0]
        (logged,) = (event['value'] for event in run.events if event['key'] == 'seed')
        assert json.loads((run.directory / 'config.json').read_text())['seed'] == logged
    assert make_rcps.main([str(out)]) == 2
    assert 'at least 10' in capsys.readouterr().err
