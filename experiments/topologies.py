# SPDX-License-Identifier: Apache-2.0
"""Trains the same run on many topologies: all must end with the same bits.

    topologies.py [--data_dir=DIR] [--out=DIR] [PART ...]      (default: all parts)

digits, speeches: trains them to their target, by main.py, on 1 to 8 devices of a process, in
several processes, on one core, and moved from one topology to the next on the way. bottlenecks: ten
steps of a bottleneck network with a large stem and max-pooling, at 64×64, with every optimizer and
dtype on 1, 2, 4 and 8 devices. llamas: four steps of two Llamas, likewise. Prints a row for each,
with the fingerprint of what it ended with. The tests have one case of each mechanism; run this
where the step, the sums or the optimizers have changed. Exit status: 0 all agree, 1 one does not.
"""

import argparse
import itertools
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import fingerprints
import train_lib
from models.llama.architectures import Architecture
from settings import backend
from settings.errors import REACHED
from tests import harness
from tests.end_to_end.program import Program
from tests.workloads.llama31_8b import test_task

ONE_CORE = ('taskset', '-c', str(min(os.sched_getaffinity(0))))
TOPOLOGIES: Mapping[str, Mapping[str, Any]] = {
    '1 device': {'devices': 1},
    '2 devices': {'devices': 2},
    '4 devices': {'devices': 4},
    '8 devices': {'devices': 8},
    '8 devices on one core': {'devices': 8, 'wrapper': ONE_CORE},
    '1 device on one core': {'devices': 1, 'wrapper': ONE_CORE},
    '2 processes': {'cpus': 2},
    '4 processes': {'cpus': 4},
    '2 processes × 2 devices': {'cpus': 2, 'devices': 2},
}
STEPS = 10
EVALUATED = re.compile(r'  step \d+  .*[0-9a-f]{16}$', re.MULTILINE)  # A line of the output.
MICRO_BATCHES: Mapping[str, Mapping[str, Any]] = {'digits': {}, 'speeches': {'micro_batch_size': 2}}
RECIPE = {'image_size': 64, 'global_batch_size': 32, 'micro_batch_size': 4, 'bn_span': 4}
RATES = {'lars': 8.0, 'sgd': 0.1}


def fingerprint(run: Program) -> str:
    """Of the newest checkpoint."""
    return fingerprints.shown(fingerprints.of_host_arrays(run.checkpoint()))


def moved(run: Program, more: list[str]) -> int:
    """Stops it after an evaluation on each of some topologies; its exit status on one device."""
    for name in ('8 devices', '2 processes × 2 devices', '4 processes'):
        run.start(**TOPOLOGIES[name], more=more)
        run.until(lambda: EVALUATED.search(run.said()) is not None)
        run.process.terminate()
        run.wait()
    return run.run(more=more)


def to_target(config: str, out: Path, data_dir: Path) -> bool:
    """Whether a configuration ends with the same bits on all topologies; prints the table."""
    found, more = set(), [f'--config=configs/{config}.py']
    print(f'\n| {config} | evaluations | last result | fingerprint |\n|---|---|---|---|')
    for name in (*TOPOLOGIES, 'moved'):
        fields = {'seed': 20261123, **MICRO_BATCHES[config]}
        run = Program(out / config / name.replace(' ', '-'), data_dir, **fields)
        run.workdir.parent.mkdir(exist_ok=True)
        ended = moved(run, more) if name == 'moved' else run.run(**TOPOLOGIES[name], more=more)
        assert ended == REACHED, run.said()
        results, mark = run.accuracies(), fingerprint(run)
        found.add((*results, mark))
        print(f'| {name} | {len(results)} | {results[-1]:.5f} | {mark} |', flush=True)
    return len(found) == 1


def llamas() -> bool:
    """Whether two Llamas end with the same bits; prints the table."""
    agree, devices = True, (1, 2, 4, 8)
    print(f'\n| Llama, 4 steps | fingerprints on {devices} devices |\n|---|---|')
    for size, dtype in itertools.product((64, 128), ('float32', 'bfloat16')):
        wide = Architecture(2, 512, 1024, 8, 2, size, 512)
        found = [test_task.trained(count, dtype, wide, length=512, steps=4) for count in devices]
        agree &= all(each == found[0] for each in found)
        marks = ', '.join(dict.fromkeys(mark for mark, _ in found))
        print(f'| width 512, heads of {size}, {dtype} | {marks} |', flush=True)
    return agree


def bottlenecks() -> bool:
    """Whether the bottleneck network ends with the same bits; prints the table."""
    agree, devices = True, (1, 2, 4, 8)
    print(f'\n| bottlenecks, {STEPS} steps | fingerprints on {devices} devices |\n|---|---|')
    for optimizer, dtype in itertools.product(RATES, ('float32', 'bfloat16', 'float16')):
        recipe = RECIPE | {'optimizer': optimizer, 'dtype': dtype, 'warmup_epochs': 0, 'seed': 3}
        config = harness.resolve('digits', 'unused', learning_rate=RATES[optimizer], **recipe)
        marks = []
        for count in devices:
            how = {'task_type': harness.TinyBottleneck, 'batches': enlarged}
            trained = harness.train(config, devices=count, steps=STEPS, **how)
            tree = train_lib.to_saved(trained.state)
            marks.append(fingerprints.shown(fingerprints.of_host_arrays(tree)))
        agree &= len(set(marks)) == 1
        print(f'| {optimizer}, {dtype} | {", ".join(dict.fromkeys(marks))} |', flush=True)
    return agree


def enlarged(first: int, last: int) -> dict[str, Any]:
    """Noise with structure, at 64×64, by position."""
    batch = harness.photographs(first, last)
    return batch | {'image': batch['image'].repeat(2, 1).repeat(2, 2)}


STEPS_OF = {'bottlenecks': bottlenecks, 'llamas': llamas}


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', type=Path, default=Path('data'))
    parts = (*MICRO_BATCHES, *STEPS_OF)
    parser.add_argument('parts', nargs='*', choices=(*parts, 'all'), default='all')
    parser.add_argument('--out', type=Path, default=Path('runs/topologies'), help='is replaced')
    flags = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    backend.configure('--xla_force_host_platform_device_count=8')
    out = flags.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    agree = [
        to_target(part, out, flags.data_dir.resolve())
        if part in MICRO_BATCHES
        else STEPS_OF[part]()
        for part in (parts if 'all' in flags.parts else flags.parts)
    ]
    return 0 if all(agree) else 1


if __name__ == '__main__':
    sys.exit(main())
