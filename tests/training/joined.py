# SPDX-License-Identifier: Apache-2.0
"""A program of several processes for tests: joined.py WHAT ARGUMENT… --coordinator=… as of main.py.

It ends as main.py does: an error is printed, and gives the exit status.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from settings import errors
from training import checkpointing, compilation, compilation_cache, processes
from training.checkpoint_saver import CheckpointSaver
from training.stop_request import StopRequest


def starts():
    """Nothing more."""


def agrees():
    """What process 0 knows, all have; what it cannot do, none can."""
    lead = processes.is_lead()
    for value in (None, True, 2**63 - 1, 'ä' * 1000, {'status': [1.5, 'aborted']}):
        got = processes.broadcast(value if lead else 'something longer, and not that')
        assert got == value, got
        assert type(got) is type(value)
    halves = np.array(divmod(processes.seed_from_lead(None), 2**32), np.uint32)
    assert np.ptp(multihost_utils.process_allgather(halves), axis=0).tolist() == [0, 0]
    assert processes.run_on_lead(lambda: 7) == (7 if lead else None)
    me, count = jax.process_index(), jax.process_count()
    assert processes.gathered('x' * me) == ['x' * i for i in range(count)]
    try:
        processes.run_on_lead(lambda: 1 // 0)
    except ZeroDivisionError:
        assert lead
    except errors.FailedError:
        assert not lead


def fails(who):
    """One process, or all of them; the others wait for it."""
    processes.wait_for_all()
    if who in ('all', str(jax.process_index())):
        raise errors.FailedError(f'process {jax.process_index()} failed')
    processes.wait_for_all()


def lead_fails():
    """Process 0 cannot do what it alone is to do."""

    def fill():
        raise errors.SaveError('the disk is full')

    processes.run_on_lead(fill)


def ends_late(seconds):
    """Process 1 has more to do."""
    if not processes.is_lead():
        time.sleep(float(seconds))


def stops(number):
    """Process 1 gets a signal in step 3; says in which step this process learned of it."""
    mesh = compilation.make_mesh()
    stop = StopRequest(mesh)
    stop.listen()
    pending = None
    for step in range(10):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), int(number))
        if pending is not None and bool(jax.device_get(pending)):
            print('learned in step', step, stop.received)
            return
        pending = stop.poll()


def compiles(folder):
    """A program; says how many of the cache it used."""
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith('cache_hits') else None
    )
    compilation_cache.keep(Path(folder.replace('{}', str(jax.process_index()))))
    print('cache', jax.config.values['jax_compilation_cache_dir'])
    hits.clear()
    print('sum', jax.jit(lambda x: (x * 3).sum())(jnp.ones(2)), 'hits', len(hits))


def saves(folder):
    """An array in parts; of the file that a process writes, the part of each holds its index."""
    mesh, me = compilation.make_mesh(), jax.process_index()
    whole = np.repeat(np.arange(mesh.size, dtype=np.float32), 5).reshape(mesh.size, 5)
    tree = compilation.place(mesh, {'a': whole, 'step': np.int32(3)}, {'a': 0})
    directory = Path(folder.replace('{}', str(me)))
    processes.run_on_lead(directory.mkdir)
    processes.check_all_see(directory)
    saver = CheckpointSaver(directory, print)
    # An array that no process has whole, so each can only have written its own part.
    assert not tree['a'].is_fully_addressable
    saver.save(compilation.on_host(tree), checkpointing.signed({}, {'a': whole, 'step': 3}, [0, 0]))
    assert saver.close()
    stored = checkpointing.Stored(Path(folder) / '3')
    assert (stored.read('a') == whole).all()
    again = stored.placed('a', tree['a'])
    assert (again.addressable_data(0) == tree['a'].addressable_data(0)).all()


PROGRAMS = {
    f.__name__: f for f in (starts, agrees, fails, lead_fails, ends_late, stops, compiles, saves)
}


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument('what', nargs='+')
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes', type=int)
    parser.add_argument('--process_id', type=int)
    parser.add_argument('--start_timeout', type=int, default=60)
    flags = parser.parse_args(arguments)
    compilation_cache.configure()
    try:
        with processes.joined(
            flags.coordinator, flags.num_processes, flags.process_id, flags.start_timeout
        ):
            PROGRAMS[flags.what[0]](*flags.what[1:])
    except (errors.RejectedError, errors.FailedError) as error:
        print(f'error: {error}', flush=True)
        return error.status
    except Exception:
        traceback.print_exc()
        return errors.FAILED
    return errors.REACHED


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
