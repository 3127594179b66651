# SPDX-License-Identifier: Apache-2.0
"""Many seeds: finished runs are kept, others resume, and what cannot is left alone with a reason.

The training program is replaced by `fake_training.py`.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import run_seeds
from tests.synthetic_runs import curve, resolve, write_run

PROGRAM = Path(__file__).with_name('fake_training.py')


@pytest.fixture
def out(tmp_path):
    """A folder of runs."""
    folder = tmp_path / 'out'
    folder.mkdir()
    return folder


@pytest.fixture
def seeds(out):
    """Calls run_seeds on a folder of runs, each with a behaviour by name; (status, folder)."""

    def call(*arguments, **behaviours):
        names = {name.removeprefix('run_'): value for name, value in behaviours.items()}
        (out / 'BEHAVIOUR').write_text(json.dumps(names))
        return run_seeds.main([f'--out={out}', '--jobs=2', *arguments], PROGRAM), out

    return call


def test_every_run_has_its_own_seed_and_finished_ones_are_kept(seeds, capsys):
    status, out = seeds('--runs=2')
    assert status == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob('*/mlperf.log')}
    assert len(before) == 2
    status, out = seeds('--runs=3')
    assert status == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    drawn = {json.loads(path.read_text())['seed'] for path in out.glob('*/config.json')}
    assert len(drawn) == 3
    assert '3/3 runs, 3 reached the target' in capsys.readouterr().out


def test_run_that_missed_its_target_is_a_result_and_is_kept(seeds, capsys):
    assert seeds('--runs=2', run_002='miss')[0] == 1
    assert seeds('--runs=2')[0] == 1
    assert '1 missed it' in capsys.readouterr().out


def test_failed_run_is_tried_again_next_time(seeds):
    assert seeds('--runs=2', run_001='fail')[0] == 3
    assert seeds('--runs=2')[0] == 0


def test_run_that_cannot_resume_is_left_alone_and_the_others_are_made(seeds, capsys):
    _, out = seeds('--runs=2')
    (out / '002' / 'mlperf.log').write_text('no log')
    capsys.readouterr()
    status, _ = seeds('--runs=3')
    assert status == 3
    assert (out / '002' / 'mlperf.log').read_text() == 'no log'
    said = capsys.readouterr().out
    assert 'run 002 was rejected: error: a line is damaged' in said
    assert '2 reached the target, 0 missed it, 1 failed' in said
    assert f'rename {out / "002"} to 002.damaged-1' in said
    (out / '002').rename(out / '002.damaged-1')
    assert seeds('--runs=3')[0] == 0


def test_error_of_all_runs_ends_at_once_with_its_words(seeds, capsys):
    assert seeds('--runs=50', run_001='rejected', run_002='rejected')[0] == 2
    assert 'the data set is missing' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--config.seed=3'], 'draws its own seed'),
        (['--config.momentum=2'], 'breaks the rule'),
        (['--config=none.py'], 'no such file'),
        (['--config.learning_rate=7'], 'another configuration'),
    ],
)
def test_rejections(seeds, capsys, arguments, words):
    _, out = seeds('--runs=1')
    with (out / '001' / 'mlperf.log').open('r+') as log:  # As of a run that was interrupted.
        log.truncate(1000)
    before = sorted(out.iterdir())
    assert seeds('--runs=2', *arguments)[0] == 2
    assert words in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_let_the_runs_save_and_end(out, number):
    """Repeated, too; after SIGKILL the system tells the runs."""
    (out / 'BEHAVIOUR').write_text(json.dumps({'001': 'wait', '002': 'wait'}))
    command = [sys.executable, PROGRAM, 'seeds', '--runs=2', '--jobs=2', f'--out={out}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def until_both_say(word):
        until = time.monotonic() + 60
        texts = [out / '001.txt', out / '002.txt']
        while not all(path.exists() and word in path.read_text() for path in texts):
            assert time.monotonic() < until
            time.sleep(0.1)

    until_both_say('running')
    process.send_signal(number)
    time.sleep(0.5)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    until_both_say('saved')
    if number != signal.SIGKILL:
        assert process.returncode == 75
        assert 'the same command resumes' in said


def test_signal_while_a_run_is_started_reaches_that_run(seeds, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, 'Popen', Popen)
    assert seeds('--runs=3', run_001='wait', run_002='wait')[0] == 75
    assert len(started) <= 2
    assert {process.poll() for process in started} <= {75, -signal.SIGTERM}


def test_what_is_ignored_stays_ignored(seeds):
    """As nohup does it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert seeds('--runs=1')[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_reads_what_a_run_left(tmp_path):
    config = resolve('digits')
    write_run(tmp_path / 'a', config, curve(config, 4))
    assert run_seeds.finished(tmp_path / 'a', config) == 0
    assert run_seeds.finished(tmp_path / 'none', config) is None
