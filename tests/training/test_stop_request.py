# SPDX-License-Identifier: Apache-2.0
"""A request to stop reaches all processes at the same step; a second one ends at once."""

import os
import signal
import time

import pytest

from tests.training.test_processes import launched
from training import compilation
from training.stop_request import SAME_SIGNAL_SECONDS, StopRequest

SIGNALS = pytest.mark.parametrize(
    'number', [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name
)


@pytest.fixture
def stop():
    """One that listens; puts the handlers of the two signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopRequest(compilation.make_mesh())
    request.listen()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@SIGNALS
def test_a_request_is_noted_and_a_second_one_ends_at_once(monkeypatch, stop, number):
    raised = []
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    assert stop.received is None
    assert not stop.poll()
    os.kill(os.getpid(), number)
    assert stop.received == number.name
    assert stop.poll()
    os.kill(os.getpid(), number)
    assert not raised  # Too soon to be another request.
    time.sleep(1.5 * SAME_SIGNAL_SECONDS)
    os.kill(os.getpid(), number)
    assert raised == [number]
    assert signal.getsignal(number) == signal.SIG_DFL


@SIGNALS
def test_a_request_to_one_process_reaches_all_at_the_same_step(number):
    status, said = launched('stops', str(int(number)))
    assert status == 0, said
    assert '[0] learned in step 4 None' in said
    assert f'[1] learned in step 4 {number.name}' in said
