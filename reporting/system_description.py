# SPDX-License-Identifier: Apache-2.0
"""What a machine is, in the form that MLPerf submissions describe systems.

Read from Linux and the NVIDIA driver; what they do not tell (cooling, networks) is left empty for
the submitter to fill.
"""

import collections
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.finished_run import RunError
from run_files import machine
from settings.hyperparameters import Config

# submission_status of the log -> the status of system descriptions from round 4.0 on.
STATUS = {
    'cloud': 'Available cloud',
    'onprem': 'Available on-premise',
    'preview': 'Preview',
    'research': 'Research, Development, or Internal (RDI)',
}
# What no command tells.
_FOR_THE_SUBMITTER = (
    'host_processor_interconnect', 'host_memory_configuration', 'host_networking',
    'host_networking_topology', 'accelerator_on-chip_memories', 'accelerator_memory_configuration',
    'accelerator_interconnect', 'accelerator_interconnect_topology', 'cooling', 'hw_notes',
    'sw_notes',
)  # fmt: skip


def processors(cpuinfo: str) -> dict[str, str]:
    """Sockets, cores and name from the text of /proc/cpuinfo."""
    blocks = [block for block in cpuinfo.split('\n\n') if block.strip()]
    sockets = {machine.field(block, 'physical id') for block in blocks}
    cores = {
        (machine.field(block, 'physical id'), machine.field(block, 'core id')) for block in blocks
    }
    frequency = machine.field(cpuinfo, 'cpu MHz')
    return {
        'host_processors_per_node': str(len(sockets)),
        'host_processor_model_name': machine.field(cpuinfo, 'model name'),
        'host_processor_core_count': str(len(cores) // len(sockets)),
        'host_processor_vcpu_count': str(len(blocks)),
        'host_processor_frequency': f'{frequency} MHz' if frequency else '',
    }


def caches() -> str:
    """Sizes of the first core's caches, such as 'L1d 32K, L1i 32K, L2 1024K'."""
    text = ', '.join(machine.caches())
    return text.replace(' Data', 'd').replace(' Instruction', 'i').replace(' Unified', '')


def storage() -> dict[str, str]:
    """Kind of the disks, and size of the file system's root; a virtual machine hides the kind."""
    disks = [*Path('/sys/block').glob('sd*'), *Path('/sys/block').glob('nvme*')]
    rotating = {machine.read(f'{disk}/queue/rotational') for disk in disks}
    kind = 'hard disk' if '1' in rotating else 'solid state' if rotating else ''
    return {
        'host_storage_type': kind,
        'host_storage_capacity': f'{shutil.disk_usage("/").total / 2**30:.0f} GiB',
    }


def _operating_system() -> str:
    release = machine.read('/etc/os-release')
    match = re.search(r'^PRETTY_NAME="?(.*?)"?$', release, re.MULTILINE)
    return f'{match.group(1) if match else platform.system()}, Linux {platform.release()}'


def describe(config: Config, environment: Mapping[str, Any]) -> dict[str, str]:
    """The system description of a run that was made on this machine.

    Args:
      config: the run's.
      environment: the run's environment.json.

    Raises:
      RunError: when the run was made on another machine.
    """
    on_cpu = environment['device_kind'] == 'cpu'
    found = [] if on_cpu else machine.gpus()
    kinds = {gpu['name'] for gpu in found}
    if environment['system'] != platform.platform() or (
        not on_cpu and environment['device_kind'] not in kinds
    ):
        raise RunError(
            f'the runs were made on another machine ({environment["system"]}, '
            f'{environment["device_kind"]}); package there, or give --system_description=FILE'
        )
    gpu = found[0] if found else collections.defaultdict(str)
    processes = environment['processes']
    nodes = max(1, processes // max(1, len(found))) if found else 1
    versions = environment['versions']
    software = [f'{name} {version}' for name, version in versions.items() if name != 'jax']
    link = gpu['pcie.link.gen.max']
    return {
        'submitter': config.org,
        'division': config.division,
        'status': STATUS[config.status],
        'system_name': config.platform,
        'number_of_nodes': str(nodes),
        **processors(machine.read('/proc/cpuinfo')),
        'host_processor_caches': caches(),
        'host_memory_capacity': machine.memory(machine.read('/proc/meminfo')),
        **storage(),
        'accelerators_per_node': str(len(found)),
        'accelerator_model_name': gpu['name'] or 'N/A',
        'accelerator_host_interconnect': f'PCIe Gen{link}' if link else '',
        'accelerator_frequency': gpu['clocks.max.sm'],
        'accelerator_memory_capacity': gpu['memory.total'],
        'framework': f'JAX {versions["jax"]}',
        'other_software_stack': ', '.join([f'Python {environment["python"]}', *software])
        + (f', NVIDIA driver {gpu["driver_version"]}' if found else ''),
        'operating_system': _operating_system(),
        **dict.fromkeys(_FOR_THE_SUBMITTER, ''),
    }
