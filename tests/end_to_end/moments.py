# SPDX-License-Identifier: Apache-2.0
"""Moments at which to kill a run: each function returns when one has come, or the run has ended."""

import random
import time
from typing import Protocol

from tests.end_to_end.program import Program


class Moment(Protocol):
    """Waits for its moment."""

    __name__: str

    def __call__(self, run: Program, rng: random.Random) -> None: ...


def in_the_start(run: Program, rng: random.Random) -> None:
    """Within its first five seconds."""
    time.sleep(rng.uniform(0, 5))


def in_a_step(run: Program, rng: random.Random) -> None:
    """Within a step or two of the next progress line."""
    seen = len(run.said())
    run.until(lambda: 'step ' in run.said()[seen:])
    time.sleep(rng.uniform(0, 0.3))


def in_a_save(run: Program, rng: random.Random) -> None:
    """While a checkpoint is written, or just after."""
    checkpoints = run.workdir / 'checkpoints'
    run.until(lambda: any('tmp' in path.name for path in checkpoints.glob('*')))
    time.sleep(rng.uniform(0, 0.05))


def in_an_evaluation(run: Program, rng: random.Random) -> None:
    """Within the next evaluation, or just after."""
    before = len(run.events('eval_start'))
    run.until(lambda: len(run.events('eval_start')) > before)
    time.sleep(rng.uniform(0, 0.02))


ALL: tuple[Moment, ...] = (in_a_step, in_a_save, in_the_start, in_an_evaluation)
