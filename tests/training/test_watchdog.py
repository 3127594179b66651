# SPDX-License-Identifier: Apache-2.0
"""A run that hangs ends itself and says where; one that is paused or debugged does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name('watched.py')


def start(seconds, what):
    return subprocess.Popen(
        [sys.executable, PROGRAM, seconds, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_hangs_says_what_it_did_last_and_where_it_is():
    run = start('0.5', 'hangs')
    _, said = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGALRM
    assert 'since step 4' in said
    assert 'waits_for_a_peer' in said
    assert 'The same command resumes' in said


@pytest.mark.parametrize(
    ('seconds', 'what'), [('0.5', 'moves'), ('0.5', 'is_stopped'), ('none', 'sleeps')]
)
def test_a_run_that_moves_or_is_not_watched_is_left_alone(seconds, what):
    run = start(seconds, what)
    assert run.communicate(timeout=60)[1] == ''
    assert run.returncode == 0


def test_a_paused_process_is_left_alone():
    run = start('0.6', 'moves')
    run.stdout.readline()
    os.kill(run.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(run.pid, signal.SIGCONT)
    assert run.communicate(timeout=60)[1] == ''
    assert run.returncode == 0


def test_a_debugger_is_left_alone():
    """And the run has the whole time again after it."""
    run = start('0.9', 'is_debugged')
    time.sleep(2.5)
    assert run.poll() is None
    out, err = run.communicate('continue\n', timeout=60)
    assert run.returncode == 0, err
    assert 'after' in out
