# SPDX-License-Identifier: Apache-2.0
"""What a machine is: processor, memory, GPUs and settings, as Linux and the NVIDIA driver tell."""

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Instruction sets that XLA and NumPy choose their code by: sums may differ in the last bit.
_INSTRUCTION_SETS = ('sse4_2', 'avx', 'avx2', 'fma', 'avx_vnni', 'avx512', 'amx', 'asimd', 'sve')
# TFLOP/s that GPUs are made for, by JAX's names of them: NVIDIA's data sheets, without sparsity.
# float32 is not TF32, which no run uses; a part of a GPU has another name.
_V100 = {'float32': 15.7, 'float16': 125.0}
_A100 = {'float32': 19.5, 'float16': 312.0, 'bfloat16': 312.0}
_H100_PCIE = {'float32': 51.0, 'float16': 756.0, 'bfloat16': 756.0}
_H100 = {'float32': 67.0, 'float16': 989.0, 'bfloat16': 989.0}  # The H200 differs only in memory.
_NVL = {'float32': 60.0, 'float16': 835.0, 'bfloat16': 835.0}
_PEAKS = {
    'Tesla V100-SXM2-16GB': _V100,
    'Tesla V100-SXM2-32GB': _V100,
    'NVIDIA A100-SXM4-40GB': _A100,
    'NVIDIA A100-SXM4-80GB': _A100,
    'NVIDIA A100-PCIE-40GB': _A100,
    'NVIDIA A100 80GB PCIe': _A100,
    'NVIDIA H100 PCIe': _H100_PCIE,
    'NVIDIA H100 NVL': _NVL,
    'NVIDIA H100 80GB HBM3': _H100,
    'NVIDIA H200': _H100,
    'NVIDIA H200 NVL': _NVL,
}
_GPU_QUERY = 'name,memory.total,clocks.max.sm,pcie.link.gen.max,driver_version'
# Settings that decide how much of the machine is used, and how. No paths and no host names.
_VARIABLES = (
    'NPROC',
    'OMP_NUM_THREADS',
    'CUDA_VISIBLE_DEVICES',
    'NVIDIA_TF32_OVERRIDE',
    'XLA_FLAGS',
    'XLA_PYTHON_CLIENT_ALLOCATOR',
    'XLA_PYTHON_CLIENT_MEM_FRACTION',
    'XLA_PYTHON_CLIENT_PREALLOCATE',
    'JAX_PLATFORMS',
    'JAX_NUM_CPU_DEVICES',
    'JAX_ENABLE_X64',
    'JAX_DISABLE_JIT',
    'JAX_DEFAULT_MATMUL_PRECISION',
    'JAX_DEFAULT_PRNG_IMPL',
    'JAX_THREEFRY_PARTITIONABLE',
    'NCCL_ALGO',
    'NCCL_NVLS_ENABLE',
    'NCCL_PROTO',
)


def read(path: str) -> str:
    """A file of the system as a stripped text; empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''


def field(text: str, name: str) -> str:
    """The value of the first `NAME : VALUE` line of a text like /proc/cpuinfo; empty if none."""
    match = re.search(rf'^{name}\s*:\s*(.*)$', text, re.MULTILINE)
    return match.group(1).strip() if match else ''


def memory(meminfo: str) -> str:
    """Capacity, such as '23 GiB', from the text of /proc/meminfo."""
    kibibytes = field(meminfo, 'MemTotal').split()
    return f'{int(kibibytes[0]) / 2**20:.0f} GiB' if kibibytes else ''


def instruction_sets(cpuinfo: str) -> list[str]:
    """The vector instruction sets that matter, from the text of /proc/cpuinfo."""
    flags = (field(cpuinfo, 'flags') or field(cpuinfo, 'Features')).split()
    return sorted(
        flag
        for flag in flags
        if flag in _INSTRUCTION_SETS or flag.startswith(('avx512', 'avx10', 'amx', 'sve'))
    )


def caches() -> list[str]:
    """The caches of a core, such as 'L1 Data 32K'; libraries choose blocks of matrices by them."""
    folders = sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('index*'))
    return [
        f'L{read(f"{folder}/level")} {read(f"{folder}/type")} {read(f"{folder}/size")}'
        for folder in folders
    ]


def gpus() -> list[dict[str, str]]:
    """The GPUs that the NVIDIA driver sees, one mapping for each; none without a driver."""
    command = ['nvidia-smi', f'--query-gpu={_GPU_QUERY}', '--format=csv,noheader']
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    names = _GPU_QUERY.split(',')
    return [
        dict(zip(names, (value.strip() for value in line.split(',')), strict=True))
        for line in lines.strip().splitlines()
    ]


def peak(device_kind: str, dtype: str) -> float | None:
    """Operations a second that a device is made for, by its data sheet; None if it has no entry.

    Args:
      device_kind: as `jax.Device.device_kind` names it.
      dtype: of what is multiplied, such as 'bfloat16'.
    """
    of_kind = _PEAKS.get(device_kind, {})
    return of_kind[dtype] * 1e12 if dtype in of_kind else None


def describe(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What of this machine can change a run's speed or the last bits of its results.

    Returns:
      JSON: processor, instruction sets, cores (usable and in all), memory, GPUs with their driver,
      versions of the CUDA packages, and the environment's settings.
    """
    cpuinfo = read('/proc/cpuinfo')
    found = gpus()
    packages = {
        dist.metadata['Name']: dist.version
        for dist in importlib.metadata.distributions()
        if (dist.metadata['Name'] or '').startswith(('nvidia-', 'jax-cuda'))
    }
    return {
        'processor': field(cpuinfo, 'model name'),
        'processor_model': ' '.join(
            f'{name} {field(cpuinfo, name)}' for name in ('cpu family', 'model', 'stepping')
        ),
        'instruction_sets': instruction_sets(cpuinfo),
        'caches': caches(),
        'usable_cores': len(os.sched_getaffinity(0)),
        'cores': os.cpu_count(),
        'memory': memory(read('/proc/meminfo')),
        'gpus': [gpu['name'] for gpu in found],
        'gpu_driver': found[0]['driver_version'] if found else '',
        'cuda_packages': dict(sorted(packages.items())),
        'settings': {name: environment[name] for name in _VARIABLES if name in environment},
    }
