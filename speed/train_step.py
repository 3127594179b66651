# SPDX-License-Identifier: Apache-2.0
"""How fast a training step is: the bare program, the loop around it, its limits, and PyTorch.

    python speed/train_step.py [--dtypes float32,bfloat16] [--batches 64,256]
        [--accumulation 1,4] [--peer=pytorch --peer_python DIR/bin/python] [--data_dir DIR]
    python speed/train_step.py --first_step configs/digits.py

A case is a dtype, a per-device batch and a number of micro-steps. Its contestants live in processes
of their own (speed/train_step_workers.py) and take turns, --rounds times --steps optimizer
steps; the table has medians. For a CPU: --image_size 32 --batches 4 --steps 2.

`bare` is the compiled step on batches that lie on the device; `loop` is what the training loop with
its log, metrics and checkpoints makes of it; `input` is the loop fed with --data_dir's records.
`roofline` is the shortest time that the step's operations (counted by XLA, each for itself) and
bytes (of the compiled program) could take, by ceilings measured between the rounds, over the time
that it takes.

--first_step runs main.py twice in a fresh folder, and prints the seconds from its start to its
first line of metrics, with an empty compilation cache and then with the one this has left behind;
and its CPU time, which other users of the machine disturb less.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

from speed.machine import machine  # noqa: E402


class Worker:
    """A contestant in a process of its own; idle until it is asked."""

    def __init__(self, name: str, python: str, case: dict[str, Any]):
        command = [python, '-m', 'speed.train_step_workers', name, json.dumps(case)]
        # Contestants share the device, so neither may take all of its memory beforehand.
        environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        self.name, self.memory = name, 0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f'{self.name} ended with status {self.process.returncode}')
        return json.loads(line)

    def ask(self, command: str, number: int) -> Any:
        """Runs a command; its value."""
        print(command, number, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.memory = answer['memory']
        return answer['value']

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(flags: argparse.Namespace, case: dict[str, Any], peer: bool) -> dict[str, Any]:
    """Measures one case; figures per second are images over all of its devices."""
    workers = {'bare': Worker('ours', sys.executable, case)}
    ours = workers['bare']
    try:
        if peer:
            workers['peer'] = Worker(flags.peer, flags.peer_python, case)
        images = case['batch'] * case['accumulation']
        rates: dict[str, list[float]] = {}
        ceilings = []

        def take(name: str, worker: Worker, command: str, steps: int) -> None:
            seconds = worker.ask(command, steps)
            whole = steps * images * worker.facts['devices']
            rates.setdefault(name, []).append(whole / seconds)

        turns = [(name, worker, 'steps', flags.steps) for name, worker in workers.items()]
        turns.append(('loop', ours, 'loop', flags.loop_steps))
        if case['data_dir']:
            turns.append(('input', ours, 'input', flags.steps))
        for i in range(flags.rounds):
            for turn in turns if i % 2 else reversed(turns):  # None always follows the same one.
                take(*turn)
            ceilings.append(ours.ask('ceilings', flags.ceiling_size))
        if case['trace']:
            ours.ask('trace', 3)
    finally:
        for worker in workers.values():
            worker.stop()
    facts = ours.facts
    result = {name: statistics.median(values) for name, values in rates.items()}
    result |= {name: max(c[name] for c in ceilings) for name in ('tflops', 'gbytes')}
    for name, other in (('loop', 'bare'), ('bare', 'peer')):
        if other in rates:
            pairs = zip(rates[name], rates[other], strict=True)
            result[f'{name}/{other}'] = statistics.median(a / b for a, b in pairs)
    seconds = case['batch'] * facts['devices'] / result['bare']  # Of a micro-step.
    limits = {
        'arithmetic': facts['flops'] / result['tflops'] / 1e12,
        'memory': facts['bytes'] / result['gbytes'] / 1e9,
    }
    bound = max(limits, key=limits.__getitem__)
    return {
        **{name: case[name] for name in ('dtype', 'batch', 'accumulation')},
        **result,
        'roofline': limits[bound] / seconds,
        'bound': bound,
        'gflop_per_image': facts['flops'] / case['batch'] / 1e9,
        'mbytes_per_image': facts['bytes'] / case['batch'] / 1e6,
        'memory_gib': (ours.memory or facts['program_bytes']) / 2**30,
        'ready_seconds': facts['ready'],
        'rounds': rates,
        'facts': {name: worker.facts for name, worker in workers.items()},
    }


HEAD = (
    'dtype | batch × k | bare, images/s | loop/bare | input, images/s | PyTorch, images/s | ratio '
    '| GFLOP, MB per image | ceilings, TFLOP/s, GB/s | roofline | GiB'
)


def row(result: dict[str, Any]) -> str:
    """A case as a line of the table."""

    def optional(name: str, form: str) -> str:
        return format(result[name], form) if name in result else '–'

    cells = [
        result['dtype'],
        f'{result["batch"]} × {result["accumulation"]}',
        f'{result["bare"]:,.1f}',
        optional('loop/bare', '.3f'),
        optional('input', ',.1f'),
        optional('peer', ',.1f'),
        optional('bare/peer', '.2f'),
        f'{result["gflop_per_image"]:.1f}, {result["mbytes_per_image"]:.0f}',
        f'{result["tflops"]:.2f}, {result["gbytes"]:.0f}',
        f'{result["roofline"]:.0%} of {result["bound"]}',
        f'{result["memory_gib"]:.1f}',
    ]
    return f'| {" | ".join(cells)} |'


def seconds_to_first_step(config: str, arguments: list[str], folder: Path) -> tuple[float, float]:
    """Runs main.py up to its first line of metrics, then stops it; wall and CPU seconds."""
    command = [sys.executable, ROOT / 'main.py', f'--config={config}', f'--workdir={folder}']
    before = time.perf_counter()
    process = subprocess.Popen(
        [*command, '--config.log_every_steps=1', *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if '  step ' in line:
                clock = time.clock_gettime(_clock_of(process.pid))
                return time.perf_counter() - before, clock
        raise SystemExit(f'error: main.py ended with status {process.wait()} before its first step')
    finally:
        process.terminate()
        process.wait()


def _clock_of(process: int) -> int:
    """Linux's number of the clock that counts a process's CPU time (see clock_getcpuclockid)."""
    return (~process << 3) | 2


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default='configs/imagenet.py')
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--span', type=int, default=64, help='of BatchNorm; at most the batch')
    parser.add_argument('--dtypes', default='float32,bfloat16,float16')
    parser.add_argument('--batches', default='64,128,256,512', help='per device')
    parser.add_argument('--accumulation', default='1', help='micro-steps, such as 1,4')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=20, help='optimizer steps a round')
    parser.add_argument('--loop_steps', type=int, help='the same for the loop (default: --steps)')
    parser.add_argument('--checkpoint_every', type=int, default=300)
    parser.add_argument('--log_every', type=int, default=10)
    parser.add_argument('--ceiling_size', type=int, default=8192, help='side of the matrices')
    parser.add_argument('--deterministic', action='store_true', help='as main.py runs by default')
    parser.add_argument('--data_dir', help='prepared records of the configuration, for `input`')
    parser.add_argument('--peer', choices=['pytorch'])
    parser.add_argument('--peer_python', default=sys.executable, help='a Python that has it')
    parser.add_argument(
        '--peer_compile', default='default', help='mode of torch.compile, or none: not compiled'
    )
    parser.add_argument('--cache', help='folder of compiled programs (default: an empty one)')
    parser.add_argument('--trace', help='folder for traces of three steps of every case')
    parser.add_argument('--json', type=Path, help='where to append the results')
    parser.add_argument('--first_step', metavar='CONFIG')
    flags, flags.rest = parser.parse_known_args()
    if flags.rest and not flags.first_step:
        parser.error(f'unknown arguments {" ".join(flags.rest)}')
    flags.loop_steps = flags.loop_steps or flags.steps
    return flags


def main() -> None:
    """Measures what the flags ask for, and prints it case by case."""
    flags = parse_flags()
    if flags.first_step:
        with tempfile.TemporaryDirectory() as folder:
            for state in ('empty', 'filled'):
                path = Path(folder) / state  # The cache lies beside them.
                wall, cpu = seconds_to_first_step(flags.first_step, flags.rest, path)
                print(f'compilation cache {state}: first step after {wall:.1f} s', end='')
                print(f' ({cpu:.1f} s of CPU time)', flush=True)
        print(f'{flags.first_step}; {machine()}')
        return
    case = {
        name: getattr(flags, name)
        for name in ('config', 'model', 'image_size', 'classes', 'span', 'checkpoint_every')
    } | {
        name: getattr(flags, name)
        for name in ('log_every', 'data_dir', 'deterministic', 'peer_compile', 'cache', 'trace')
    }
    axes = [flags.dtypes, flags.batches, flags.accumulation]
    print(f'{flags.model} at {flags.image_size}; {machine()}\n')
    print(f'| {HEAD} |\n|{"---|" * len(HEAD.split(" | "))}', flush=True)
    failed = 0
    for dtype, batch, k in itertools.product(*(axis.split(',') for axis in axes)):
        this = case | {'dtype': dtype, 'batch': int(batch), 'accumulation': int(k)}
        try:
            result = measure(flags, this, peer=flags.peer is not None)
        except RuntimeError as error:  # Out of memory, perhaps; the others may fit.
            print(f'| {dtype} | {batch} × {k} | {error} |', flush=True)
            failed += 1
            continue
        print(row(result), flush=True)
        if flags.json:
            with flags.json.open('a') as file:
                file.write(json.dumps(result) + '\n')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
