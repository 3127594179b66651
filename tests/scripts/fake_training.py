# SPDX-License-Identifier: Apache-2.0
"""A training program for run_seeds.py to run in its tests: it writes a run's files at once.

    fake_training.py --workdir=DIR --config=… [--config.NAME=VALUE …]
    fake_training.py seeds ARGUMENT…    run_seeds.py, with this program in the place of main.py

The file BEHAVIOUR beside DIR says what else the run of a name does: 'miss' its target, 'fail', be
'rejected', or 'wait' until it is told to save.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from scripts import run_seeds
from settings import errors, loading
from tests.synthetic_runs import curve, plan_of, resolve, write_run


def rejected(text):
    """Says why; the exit status."""
    print(f'error: {text}', file=sys.stderr)
    return errors.REJECTED


def save(*_):
    """The handler of SIGTERM; a second one ends the program before it has saved.

    Within a moment it is the first one again, as for training/stop_request.py.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1)
    print('saved', flush=True)
    sys.exit(errors.INTERRUPTED)


def train(arguments):
    """Does as BEHAVIOUR says; the exit status."""
    own, overrides = loading.split(arguments)
    workdir = Path(next(x for x in own if x.startswith('--workdir=')).partition('=')[2])
    behaviour = json.loads((workdir.parent / 'BEHAVIOUR').read_text()).get(workdir.name)
    if (workdir / 'config.json').exists():
        return rejected('a line is damaged')
    if behaviour == 'wait':
        signal.signal(signal.SIGTERM, save)
        print('running', flush=True)
        time.sleep(60)
    if behaviour == 'fail':
        return errors.FAILED
    if behaviour == 'rejected':
        return rejected('the data set is missing')
    config = resolve('digits', None, **overrides)
    missed = [0.5] * len(plan_of(config).evaluations)
    results = missed if behaviour == 'miss' else curve(config, 5)
    write_run(workdir, config, results, seed=int.from_bytes(os.urandom(7)))
    return errors.MISSED if behaviour == 'miss' else errors.REACHED


if __name__ == '__main__':
    if sys.argv[1] == 'seeds':
        # The signals of a terminal, also where the tests run under nohup.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.exit(run_seeds.main(sys.argv[2:], program=Path(__file__)))
    sys.exit(train(sys.argv[1:]))
