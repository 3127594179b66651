# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that run the program."""

import re
import shutil

import pytest

from tests.end_to_end.program import Program, share_programs

# Small steps, so that differences of rounding stay what they are: at the recipe's own rate training
# amplifies them, as training does, from 1e-7 to 1 within ten steps.
GENTLE = {'optimizer': 'sgd', 'learning_rate': 0.002, 'warmup_epochs': 1, 'target_top1': 0.995}


@pytest.fixture(scope='session')
def runs_dir(tmp_path_factory):
    """Work directories beside each other."""
    return share_programs(tmp_path_factory.mktemp('runs'))


@pytest.fixture
def program(runs_dir, digits_dir, request):
    """Makes programs by name, which must leave no process and no temporary file behind."""
    made = []

    def make(name=None, **config):
        workdir = runs_dir / (name or re.sub(r'\W+', '-', request.node.name))
        made.append(Program(workdir, digits_dir, **config))
        return made[-1]

    yield make
    for each in made:
        each.end()
    leftovers = [found for each in made for found in each.leftovers()]
    for each in made:
        shutil.rmtree(each.workdir, ignore_errors=True)
    assert not leftovers


@pytest.fixture(scope='session')
def undisturbed(runs_dir, digits_dir):
    """Three epochs, 34 steps, at a gentle rate in one process; checkpoints 30 and 34 stay."""
    run = Program(runs_dir / 'undisturbed', digits_dir, **THREE_EPOCHS)
    assert run.run() == 1, run.said()
    return run


THREE_EPOCHS = GENTLE | {
    'global_batch_size': 128,
    'micro_batch_size': 16,
    'bn_span': 16,
    'max_epochs': 3,
    'checkpoint_every_steps': 15,
    'log_every_steps': 5,
}


@pytest.fixture(scope='session')
def reached(runs_dir, digits_dir):
    """A run to a target that it meets after some four epochs."""
    run = Program(runs_dir / 'reached', digits_dir, **EASY)
    assert run.run() == 0, run.said()
    return run


EASY = {'target_top1': 0.45, 'checkpoint_every_steps': 10}
