# SPDX-License-Identifier: Apache-2.0
"""Trains the same run on many topologies, and compares what each has learnt.

    topologies.py [--devices_up_to=8] [--data_dir=DIR] [--out=DIR]

Trains three epochs of the digits at a gentle rate, as processes of their own, with the batch of 128
split in every way over processes, devices and micro-steps; and once moved from eight devices to
two processes to one device on the way. Prints a row for each: how far weights, running statistics
and optimizer state are from those of one device, ‖a - b‖ / ‖a‖, whether all evaluations are the
same, and the first digits of the SHA-256 of all. The tests have one case for each mechanism; run
this where the step, the sharding or the optimizer has changed. Exit status: 0 all agree within
1e-5, 1 one does not.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import harness
from tests.end_to_end.conftest import THREE_EPOCHS
from tests.end_to_end.program import Program

BATCH, SPAN = 128, 16
TOLERANCE = 1e-5


def ways(most: int) -> list[tuple[int, int, int]]:
    """(processes, devices of all, examples per device), one device and micro-step first."""
    powers = [2**i for i in range(most.bit_length())]
    splits = [(1, devices) for devices in powers] + [(n, n) for n in powers[1:]]
    return [
        (processes, devices, BATCH // devices // k)
        for processes, devices in splits
        for k in (1, 2, 4, 8)
        if BATCH // devices // k >= SPAN
    ]


def started_as(processes: int, devices: int) -> dict[str, int]:
    """How `Program` starts it."""
    return {'cpus': processes} if processes > 1 else {'devices': devices}


def digest(tree: Any) -> str:
    """Of all arrays' names and bits."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        whole.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return whole.hexdigest()[:16]


def moved(run: Program) -> None:
    """Stops it on eight devices, then on two processes; ends it on one device."""
    for how, epoch in ((started_as(1, 8), 1), (started_as(2, 2), 2)):
        run.start(**how)
        run.until_said(f'epoch      {epoch} ')
        run.process.terminate()
        run.wait()
    run.run()


def main() -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--devices_up_to', type=int, default=8)
    parser.add_argument('--data_dir', type=Path, default=Path('data'))
    parser.add_argument('--out', type=Path, default=Path('runs/topologies'), help='is replaced')
    flags = parser.parse_args()
    out, data_dir = flags.out.resolve(), flags.data_dir.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    runs = []
    for processes, devices, examples in ways(flags.devices_up_to):
        k = BATCH // devices // examples
        name = f'{processes} processes, {devices} devices, {k} micro-steps'
        fields = THREE_EPOCHS | {'per_device_batch': examples}
        run = Program(out / name.replace(', ', '-').replace(' ', '-'), data_dir, **fields)
        run.run(**started_as(processes, devices))
        runs.append((name, run))
    runs.append(('moved', Program(out / 'moved', data_dir, **THREE_EPOCHS)))
    moved(runs[-1][1])

    first, agree = runs[0][1], True
    print('| topology | apart | evaluations | SHA-256 |\n|---|---|---|---|')
    for name, run in runs:
        tree, same = run.checkpoint(), run.accuracies() == first.accuracies()
        apart = harness.distance(first.checkpoint(), tree)
        agree &= same and apart <= TOLERANCE
        print(f'| {name} | {apart:.1e} | {"the same" if same else "OTHERS"} | {digest(tree)} |')
    return 0 if agree else 1


if __name__ == '__main__':
    sys.exit(main())
