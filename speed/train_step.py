# SPDX-License-Identifier: Apache-2.0
"""How fast a training step is: the bare program, the loop around it, its limits, and PyTorch.

    python speed/train_step.py [--dtypes float32,bfloat16] [--batches 64,256]
        [--accumulation 1,4] [--peer_python DIR/bin/python] [--data_dir DIR]

A case is a dtype, a per-device batch and a number of micro-steps. Its contestants live in processes
of their own (speed/train_step_ours.py, speed/train_step_pytorch.py) and take turns, --rounds times
--steps optimizer steps; the table has medians. For a CPU: --image_size 32 --batches 4 --steps 2.

`bare` is the compiled step on a batch that lies on the device, `plain` the same with averages in
floating point instead of exact sums; `loop` is what the training loop
with its log, metrics and checkpoints makes of it; `input` is the loop fed with --data_dir's
records. `roofline` is the shortest time that the step's operations (counted by XLA, each for
itself) and bytes (of the compiled program) could take, by ceilings measured between the rounds,
over the time that it takes.
"""

import argparse
import itertools
import json
import statistics
import sys
from typing import Any

from speed.contestants import Contestant, machine

# Contestants share the device, so none may take all of its memory beforehand.
ENVIRONMENT = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measures one case; figures per second are images over all of its devices.

    Args:
      case: the flags, with one dtype, batch and accumulation.

    Raises:
      RuntimeError: a contestant has ended.
    """
    text, ceilings = json.dumps(case), []
    contestants = {}
    try:
        ours = contestants['bare'] = Contestant('speed.train_step_ours', text, **ENVIRONMENT)
        if peer := case['peer_python']:
            contestants['peer'] = Contestant(
                'speed.train_step_pytorch', text, python=peer, **ENVIRONMENT
            )
        facts = {name: each.facts for name, each in contestants.items()}
        turns = [(name, each, 'steps', case['steps']) for name, each in contestants.items()]
        turns.append(('loop', ours, 'loop', case['loop_steps'] or case['steps']))
        if case['plain']:
            turns.append(('plain', ours, 'plain', case['steps']))
        if case['data_dir']:
            turns.append(('input', ours, 'input', case['steps']))
        rates: dict[str, list[float]] = {name: [] for name, *_ in turns}
        for i in range(case['rounds']):
            # None always follows the same one.
            for name, each, command, steps in turns if i % 2 else reversed(turns):
                images = steps * case['batch'] * case['accumulation'] * each.facts['devices']
                rates[name].append(images / each.ask(command, steps))
            ceilings.append(ours.ask('ceilings', case['ceiling_size']))
        if case['trace']:
            ours.ask('trace', 3)
        memory, costs = ours.ask('memory'), ours.ask('costs')
    finally:
        for each in contestants.values():
            each.stop()
    best = {name: max(c[name] for c in ceilings) for name in ('tflops', 'gbytes')}
    return {
        **{name: case[name] for name in ('dtype', 'batch', 'accumulation')},
        **summary(case['batch'], facts['bare'] | costs, rates, best),
        'memory_gib': (memory or facts['bare']['program_bytes']) / 2**30,
        'ready_seconds': facts['bare']['ready'],
        'rounds': rates,
        'facts': facts,
    }


def summary(
    batch: int,
    facts: dict[str, Any],
    rates: dict[str, list[float]],
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """Medians over the rounds, the ratios of pairs in them, and the roofline.

    Args:
      batch: per device.
      facts: of this repository's step.
      rates: images per second in every round.
      ceilings: TFLOP/s and GB/s.
    """
    result: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    for name, other in (('loop', 'bare'), ('bare', 'plain'), ('bare', 'peer')):
        if other in rates:
            pairs = zip(rates[name], rates[other], strict=True)
            result[f'{name}/{other}'] = statistics.median(a / b for a, b in pairs)
    limits = {  # Seconds of a micro-step.
        'arithmetic': facts['flops'] / ceilings['tflops'] / 1e12,
        'memory': facts['bytes'] / ceilings['gbytes'] / 1e9,
    }
    bound = max(limits, key=limits.__getitem__)
    return {
        **result,
        **ceilings,
        'roofline': limits[bound] * result['bare'] / batch / facts['devices'],
        'bound': bound,
        'gflop_per_image': facts['flops'] / batch / 1e9,
        'mbytes_per_image': facts['bytes'] / batch / 1e6,
    }


HEAD = (
    'dtype | batch × k | bare, images/s | loop/bare | bare/plain | input, images/s '
    '| PyTorch, images/s | ratio | GFLOP, MB per image | ceilings, TFLOP/s, GB/s | roofline | GiB'
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
        optional('bare/plain', '.3f'),
        optional('input', ',.1f'),
        optional('peer', ',.1f'),
        optional('bare/peer', '.2f'),
        f'{result["gflop_per_image"]:.1f}, {result["mbytes_per_image"]:.0f}',
        f'{result["tflops"]:.2f}, {result["gbytes"]:.0f}',
        f'{result["roofline"]:.0%} of {result["bound"]}',
        f'{result["memory_gib"]:.1f}',
    ]
    return f'| {" | ".join(cells)} |'


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
    parser.add_argument(
        '--plain', action='store_true', help='the same step with sums in floating point, too'
    )
    parser.add_argument(
        '--any_order', action='store_true', help='without the field deterministic, a default'
    )
    parser.add_argument('--data_dir', help='prepared records of the configuration, for `input`')
    parser.add_argument('--peer_python', help='a Python with PyTorch, to compare with')
    parser.add_argument(
        '--peer_compile', default='default', help='mode of torch.compile, or none: not compiled'
    )
    parser.add_argument(
        '--peer_layout',
        choices=['channels_last', 'contiguous_format'],
        default='channels_last',
        help='of its images and weights',
    )
    parser.add_argument('--cache', help='folder of compiled programs (default: none are kept)')
    parser.add_argument('--trace', help='folder for traces of three steps of every case')
    parser.add_argument('--json', help='where to append the results')
    return parser.parse_args()


def main() -> int:
    """Measures case by case, and prints the table; the exit status."""
    flags = parse_flags()
    print(f'{flags.model} at {flags.image_size}; {machine()}\n')
    print(f'| {HEAD} |\n|{"---|" * len(HEAD.split(" | "))}', flush=True)
    axes = (flags.dtypes, flags.batches, flags.accumulation)
    failed = False
    for dtype, batch, k in itertools.product(*(axis.split(',') for axis in axes)):
        case = vars(flags) | {'dtype': dtype, 'batch': int(batch), 'accumulation': int(k)}
        try:
            result = measure(case)
        except RuntimeError as error:  # Out of memory, perhaps; the others may fit.
            print(f'| {dtype} | {batch} × {k} | {error} |', flush=True)
            failed = True
            continue
        print(row(result), flush=True)
        if flags.json:
            with open(flags.json, 'a') as file:
                file.write(json.dumps(result) + '\n')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
