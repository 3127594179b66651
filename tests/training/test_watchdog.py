# SPDX-License-Identifier: Apache-2.0
"""A run that hangs ends itself and says where; one that is paused or debugged does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, threading, time
from training import watchdog
watchdog.TICK_SECONDS = 0.05
dog = watchdog.Watchdog({seconds})
dog.start()
{body}
"""


def start(tmp_path, seconds, body):
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM.format(root=str(ROOT), seconds=seconds, body=body))
    return subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_hangs_says_what_it_did_last_and_where_it_is(tmp_path):
    body = """
def waits_for_a_peer():
    threading.Lock().acquire() and threading.Event().wait()
for step in range(5):
    dog.beat(f'step {step}')
    time.sleep(0.1)
waits_for_a_peer()
"""
    run = start(tmp_path, 0.5, body)
    _, said = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGALRM
    assert 'since step 4' in said
    assert 'waits_for_a_peer' in said
    assert 'The same command resumes' in said


@pytest.mark.parametrize(
    ('seconds', 'body'),
    [
        ('0.5', 'for step in range(20): dog.beat(f"step {step}"); time.sleep(0.1)'),
        ('0.5', 'dog.stop(); time.sleep(1.5)'),
        ('None', 'time.sleep(1.5)'),
    ],
    ids=['progress', 'stopped', 'off'],
)
def test_a_run_that_moves_or_is_not_watched_is_left_alone(tmp_path, seconds, body):
    run = start(tmp_path, seconds, body)
    assert run.communicate(timeout=60) == ('', '')
    assert run.returncode == 0


def test_a_paused_process_is_left_alone(tmp_path):
    body = 'print("ready", flush=True)\nfor step in range(10): dog.beat("a step"); time.sleep(0.1)'
    run = start(tmp_path, 0.6, body)
    run.stdout.readline()
    os.kill(run.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(run.pid, signal.SIGCONT)
    assert run.communicate(timeout=60)[1] == ''
    assert run.returncode == 0


def test_a_debugger_is_left_alone(tmp_path):
    """And has the whole time again when it is left: here, two thirds of it."""
    run = start(tmp_path, 0.9, 'breakpoint()\ntime.sleep(0.6)\nprint("after")')
    time.sleep(2.5)
    assert run.poll() is None
    out, err = run.communicate('continue\n', timeout=60)
    assert run.returncode == 0, err
    assert 'after' in out
