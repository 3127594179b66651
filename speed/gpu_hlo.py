# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of ResNet-50's training step on a GPU, compiled on a machine that has none.

    python speed/gpu_hlo.py [--spec h200] [--dtypes float32,bfloat16] [--batch 256]

Needs the compiler, but no driver and no device. `scripts/setup_env.sh --cuda13` has it; beside the
lock for CPUs it is

    pip install --no-deps -c requirements.txt jax-cuda12-pjrt nvidia-cuda-nvcc-cu12

The device is described by speed/gpu_specs. Which algorithm cuDNN takes is chosen on the device
alone; layouts, fusions and the memory between kernels are not. Bytes are counted in the optimised
program: every kernel reads each of its operands and writes its results once, and nothing stays in a
cache; cuDNN's scratch memory is left out. An activation is an array of at least the size of the
smallest between two convolutions (7×7×512 an image). This measures no time.
"""

import argparse
import collections
import functools
import math
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

import train_lib
from settings import backend
from speed import cases
from training import compilation

SPECS = Path(__file__).parent / 'gpu_specs'
COMPUTATION = re.compile(r'(ENTRY )?%([\w.-]+) \(.*\{$')
INSTRUCTION = re.compile(r' *(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)')
SHAPE = re.compile(r'(?:pred|[a-z]+(\d+))\[([\d,]*)\]')
# What starts no kernel, or, like a loop, only those of its body.
FREE = 'while parameter constant tuple get-tuple-element bitcast after-all partition-id copy-done'
SLICES, RESHAPES = ('slice', 'dynamic-slice', 'gather'), ('bitcast', 'reshape', 'transpose')
LAYOUTS = {'b01f': 'NHWC', 'bf01': 'NCHW'}
SMALL = 0.05  # MB an image.
COMPILERS = (('jax-cuda12-pjrt', 'nvidia-cuda-nvcc-cu12'), ('jax-cuda13-pjrt', 'nvidia-cuda-nvcc'))


class Instruction(NamedTuple):
    """A line of an optimised program; `shape` and `attributes` as they stand there."""

    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str:
        """What follows `pattern` among the attributes, or nothing."""
        found = re.search(pattern + r'([^",\s]+)', self.attributes)
        return found[1] if found else ''


def arrays(shape: str) -> Iterator[tuple[int, int]]:
    """Elements of every array in a shape, and bytes of each."""
    for bits, dimensions in SHAPE.findall(shape):
        yield math.prod(map(int, filter(None, dimensions.split(',')))), int(bits or 8) // 8


def same_dimensions(one: str, other: str) -> bool:
    """Whether two shapes are arrays that differ in nothing but what their elements are."""
    return [m[1] for m in SHAPE.findall(one)] == [m[1] for m in SHAPE.findall(other)]


def size(shape: str) -> int:
    """Bytes of a result, without the scratch memory of a library at the end of a tuple."""
    return sum(
        count * width for count, width in arrays(re.sub(r', [us]8\[\d+\]\{0\}\)$', ')', shape))
    )


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a program by name, each its instructions by name; the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = '', {}
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            name, shape, op, operands, attributes = found.groups()
            names = dict.fromkeys(re.findall(r'%([\w.-]+)', operands))
            current[name] = Instruction(shape, op, tuple(names), attributes)
    return computations, entry


def bytes_read(
    kernel: Instruction, body: dict[str, Instruction], fused: dict[str, Instruction]
) -> int:
    """Of a kernel's operands; of one that it slices, itself or after other work, the slices.

    Of one that it changes in part, nothing.
    """
    users = collections.defaultdict(list)
    for name, instruction in fused.items():
        for operand in instruction.operands:
            users[operand].append(name)

    def by(user: str, name: str, whole: int) -> int:
        """Elements of a value that one of its users needs."""
        kernel = fused[user]
        if kernel.op in SLICES and kernel.operands[0] == name:
            return next(arrays(kernel.shape))[0]
        if kernel.op == 'dynamic-update-slice' and kernel.operands[0] == name:
            return 0
        if kernel.op in RESHAPES or same_dimensions(kernel.shape, fused[name].shape):
            return needed(user)
        return whole

    @functools.cache
    def needed(name: str) -> int:
        """Elements of a value inside the kernel."""
        ((whole, _),) = arrays(fused[name].shape)
        parts = [by(user, name, whole) for user in users[name]]
        return min(whole, sum(parts)) if parts else whole

    read = sum(size(body[name].shape) for name in kernel.operands)
    for name, parameter in fused.items():
        if parameter.op == 'parameter':
            ((count, width),) = arrays(parameter.shape)
            read -= (count - needed(name)) * width
    return read


def bytes_written(kernel: Instruction, fused: dict[str, Instruction]) -> int:
    """Of a kernel's results; of one that it changes in part, that part."""
    written = size(kernel.shape)
    for part in fused.values():
        if part.op == 'dynamic-update-slice':
            written -= size(part.shape) - size(fused[part.operands[1]].shape)
    return written


def analyse(text: str, batch: int) -> dict[str, str]:
    """The table's rows for one optimised program."""
    computations, entry = parse(text)
    main = computations[entry]
    loops = [i.attribute('body=%') for i in main.values() if i.op == 'while']

    def is_activation(shape: str) -> bool:
        return any(count >= batch * 7 * 7 * 512 for count, _ in arrays(shape))

    read, written, kernels = 0, 0, []
    convolutions, layouts, large = (collections.Counter[str]() for _ in range(3))
    for body in (main, *(computations[name] for name in loops)):
        for kernel in (i for i in body.values() if i.op not in FREE.split()):
            fused = computations.get(kernel.attribute('calls=%'), {})
            into = bytes_read(kernel, body, fused)
            out = bytes_written(kernel, fused)
            read, written = read + into, written + out
            kernels.append((into + out) / batch / 1e6)
            target = kernel.attribute('custom_call_target="')
            if target.startswith('__cudnn$conv'):
                convolutions[target.removeprefix('__cudnn$')] += 1
                layouts[LAYOUTS[kernel.attribute('dim_labels=')[:4]]] += 1
            for part in fused.values() if fused else [kernel]:
                # Of a reduction the operand is large, of all else the result.
                reduced = part.op == 'reduce' and (fused or body)[part.operands[0]]
                large[part.op] += is_activation((reduced or part).shape)
    return {
        'MB/image moved': f'{sum(kernels):.1f}',
        'of these read, written': f'{read / batch / 1e6:.1f}, {written / batch / 1e6:.1f}',
        'convolutions': ', '.join(
            f'{count} {kind}' for kind, count in sorted(convolutions.items())
        ),
        'their layouts': ', '.join(f'{count} {name}' for name, count in layouts.items()),
        **{f'{op} of activations': str(large[op]) for op in ('transpose', 'copy', 'convert')},
        'reductions over activations': str(large['reduce']),
        'kernels': str(len(kernels)),
        f'of these below {SMALL} MB/image': str(sum(moved < SMALL for moved in kernels)),
    }


def _is_installed(wheel: str) -> bool:
    return bool(list(metadata.distributions(name=wheel)))


def prepare() -> None:
    """Makes JAX ready to compile without a device; ends the program where it cannot."""
    if not any(all(map(_is_installed, wheels)) for wheels in COMPILERS):
        ways = ', nor '.join(' with '.join(wheels) for wheels in COMPILERS)
        sys.exit(f'not installed: {ways}; see the top of speed/gpu_hlo.py')
    jax.config.update('jax_platforms', 'cpu')
    # Candidates cannot be tried, and products by Triton must be.
    untried = ('--xla_gpu_autotune_level=0', '--xla_gpu_enable_triton_gemm=false')
    backend.configure(*backend.DETERMINISTIC_GPU_FLAGS, *untried)


def mesh_of(spec: str, devices: int = 1) -> Mesh:
    """A mesh of devices that are not there; `spec`: the name of a file of gpu_specs."""
    topology = topologies.get_topology_desc(
        platform='cuda',
        target_config=(SPECS / f'{spec}.txtpb').read_text(),
        topology=f'1x1x{devices}',
    )
    return Mesh(np.array(topology.devices), (train_lib.AXIS,))


def compile_step(spec: str, dtype: str, batch: int) -> jax.stages.Compiled:
    """The training step of configs/imagenet.py, `batch` images on one device."""
    _, plan, _, model = cases.prepare(
        'configs/imagenet.py', 1, dtype=dtype, global_batch_size=batch, micro_batch_size=batch
    )
    return compilation.trace_train(model, plan.micro_batch_size, mesh_of(spec)).lower().compile()


def main() -> None:
    """Prints the table, a column a dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--spec', choices=sorted(f.stem for f in SPECS.iterdir()), default='h200')
    parser.add_argument('--dtypes', default='float32,bfloat16')
    parser.add_argument('--batch', type=int, default=256, help='a multiple of bn_span (64)')
    flags = parser.parse_args()
    prepare()
    columns = {}
    for dtype in flags.dtypes.split(','):
        compiled = compile_step(flags.spec, dtype, flags.batch)
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text
        assert memory
        columns[dtype] = analyse(text, flags.batch) | {
            'temporary memory, GB': f'{memory.temp_size_in_bytes / 1e9:.2f}'
        }
    print(f'| {flags.spec}, batch {flags.batch} |', ' | '.join(columns), '|')
    print('|---' * (1 + len(columns)) + '|')
    for row in next(iter(columns.values())):
        print(f'| {row} |', ' | '.join(column[row] for column in columns.values()), '|')


if __name__ == '__main__':
    main()
