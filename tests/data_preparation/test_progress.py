# SPDX-License-Identifier: Apache-2.0
"""Work in a process of its own: its errors arrive, it stops when told, and its death is noticed."""

import os
import signal
import threading
import time

import pytest

from data_preparation.progress import in_process


@pytest.fixture
def stop():
    return threading.Event()


def test_errors_of_the_process_are_raised_here(stop, tmp_path):
    assert in_process(os.mkdir, (tmp_path / 'made',), stop)
    assert (tmp_path / 'made').is_dir()
    with pytest.raises(ValueError, match="invalid literal for int.*'x'"):
        in_process(int, ('x',), stop)
    with pytest.raises(FileNotFoundError) as caught:
        in_process(os.stat, (tmp_path / 'none',), stop)
    assert str(caught.value.filename) == str(tmp_path / 'none')


def test_it_is_ended_when_told(stop):
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    assert not in_process(time.sleep, (60,), stop)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ('how', 'said'),
    [
        (
            (signal.raise_signal, (signal.SIGKILL,)),
            'status -9 .*killed, perhaps for want of memory',
        ),
        ((exec, ('1 / 0',)), 'ended with status 1 before its work was done$'),
    ],
)
def test_a_process_that_dies_is_an_error(stop, how, said):
    with pytest.raises(OSError, match=said):
        in_process(*how, stop)
