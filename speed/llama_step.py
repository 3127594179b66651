# SPDX-License-Identifier: Apache-2.0
"""How fast a training step of Llama is, beside PyTorch: tokens a second, and the part of the peak.

    python speed/llama_step.py [--model llama_bytes] [--length 128] [--batch 4] [--accumulation 4]
        [--dtype float32] [--peer_python DIR/bin/python] [--peak_tflops 989]

Contestants live in processes of their own and take turns. `like` is PyTorch with our micro-batch
and with recomputation; `best` keeps all activations and takes the batch at once. Operations are
those of `Architecture.operations`.
"""

import argparse
import json
import statistics
from typing import Any

from models.llama.architectures import ARCHITECTURES
from speed.contestants import Contestant, machine

ENVIRONMENT = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}  # Contestants share the device.


def measure(case: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens a second of every contestant, by round.

    Raises:
      RuntimeError: a contestant has ended.
    """
    contestants = {'ours': Contestant('speed.llama_step_ours', json.dumps(case), **ENVIRONMENT)}
    whole = case['batch'] * case['accumulation']
    if python := case['peer_python']:
        ways = {
            'like': {'peer_batch': case['batch'], 'recompute': True},
            'best': {'peer_batch': whole, 'recompute': False},
        }
        for name, way in ways.items():
            text = json.dumps(case | way)
            contestants[name] = Contestant(
                'speed.llama_step_pytorch', text, python=python, **ENVIRONMENT
            )
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    try:
        for each in contestants.values():
            _ = each.facts  # When all are ready, none disturbs another.
        for i in range(case['rounds']):
            for name, each in contestants.items() if i % 2 else reversed(contestants.items()):
                tokens = case['steps'] * whole * case['length'] * each.facts['devices']
                rates[name].append(tokens / each.ask('steps', case['steps']))
        for name, each in contestants.items():
            print(f'{name}: {each.facts}, {each.ask("memory") / 2**30:.1f} GiB')
    finally:
        for each in contestants.values():
            each.stop()
    return rates


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', choices=tuple(ARCHITECTURES), default='llama_bytes')
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--batch', type=int, default=4, help='sequences of a micro-batch')
    parser.add_argument('--accumulation', type=int, default=4)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='optimizer steps a round')
    parser.add_argument('--peer_python', help='a Python with PyTorch and transformers')
    parser.add_argument('--peer_compile', default='none', help='mode of torch.compile, or none')
    parser.add_argument('--peak_tflops', type=float, help='of the device, for its used part')
    flags = parser.parse_args()
    rates = measure(vars(flags))
    print(f'\n{flags.model}, {flags.length} tokens, {flags.dtype}; {machine()}\n')
    print('| | tokens/s | lowest … highest | ours is | of the peak |\n|---|---|---|---|---|')
    for name, of_rounds in rates.items():
        middle = statistics.median(of_rounds)
        ratio = statistics.median(a / b for a, b in zip(rates['ours'], of_rounds, strict=True))
        work = ARCHITECTURES[flags.model].operations(flags.length) * middle / 1e12
        used = f'{work / flags.peak_tflops:.1%}' if flags.peak_tflops else '–'
        spread = f'{min(of_rounds):,.0f} … {max(of_rounds):,.0f}'
        print(f'| {name} | {middle:,.0f} | {spread} | {ratio:.2f}× | {used} |')


if __name__ == '__main__':
    main()
