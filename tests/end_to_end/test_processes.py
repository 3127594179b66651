# SPDX-License-Identifier: Apache-2.0
"""What is computed does not depend on processes, devices and accumulation: real processes."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.end_to_end.conftest import THREE_EPOCHS
from tests.end_to_end.program import ROOT, Program

pytestmark = pytest.mark.slow

# ‖a - b‖ / ‖a‖ over all weights, and over all running statistics, after 30 steps. It is rounding
# (1e-7) and, above that, ReLUs whose input is 1e-7 in one run and -1e-7 in the other.
TOLERANCE = 1e-5
LAUNCH = ROOT / 'scripts' / 'launch.py'
DIGESTS = ROOT / 'tests' / 'end_to_end' / 'batch_digests.py'


def norm(tree):
    leaves = jax.tree.leaves(tree)
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))


def assert_agree(ours, theirs):
    """Weights and running statistics of two checkpoints."""
    for name in ('params', 'batch_stats'):
        a, b = ours['variables'][name], theirs['variables'][name]
        assert norm(jax.tree.map(np.subtract, a, b)) <= TOLERANCE * norm(a), name


def test_thirty_steps_of_two_processes_are_those_of_one(program, undisturbed):
    """More ways to split a batch: experiments/topologies.py, tests/test_train_lib.py."""
    run = program(**THREE_EPOCHS, per_device_batch=32)
    assert run.run(cpus=2) == 1, run.said()
    assert_agree(undisturbed.checkpoint(30), run.checkpoint(30))
    assert run.accuracies() == undisturbed.accuracies()
    assert len(run.events('run_stop')) == 1


def test_processes_are_given_the_bytes_of_the_whole_batch(digits_dir, tmp_path):
    """Each its share, and together neither more nor less."""
    given = []
    for processes in (1, 2):
        done = subprocess.run(
            [sys.executable, LAUNCH, f'--cpus={processes}', '--', DIGESTS, digits_dir, '3'],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        lines = [line.partition('] ')[2] for line in done.stdout.splitlines()]
        given.append(sorted(line for line in lines if line.startswith('example ')))
    assert len(given[0]) == 3 * 128
    assert given[0] == given[1]


def test_a_run_moves_between_topologies(program, undisturbed):
    """Stopped on one process with eight devices, then on two processes, ends on one device."""
    run = program('elastic', **THREE_EPOCHS)
    for how, epoch in (({'devices': 8}, 1), ({'cpus': 2}, 2)):
        run.start(**how)
        run.until_said(f'epoch      {epoch} ')
        run.process.terminate()
        assert run.wait() == 75, run.said()
    run.run(more=['--config.per_device_batch=16'])
    assert_agree(undisturbed.checkpoint(), run.checkpoint())
    assert run.accuracies() == undisturbed.accuracies()
    assert len(run.events('run_start')) == len(run.events('run_stop')) == 1


def test_a_second_start_uses_what_the_first_compiled(digits_dir, tmp_path):
    run = Program(tmp_path / 'run', digits_dir, **(THREE_EPOCHS | {'max_epochs': 1}))
    cache = tmp_path / 'compilation_cache'
    used = []
    for _ in range(2):
        shutil.rmtree(run.workdir, ignore_errors=True)
        assert run.run() == 1, run.said()
        # JAX notes the time of every use of a program, if the cache is bounded. That of evaluation
        # may compile too fast to be worth keeping.
        used.append({p.name: p.read_bytes() for p in cache.glob('*train_step*-atime')})
    ((name, before),) = used[0].items()
    assert used[1].keys() == {name}
    assert used[1][name] != before
