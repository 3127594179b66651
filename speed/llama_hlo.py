# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of Llama's training step on GPUs, compiled on a machine that has none.

    python speed/llama_hlo.py [--model llama31_8b] [--length 8192] [--batch 32]
        [--micro_batches 1,2] [CASE ...]           (default: a100:8 h200:8 h200:2 h200:1)

A case is a file of speed/gpu_specs and a number of GPUs. Needs the compiler, as speed/gpu_hlo.py
does, and counts as it does. Prints for every case and micro-batch, a GPU: the memory of its part of
the state, and of what is beside it between kernels; for an optimizer step, what is multiplied,
moved in memory and received from other GPUs, and the time that this takes at the rates of data
sheets, one after the other. The real time is longer for what runs below these rates, and shorter
for what overlaps. Attention, causal, counts as half its square: two products forward, five
backward. MFU is of the operations that `Architecture` counts. This measures no time.
"""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax

import train_lib
from models.llama.architectures import ARCHITECTURES
from settings import loading
from speed import gpu_hlo
from speed.gpu_hlo import Instruction
from training import compilation
from training.workload import model_of, plan_of
from workloads import by_name
from workloads.llama31_8b.corpora import Corpus
from workloads.llama31_8b.task import LanguageModelling
from workloads.llama31_8b.workload import WORKLOAD


class Rates(NamedTuple):
    """Of a GPU's data sheet: bfloat16 without sparsity, memory, NVLink in one direction."""

    operations: float
    memory: float
    links: float


RATES = {'a100': Rates(312e12, 2.039e12, 300e9), 'h200': Rates(989e12, 4.8e12, 450e9)}
COLLECTIVE = re.compile('(all-gather|reduce-scatter|all-reduce)(-start)?$')
COUNT = re.compile(r'known_trip_count\D+(\d+)')
CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"\]')
COLUMNS = (
    'GPUs', 'sequences at a time', 'state', 'beside it', 'operations', 'moved', 'received',
    'seconds: matrices', 'memory', 'links', 'MFU, one after the other',
)  # fmt: skip


@dataclasses.dataclass
class Work:
    """Of a device: operations of matrices, bytes of its memory, bytes from other devices."""

    operations: float = 0
    moved: float = 0
    received: float = 0


class Program:
    """An optimised program, and what it does on one of so many devices."""

    def __init__(self, text: str, devices: int, attention: float):
        """`attention`: operations of one product of attention, of a layer and a device."""
        self._computations, self._entry = gpu_hlo.parse(text)
        self._devices, self._attention = devices, attention

    def work(self) -> Work:
        """Of a run of it.

        Raises:
          ValueError: a part of it is called in a way that is not counted.
        """
        work = Work()
        self._add(work, self._entry, 1)
        return work

    def _add(self, work: Work, name: str, times: int) -> None:
        body = self._computations[name]
        ends = {i.operands[0]: i for i in body.values() if i.op.endswith('-done')}
        for key, kernel in body.items():
            if kernel.op == 'while':
                found = COUNT.search(kernel.attributes)
                assert found, kernel
                self._add(work, kernel.attribute('body=%'), times * int(found[1]))
            elif kernel.op in ('call', 'conditional'):
                # XLA inlines calls, and a micro-step has no branches: see accumulation.py.
                raise ValueError(f'the work of this {kernel.op} would be left out: {key}')
            elif found := COLLECTIVE.match(kernel.op):
                work.received += times * self._received(found[1], kernel, body)
            elif kernel.op not in gpu_hlo.FREE.split() and not kernel.op.endswith('-done'):
                fused = self._computations.get(kernel.attribute('calls=%'), {})
                work.operations += times * sum(
                    self._operations(part, fused or body)
                    for part in (fused.values() if fused else [kernel])
                )
                if key in ends:  # What has begun has its operands, too, in its shape.
                    kernel = kernel._replace(shape=ends[key].shape)
                moved = gpu_hlo.bytes_read(kernel, body, fused)
                work.moved += times * (moved + gpu_hlo.bytes_written(kernel, fused))

    def _received(self, kind: str, kernel: Instruction, body: dict[str, Instruction]) -> float:
        """By a ring: of what is gathered all but the own part; of sums, parts of all others."""
        given = sum(gpu_hlo.size(body[name].shape) for name in kernel.operands)
        rest = (self._devices - 1) / self._devices
        return given * {'all-gather': self._devices - 1, 'all-reduce': 2 * rest}.get(kind, rest)

    def _operations(self, kernel: Instruction, body: dict[str, Instruction]) -> float:
        target = kernel.attribute('custom_call_target="')
        if target.startswith('__cudnn$fmha'):
            return self._attention * (5 if 'Backward' in target else 2)
        if kernel.op == 'dot' or target.startswith('__cublas'):
            found = CONTRACTED.search(kernel.attributes)
            assert found, kernel
            shape = gpu_hlo.SHAPE.search(body[kernel.operands[0]].shape)
            assert shape, kernel
            assert shape[0].startswith('bf16'), kernel
            length = int(shape[2].split(',')[int(found[1])])
            return 2 * length * next(gpu_hlo.arrays(kernel.shape))[0]
        return 0


def row(spec: str, devices: int, sequences: int, flags: argparse.Namespace) -> list[str]:
    """Compiles a case; its line of the table."""
    fields = {
        'model': flags.model,
        'sequence_length': flags.length,
        'micro_batch_size': sequences,
        'global_batch_size': flags.batch,
        'division': 'open',
        'seed': 1,
    }
    config = by_name.configure(dict(loading.load('configs/llama31_8b.py')) | fields, {})
    nowhere = Corpus('c4', Path(), Path(), num_train=10**7, num_eval=1024, digest=None)
    plan = plan_of(WORKLOAD, config, nowhere, devices)
    model = model_of(WORKLOAD, config, plan, nowhere)
    assert isinstance(model.task, LanguageModelling)
    model = model._replace(task=dataclasses.replace(model.task, fused=True))
    mesh = gpu_hlo.mesh_of(spec, devices)
    compiled = compilation.trace_train(model, plan.micro_batch_size, mesh).lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text
    assert memory

    architecture = ARCHITECTURES[flags.model]
    square = sequences * architecture.heads * flags.length**2
    work = Program(text, devices, attention=square * architecture.head_size).work()
    steps, rates = plan.accumulation_steps, RATES[spec]
    seconds = (
        steps * work.operations / rates.operations,
        steps * work.moved / rates.memory,
        steps * work.received / rates.links,
    )
    useful = flags.batch * flags.length * architecture.operations(flags.length)
    used = useful / devices / rates.operations / sum(seconds)
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(
            compilation.placed_shapes(mesh, train_lib.abstract_state(model), model.task.split)
        )
    )
    beside = memory.argument_size_in_bytes - state + memory.temp_size_in_bytes
    beside += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return [
        f'{devices} × {spec.upper()}',
        f'{sequences}',
        f'{state / 1e9:.1f} GB',
        f'{beside / 1e9:.1f} GB',
        f'{steps * work.operations:.2e}',
        f'{steps * work.moved / 1e9:.0f} GB',
        f'{steps * work.received / 1e9:.0f} GB',
        *(f'{part:.2f}' for part in seconds),
        f'{used:.0%}',
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', choices=tuple(ARCHITECTURES), default='llama31_8b')
    parser.add_argument('--length', type=int, default=8192)
    parser.add_argument('--batch', type=int, default=32, help='sequences of an optimizer step')
    parser.add_argument('--micro_batches', default='1,2')
    parser.add_argument('cases', nargs='*', default=['a100:8', 'h200:8', 'h200:2', 'h200:1'])
    flags = parser.parse_args()
    gpu_hlo.prepare()
    print(f'JAX {jax.__version__}; {flags.model}, {flags.length} tokens, batch {flags.batch}\n')
    print('|', ' | '.join(COLUMNS), '|')
    print('|---' * len(COLUMNS) + '|', flush=True)
    for case in flags.cases:
        spec, devices = case.split(':')
        for sequences in map(int, flags.micro_batches.split(',')):
            print('|', ' | '.join(row(spec, int(devices), sequences, flags)), '|', flush=True)


if __name__ == '__main__':
    main()
