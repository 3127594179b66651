# SPDX-License-Identifier: Apache-2.0
"""Kills a run again and again, and compares how it ends with one that was left alone.

    kills.py [--config=digits] [--kills=20] [--seed=5] [--topologies] [--data_dir=DIR] [--out=DIR]

Trains the digits, or the speeches, to their target twice: undisturbed on one device, and killed by
SIGKILL in steps, saves, starts and evaluations in turn, at random moments of them, so often or
until it has ended. With --topologies every start is on a random number of devices or processes, of
which a random one is killed. Prints a row for every kill, then what the two runs have in common:
the fingerprint, the evaluations, one log that is accepted. The tests have five kills; run this
where saving, resuming or ending has changed, with several seeds. Exit status: 0 the runs ended
alike, 1 they did not.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.topologies import MICRO_BATCHES, TOPOLOGIES, fingerprint
from scripts import judge_run
from tests.end_to_end import moments
from tests.end_to_end.program import Program


def kill(
    run: Program, name: str, moment: moments.Moment, rng: random.Random, more: list[str]
) -> str:
    """Starts a run and kills it at a moment; a row for the table, empty if it has ended before."""
    how: Mapping[str, Any] = TOPOLOGIES[name]
    run.start(**how, more=more)
    moment(run, rng)
    if not run.is_running():
        return ''
    victims = run.children() if 'cpus' in how else [run.process.pid]
    os.kill(rng.choice(victims), signal.SIGKILL)
    run.wait()
    return f'| {moment.__name__} | {name} | {max(run.steps(), default=0)} |'


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', choices=tuple(MICRO_BATCHES), default='digits')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=5, help='of moments, topologies and victims')
    parser.add_argument('--topologies', action='store_true')
    parser.add_argument('--data_dir', type=Path, default=Path('data'))
    parser.add_argument('--out', type=Path, default=Path('runs/kills'), help='is replaced')
    flags = parser.parse_args()
    out, data_dir = flags.out.resolve(), flags.data_dir.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    more = [f'--config=configs/{flags.config}.py']
    config = {'checkpoint_every_steps': 5, 'log_every_steps': 2, 'seed': 20261123}
    config |= MICRO_BATCHES[flags.config]
    undisturbed = Program(out / 'undisturbed', data_dir, **config)
    run = Program(out / 'killed', data_dir, **config)
    expected = undisturbed.run(more=more)
    if expected not in (0, 1):
        raise SystemExit(undisturbed.said())
    rng = random.Random(flags.seed)
    print('| killed | on | last checkpoint |\n|---|---|---|')
    for moment in itertools.islice(itertools.cycle(moments.ALL), flags.kills):
        topology = rng.choice([*TOPOLOGIES]) if flags.topologies else '1 device'
        row = kill(run, topology, moment, rng, more)
        if not row:
            break
        print(row, flush=True)
    status = run.run(more=more)

    ours, theirs = fingerprint(undisturbed), fingerprint(run)
    findings = {
        f'fingerprint {ours} undisturbed, {theirs} killed': ours == theirs,
        'same evaluations': run.accuracies() == undisturbed.accuracies(),
        'a log that is accepted': judge_run.main([str(run.workdir)]) == 0,
        'one end': len(run.events('run_stop')) == 1,
        f'exit status {status}': status == expected,
        'nothing left behind': not run.leftovers(),
    }
    for finding, holds in findings.items():
        print(f'{"ok" if holds else "NOT OK":6} {finding}')
    return 0 if all(findings.values()) else 1


if __name__ == '__main__':
    sys.exit(main())
