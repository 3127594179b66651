# SPDX-License-Identifier: Apache-2.0
"""What is computed does not depend on processes and devices: real processes."""

import shutil
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import EASY
from tests.end_to_end.program import ROOT, Program, run
from tests.harness import is_same

pytestmark = pytest.mark.slow

LAUNCH = ROOT / 'scripts' / 'launch.py'
DIGESTS = ROOT / 'tests' / 'end_to_end' / 'batch_digests.py'


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
    assert len(given[0]) == 3 * 256
    assert given[0] == given[1]


def test_a_run_moves_between_topologies_and_leaves_one_good_log(program, reached):
    """Stopped on one process with eight devices, then on two processes, ends on one device.

    More ways: experiments/topologies.py, tests/test_train_lib.py.
    """
    moved = program(**EASY)
    for how, epoch in (({'devices': 8}, 1), ({'cpus': 2}, 2)):
        moved.start(**how)
        moved.until_said(f'epoch      {epoch} ')
        moved.process.terminate()
        assert moved.wait() == 75, moved.said()
    judged = run('scripts/judge_run.py', moved.workdir)
    assert judged.returncode == 2
    assert 'run_stop is missing' in judged.stderr

    assert moved.run() == 0, moved.said()
    assert is_same(moved.checkpoint(), reached.checkpoint())
    assert moved.accuracies() == reached.accuracies()
    judged = run('scripts/judge_run.py', moved.workdir)
    assert judged.returncode == 0, judged.stdout
    steps = [line['step'] for line in moved.evaluated()]
    assert steps == sorted(set(steps))
    assert len(moved.events('run_start')) == len(moved.events('run_stop')) == 1


def test_a_second_start_uses_what_the_first_compiled(digits_dir, tmp_path):
    trained = Program(tmp_path / 'run', digits_dir, max_epochs=1)
    cache = tmp_path / 'compilation_cache'
    used = []
    for _ in range(2):
        shutil.rmtree(trained.workdir, ignore_errors=True)
        assert trained.run() == 1, trained.said()
        # JAX notes the time of every use of a program, if the cache is bounded. That of evaluation
        # may compile too fast to be worth keeping.
        used.append({p.name: p.read_bytes() for p in cache.glob('*train_step*-atime')})
    ((name, before),) = used[0].items()
    assert used[1].keys() == {name}
    assert used[1][name] != before
