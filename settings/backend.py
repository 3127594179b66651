# SPDX-License-Identifier: Apache-2.0
"""Environment variables that JAX and its libraries read when they start. Nothing here imports JAX.

Set before JAX starts its devices, they make results right and the same every time.
"""

import os

# Number of threads in XLA's CPU pool. Some convolutions split a sum over them, so the number must
# not depend on the machine. By default it is the larger of the usable cores and the devices; so a
# process must not have more devices than this.
CPU_THREADS = 8
CPU_FLAGS = (
    # Other vector units are other orders of addition.
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
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'  # A second lock: float32 is float32.
    os.environ['NPROC'] = str(CPU_THREADS)
    have = os.environ.get('XLA_FLAGS', '').split()
    new = [flag for flag in (*CPU_FLAGS, *flags) if flag not in have]
    os.environ['XLA_FLAGS'] = ' '.join(have + new)


def in_cluster() -> bool:
    """Whether a launcher that JAX knows how to ask has started this process, among others."""
    environment = os.environ
    slurm = 'SLURM_STEP_NODELIST' in environment and int(environment.get('SLURM_NTASKS', 1)) > 1
    open_mpi = (
        'OMPI_MCA_orte_hnp_uri' in environment
        and int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    )
    # Of the pods of a cluster, only those of an indexed job belong together.
    kubernetes = 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment
    return slurm or open_mpi or kubernetes


def prepare(deterministic: bool, micro_batches: int) -> None:
    """Sets what a run needs.

    Args:
      deterministic: whether a GPU's kernels must repeat bit for bit.
      micro_batches: of an optimizer step, to be spread over the CPU devices of this process; there
        will be as many devices as divide them. What the caller has set stays.
    """
    configure(*(DETERMINISTIC_GPU_FLAGS if deterministic else ()))
    if 'xla_force_host_platform_device_count' not in os.environ['XLA_FLAGS']:
        # On few devices most of the threads are in each other's way, so there are as many as fit.
        devices = max(d for d in range(1, CPU_THREADS + 1) if micro_batches % d == 0)
        os.environ.setdefault('JAX_NUM_CPU_DEVICES', str(devices))
