# SPDX-License-Identifier: Apache-2.0
"""The host memory that saving and resuming take beyond the state, measured.

The state of a Llama with a checkpoint of 1.2 GB, over the CPU devices of several processes, is
saved in the background and then read again. For each process: the bytes of its own part, and how
far its memory went beyond what it held before the save, or holds after the start; also as a ratio.

    python experiments/checkpoint_memory.py [--processes=2] [--devices=2] [--small]

With --small the state has a few MB, so what is measured is the memory of the programs.
"""

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.launch import free_port

LINE = '| {} | {} | {:.2f} GB | {:.2f} GB, {:.2f} | {:.2f} GB, {:.2f} |'


def in_memory(field: str) -> int:
    """Bytes, by a field of /proc/self/status: VmRSS is what is held now, VmHWM the most so far."""
    found = re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found
    return 1024 * int(found[1])


def settle() -> int:
    """Gives back what is free, and starts the count of VmHWM anew; bytes that are held."""
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    return in_memory('VmRSS')


def measure(place: tuple[str, int, int], directory: Path, small: bool) -> str:
    """One process of those that save and read; a line of the table."""
    import jax
    import optax

    import accumulation
    import train_lib
    from models.llama.architectures import Architecture
    from training import checkpointing, compilation, processes, restoring
    from training.checkpoint_saver import CheckpointSaver
    from workloads.llama31_8b.task import LanguageModelling

    processes.initialize(*place, timeout=60)
    mesh = compilation.make_mesh()
    sizes = (8, 64, 128, 4, 4, 16, 512) if small else (8, 768, 2048, 12, 4, 64, 32000)
    task = LanguageModelling(Architecture(*sizes), 128, 'float32')
    optimizer = accumulation.accumulated(optax.adam(1e-3), 1, mesh.size, task.split)
    model = train_lib.Model(task, optimizer, optax.constant_schedule(1e-3), mesh.size)
    saver = CheckpointSaver(directory, print)
    state = compilation.initial_state(1, model, mesh)
    saved = train_lib.to_saved(noisy(state))
    marks = jax.device_get(compilation.compile_fingerprints(model, mesh)(saved))
    record = checkpointing.signed({}, saved, marks)
    own = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(saved)
        for shard in x.addressable_shards[: 1 if x.is_fully_replicated else None]
    )

    processes.wait_for_all()
    held = settle()
    saver.save(compilation.on_host(saved), record)
    ok = saver.close()
    assert ok
    saving = in_memory('VmHWM') - held

    del state, saved, saver
    processes.wait_for_all()
    settle()
    found = restoring.find(directory, model, mesh)
    state = jax.block_until_ready(compilation.resumed_state(found.tree, model, mesh))
    most = in_memory('VmHWM')
    resuming = most - settle()
    del state
    return LINE.format(place[2], len(jax.local_devices()), own / 1e9, saving / 1e9, saving / own,
                       resuming / 1e9, resuming / own)  # fmt: skip


def noisy(state: Any) -> Any:
    """A state without zeros, which would be compressed to nothing."""
    import jax

    def add(x):
        if x.dtype != 'float32':
            return x
        return x + jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)

    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda t: jax.tree.map(add, t), out_shardings=where)(state)


def main() -> int:
    """Starts the processes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--devices', type=int, default=2, help='of each process')
    parser.add_argument('--small', action='store_true', help='a network of hardly any weights')
    parser.add_argument('--process_id', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--directory', type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.process_id is not None:
        address = os.environ['COORDINATOR']
        place = (address, flags.processes, flags.process_id)
        print(measure(place, flags.directory, flags.small))
        return 0
    print('| process | devices | own part | saving: beyond it, of the part | resuming |')
    print('|---|---|---|---|---|', flush=True)
    environment = os.environ | {
        'COORDINATOR': f'localhost:{free_port()}',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={flags.devices}',
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f'--processes={flags.processes}',
                   f'--directory={folder}/checkpoints']  # fmt: skip
        if flags.small:
            command.append('--small')
        running = [
            subprocess.Popen([*command, f'--process_id={i}'], env=environment)
            for i in range(flags.processes)
        ]
        return max(process.wait() for process in running)


if __name__ == '__main__':
    sys.exit(main())
