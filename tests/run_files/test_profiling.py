# SPDX-License-Identifier: Apache-2.0
"""Which steps are traced, and that ending a trace hides no error; JAX's profiler is replaced."""

import jax
import jax.numpy as jnp
import pytest

from run_files.profiling import Trace


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """Calls a trace as the loop does, for blocks of steps; the steps that were traced."""
    running: list[bool] = []

    def start(folder):
        folder.mkdir(exist_ok=True)
        running.append(True)

    monkeypatch.setattr(jax.profiler, 'start_trace', start)
    monkeypatch.setattr(jax.profiler, 'stop_trace', running.clear)

    def run(steps, *blocks):
        trace, seen = Trace(tmp_path / 'profile', steps, print), []
        for block in blocks:
            for step in block:
                trace.at(step, jnp.zeros(1))
                seen += [step] * len(running)
            trace.end(jnp.zeros(1))
            assert not running  # While the run evaluates.
        return seen

    return run


@pytest.mark.parametrize(
    ('steps', 'blocks', 'expected'),
    [
        (None, [range(4)], []),
        ((1, 3), [range(5)], [1, 2]),
        ((1, 5), [range(5), range(5, 9)], [1, 2, 3, 4]),
        ((3, 7), [range(5), range(5, 9)], [3, 4, 5, 6]),
        ((5, 7), [range(5), range(5, 9)], [5, 6]),
        ((1, 7), [range(5, 9)], [5, 6]),
    ],
)
def test_the_steps_are_traced_and_no_evaluation(traced, capsys, steps, blocks, expected):
    assert traced(steps, *blocks) == expected
    assert not capsys.readouterr().out


def test_a_run_that_resumes_after_the_steps_says_so_once(traced, capsys):
    assert traced((1, 3), range(5, 9)) == []
    assert capsys.readouterr().out.count('no trace') == 1


def test_a_trace_that_could_not_be_written_is_no_resumed_run(traced, capsys, tmp_path):
    """And one that an earlier start has left does not hide that this start traces nothing."""
    assert traced((1, 3), range(5)) == [1, 2]
    (tmp_path / 'profile').rmdir()
    assert not capsys.readouterr().out
    (tmp_path / 'profile').mkdir()
    assert traced((1, 3), range(5, 9)) == []
    assert capsys.readouterr().out.count('no trace') == 1


def test_the_end_of_a_run_that_failed_raises_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: None)
    monkeypatch.setattr(jax.profiler, 'stop_trace', full)
    state = jnp.zeros(1)
    trace = Trace(tmp_path / 'profile', (0, 2), print)
    trace.at(0, state)
    state.delete()
    trace.end(state)
    assert 'No space left' in capsys.readouterr().out
