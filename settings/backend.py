# SPDX-License-Identifier: Apache-2.0
"""Environment variables that JAX and its libraries read when they start. Nothing here imports JAX.

Set before JAX starts its devices, they make results right and the same every time.
"""

import os

# XLA hands sums, products and convolutions on a CPU to the library YNNPACK. As of jaxlib 0.10.2
# some of them are wrong, and differ from call to call (tests/settings/test_backend.py has an
# example; https://github.com/jax-ml/jax/issues/39103). An empty list hands over none.
CPU_FLAGS = ('--xla_cpu_experimental_ynn_fusion_type=',)
# Only kernels whose result does not depend on the order in which threads happen to run.
DETERMINISTIC_GPU_FLAGS = ('--xla_gpu_exclude_nondeterministic_ops=true',)
# Sums over GPUs in one fixed order: NCCL otherwise chooses an algorithm by size and topology, and
# on Hopper adds in the switches (NVLS), in an order that is theirs. What the caller has set stays.
DETERMINISTIC_NCCL = {'NCCL_ALGO': 'Ring', 'NCCL_NVLS_ENABLE': '0'}


def set_xla_flags(*flags: str) -> None:
    """Adds flags, and those that every run needs, to what XLA_FLAGS holds already."""
    have = os.environ.get('XLA_FLAGS', '').split()
    new = [flag for flag in (*CPU_FLAGS, *flags) if flag not in have]
    os.environ['XLA_FLAGS'] = ' '.join(have + new)


def prepare(deterministic: bool) -> None:
    """Sets what a run needs.

    Args:
      deterministic: whether a GPU's kernels and the sums over GPUs must repeat bit for bit.
    """
    set_xla_flags(*(DETERMINISTIC_GPU_FLAGS if deterministic else ()))
    if deterministic:
        for name, value in DETERMINISTIC_NCCL.items():
            os.environ.setdefault(name, value)
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'  # A second lock: float32 is float32.
