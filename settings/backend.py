# SPDX-License-Identifier: Apache-2.0
"""Environment variables that JAX and its libraries read when they start. Nothing here imports JAX.

Set before JAX starts its devices, they make results right and the same every time.
"""

import os

# Threads that XLA computes with on a CPU, and so into how many parts it splits some sums. Otherwise
# it is the number of usable cores or of devices, whichever is larger; so at most so many devices.
CPU_THREADS = 8
CPU_FLAGS = (
    # Other vector units are other orders of addition. What it costs: docs/determinism.md.
    '--xla_cpu_max_isa=AVX2',
    # XLA hands sums, products and convolutions on a CPU to the library YNNPACK. As of jaxlib 0.10.2
    # some of them are wrong, and differ from call to call (tests/settings/test_backend.py has an
    # example; https://github.com/jax-ml/jax/issues/39103). An empty list hands over none.
    '--xla_cpu_experimental_ynn_fusion_type=',
)
# Only kernels whose result does not depend on the order in which threads happen to run.
DETERMINISTIC_GPU_FLAGS = ('--xla_gpu_exclude_nondeterministic_ops=true',)


def configure(*flags: str) -> None:
    """Sets what every program needs, and adds flags to what XLA_FLAGS holds already."""
    os.environ['NPROC'] = str(CPU_THREADS)
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'  # A second lock: float32 is float32.
    have = os.environ.get('XLA_FLAGS', '').split()
    new = [flag for flag in (*CPU_FLAGS, *flags) if flag not in have]
    os.environ['XLA_FLAGS'] = ' '.join(have + new)


def prepare(deterministic: bool) -> None:
    """Sets what a run needs.

    Args:
      deterministic: whether a GPU's kernels must repeat bit for bit.
    """
    configure(*(DETERMINISTIC_GPU_FLAGS if deterministic else ()))
