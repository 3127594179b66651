# SPDX-License-Identifier: Apache-2.0
"""Trains an epoch of the digits, and compares its fingerprint with those that are known.

    known_fingerprints.py [--record] [--data_dir=DIR]

One run for every dtype, with both optimizers among them. Whether kernels round alike depends on the
versions of JAX, the model of the processor and its caches, so a fingerprint is known for
these: experiments/fingerprints.json. On a machine that is not there yet, --record adds what was
found. Exit status: 0 all that are known agree, 1 one does not.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run_files import machine
from settings import hyperparameters, loading
from tests.end_to_end.program import Program
from workloads import by_name

TABLE = Path(__file__).parent / 'fingerprints.json'
# Not the one of configs/digits.py, so that what was found with it outlives that one's changes. It
# reaches the target earlier, and its evaluation loss rises further on the way.
RECIPE: Mapping[str, Any] = {
    'global_batch_size': 128,
    'micro_batch_size': 16,
    'bn_span': 16,
    'learning_rate': 8.0,
    'warmup_epochs': 1.0,
    'decay_steps': 212,
    'max_epochs': 20,
}
CASES: Mapping[str, Mapping[str, Any]] = {
    'float32': {'optimizer': 'lars'},
    'bfloat16': {'optimizer': 'sgd', 'learning_rate': 0.1},
    'float16': {'optimizer': 'lars'},
}


def found(dtype: str, data_dir: Path) -> dict[str, Any]:
    """What a run's rounding depends on, and the fingerprint that it ends with.

    Raises:
      RuntimeError: when the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        fields = {**RECIPE, 'seed': 20261123, 'max_epochs': 1, 'dtype': dtype, **CASES[dtype]}
        run = Program(Path(folder) / dtype, data_dir, **fields)
        if run.run(devices=8) not in (0, 1):
            raise RuntimeError(run.said())
        config = loading.read_object(run.workdir / 'config.json')
        environment = loading.read_object(run.workdir / 'environment.json')
        *_, mark = [line['fingerprint'] for line in run.evaluated()]
    decisive = hyperparameters.decisive(config, by_name.config_type(config))
    settings = environment['machine']['settings']
    return {
        'dtype': dtype,
        'configuration': hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16],
        'versions': {name: environment['versions'][name] for name in ('jax', 'jaxlib')},
        'device': environment['device_kind'],
        **described(environment['machine']),
        'settings': {n: settings.get(n) for n in ('NPROC', 'XLA_FLAGS')},
        'fingerprint': mark,
    }


def has_machine() -> bool:
    """Whether the table has a fingerprint of a machine like this one, with whatever versions."""
    ours = described(machine.describe())
    return any(ours.items() <= entry.items() for entry in json.loads(TABLE.read_text()))


def described(of: Mapping[str, Any]) -> dict[str, Any]:
    """Of a machine's description, what rounding depends on."""
    return {
        'cuda': of['cuda_packages'] if of['gpus'] else {},
        'processor': f'{of["processor"]}, {of["processor_model"]}',
        'caches': of['caches'],
    }


def known(of: Mapping[str, Any]) -> str | None:
    """The fingerprint that the table has for what another depends on."""
    rest = {name: value for name, value in of.items() if name != 'fingerprint'}
    for entry in json.loads(TABLE.read_text()):
        if {name: value for name, value in entry.items() if name != 'fingerprint'} == rest:
            return entry['fingerprint']
    return None


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--record', action='store_true')
    parser.add_argument('--data_dir', type=Path, default=Path('data'))
    flags = parser.parse_args()
    agree, new = True, []
    for dtype in CASES:
        ours = found(dtype, flags.data_dir.resolve())
        expected = known(ours)
        if expected is None:
            new.append(ours)
            print(f'{dtype}: {ours["fingerprint"]}; none is known for this machine and versions')
        else:
            agree &= ours['fingerprint'] == expected
            print(f'{dtype}: {ours["fingerprint"]}, known is {expected}')
    if flags.record and new:
        TABLE.write_text(json.dumps([*json.loads(TABLE.read_text()), *new], indent=1) + '\n')
    elif new:
        print('--record adds what is not known')
    return 0 if agree else 1


if __name__ == '__main__':
    sys.exit(main())
