# SPDX-License-Identifier: Apache-2.0
"""Processes: who has which part, how they are found, asked to stop, and ended by the launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import train_lib
from training import processes

LAUNCH = Path(__file__).resolve().parents[2] / 'scripts' / 'launch.py'


def launch(tmp_path, program, *arguments, **environment):
    """Starts the launcher on a small program, which finds its number in `me`."""
    path = tmp_path / 'program.py'
    start = (
        'import os, signal, sys, time\nme = int(sys.argv[-1].partition("--process_id=")[2] or 0)\n'
    )
    path.write_text(start + program)
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *arguments, '--', str(path)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_launcher_binds_each_process_to_one_gpu_and_prefixes_its_lines(tmp_path):
    run = launch(
        tmp_path,
        'print(sys.argv[1:3], os.environ["JAX_PLATFORMS"], os.environ["CUDA_VISIBLE_DEVICES"])',
        '--gpus=2',
        CUDA_VISIBLE_DEVICES='3,GPU-5,6',
    )
    lines = sorted(run.communicate(timeout=60)[0].splitlines())
    assert run.returncode == 0
    assert lines[0].startswith("[0] ['--coordinator=127.0.0.1:")
    assert lines[0].endswith("'--num_processes=2'] cuda 3")
    assert lines[1].endswith("'--num_processes=2'] cuda GPU-5")


def test_the_launcher_refuses_more_gpus_than_are_visible(tmp_path):
    run = launch(tmp_path, '', '--gpus=3', CUDA_VISIBLE_DEVICES='0,1')
    assert 'names only 2' in run.communicate(timeout=60)[0]
    assert run.returncode == 2


@pytest.mark.parametrize('processes', [1, 2])
def test_gpus_that_are_not_there_reject_the_run(tmp_path, processes):
    """A CPU in their place would be a surprise after hours."""
    run = launch(
        tmp_path,
        f'sys.path.insert(0, {str(LAUNCH.parents[1])!r})\n'
        'from training import processes\n'
        'place = [a.partition("=")[2] for a in sys.argv[1:]]\n'
        'place = (place[0], int(place[1]), me) if place else (None, None, None)\n'
        'try:\n'
        '    processes.initialize(*place, timeout=60)\n'
        'except processes.StartError as error:\n'
        '    print(error)\n'
        '    sys.exit(2)\n',
        f'--gpus={processes}',
        CUDA_VISIBLE_DEVICES='',
    )
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 2, said
    assert 'A GPU was asked for (--gpus=N)' in said


@pytest.mark.parametrize(('codes', 'status'), [('0,0', 0), ('1,1', 1), ('75,75', 75), ('0,2', 2)])
def test_the_runs_status_is_that_of_its_processes(tmp_path, codes, status):
    run = launch(tmp_path, f'sys.exit([{codes}][me])', '--cpus=2')
    run.communicate(timeout=60)
    assert run.returncode == status


def test_one_that_ends_itself_because_it_hangs_is_to_be_resumed(tmp_path):
    program = 'if me == 1: os.kill(os.getpid(), signal.SIGALRM)\ntime.sleep(600)'
    run = launch(tmp_path, program, '--cpus=2', '--grace=0.5')
    assert 'process 1 was ended by SIGALRM; ending the others' in run.communicate(timeout=60)[0]
    assert run.returncode == 75


def test_one_that_is_killed_ends_the_others_and_their_helpers(tmp_path):
    """Also those that ignore SIGTERM."""
    run = launch(
        tmp_path,
        'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
        'helper = os.fork()\n'
        'os.write(1, b"pid %d\\n" % os.getpid())\n'
        f'open(f"{tmp_path}/ready-{{os.getpid()}}", "w").close()\n'
        f'while len(os.listdir("{tmp_path}")) < 1 + 6: time.sleep(0.01)\n'
        'if me == 1 and helper: os.kill(os.getpid(), signal.SIGKILL)\n'
        'time.sleep(600)\n',
        '--cpus=3',
        '--grace=0.5',
    )
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 3
    assert 'process 1 was ended by SIGKILL; ending the others' in said
    pids = [int(line.split()[-1]) for line in said.splitlines() if ' pid ' in line]
    assert len(pids) == 6
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signals_are_passed_on_to_all(tmp_path, number):
    run = launch(
        tmp_path,
        'def stop(number, frame):\n'
        '    print("got", number, flush=True)\n'
        '    sys.exit(75)\n'
        'for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)\n'
        'print("ready", flush=True)\n'
        'time.sleep(600)\n',
        '--cpus=2',
    )
    ready = [run.stdout.readline() for _ in range(2)]
    assert all('ready' in line for line in ready)
    run.send_signal(number)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 75
    assert sorted(said.splitlines()) == [f'[{i}] got {int(number)}' for i in range(2)]


def test_a_signal_before_anything_can_be_saved_ends_the_run_with_the_signals_status(tmp_path):
    run = launch(tmp_path, 'print("ready", flush=True)\ntime.sleep(600)', '--cpus=1')
    run.stdout.readline()
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM


def test_killing_the_launcher_ends_the_processes(tmp_path):
    run = launch(tmp_path, 'print("pid", os.getpid(), flush=True)\ntime.sleep(600)', '--cpus=1')
    pid = int(run.stdout.readline().split()[-1])
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ('environment', 'inside'),
    [
        ({}, False),
        ({'SLURM_STEP_NODELIST': 'a', 'SLURM_NTASKS': '1'}, False),
        ({'SLURM_STEP_NODELIST': 'a', 'SLURM_NTASKS': '4'}, True),
        ({'OMPI_MCA_orte_hnp_uri': 'x', 'OMPI_COMM_WORLD_SIZE': '1'}, False),
        ({'OMPI_MCA_orte_hnp_uri': 'x', 'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'KUBERNETES_SERVICE_HOST': 'x'}, False),
        ({'KUBERNETES_SERVICE_HOST': 'x', 'JOB_COMPLETION_INDEX': '0'}, True),
    ],
)
def test_a_cluster_is_one_only_with_several_processes(monkeypatch, environment, inside):
    for name in ('SLURM_STEP_NODELIST', 'OMPI_MCA_orte_hnp_uri', 'KUBERNETES_SERVICE_HOST'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._in_cluster() is inside


def test_half_the_arguments_are_refused():
    with pytest.raises(processes.StartError, match='belong together'):
        processes.initialize('localhost:1', 2, None, timeout=1)


@pytest.mark.parametrize(
    'place',
    [
        ('foo', 2, 0),
        ('localhost', 2, 0),
        (':80', 2, 0),
        ('host:', 2, 0),
        ('host:x', 2, 0),
        ('host:0', 2, 0),
        ('host:99999', 2, 0),
        ('host:80', 0, 0),
        ('host:80', 2, 2),
        ('host:80', 2, -1),
    ],
)
def test_a_place_that_cannot_be_is_rejected(place):
    with pytest.raises(processes.StartError, match=r'is not HOST:PORT|is not in 0\.\.'):
        processes.initialize(*place, timeout=1)


def test_devices_that_cannot_be_started_refuse_the_run(monkeypatch):
    def fails():
        raise RuntimeError('Unable to initialize backend')

    monkeypatch.setattr(jax, 'default_backend', fails)
    with pytest.raises(processes.StartError, match=r'Unable .* must resolve'):
        processes.initialize(None, None, None, timeout=1)


def test_a_peer_that_never_appears_ends_the_start(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    program = (
        'import sys; from training import processes; '
        f'processes.initialize("127.0.0.1:{port}", 2, 0, timeout=2)'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(LAUNCH.parents[1])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert '--start_timeout=2 seconds' in done.stderr


def test_what_process_0_knows_and_compiles_all_have(tmp_path):
    """Trees of any arrays; and programs, of which the next start finds all in the cache."""
    program = (
        f'sys.path.insert(0, {str(LAUNCH.parents[1])!r})\n'
        'import jax, numpy as np, train_lib; from training import processes\n'
        'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)\n'
        'hits = []\n'
        'jax.monitoring.register_event_listener(\n'
        '    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)\n'
        'processes.initialize(sys.argv[1].partition("=")[2], 2, me, timeout=60)\n'
        'tree = {"a": np.arange(3.0), "b": (np.int32(-5), np.array([[True]])), "c": np.ones(0)}\n'
        'mine = tree if me == 0 else jax.tree.map(np.zeros_like, tree)\n'
        'got = processes.from_lead(mine)\n'
        'same = jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), tree, got)\n'
        'assert all(jax.tree.leaves(same)), got\n'
        f'processes.keep_programs(processes.Path({str(tmp_path / "cache")!r}))\n'
        'hits.clear()\n'
        'mesh = train_lib.make_mesh()\n'
        'place = jax.NamedSharding(mesh, train_lib.SHARDED)\n'
        'x = jax.make_array_from_process_local_data(place, np.ones(1, np.float32))\n'
        'total = jax.jit(lambda x: (x * 3).sum(), out_shardings=jax.NamedSharding('
        'mesh, train_lib.REPLICATED))(x)\n'
        'print(float(total), len(hits))\n'
    )
    # At first process 0 compiles; process 1 waits for it, or comes late and finds it in the cache.
    for hits in ({0: '0'}, {0: '1', 1: '1'}):
        run = launch(tmp_path, program, '--cpus=2', JAX_COMPILATION_CACHE_DIR='')
        said = run.communicate(timeout=120)[0]
        lines = sorted(line for line in said.splitlines() if 'Gloo' not in line)
        assert [line[:-2] for line in lines] == ['[0] 6.0', '[1] 6.0'], said
        assert all(lines[process].endswith(f' {count}') for process, count in hits.items()), said


def test_a_cache_that_not_all_processes_see_is_not_used(tmp_path):
    """As on machines without a common file system: one would find what others must compile."""
    program = (
        f'sys.path.insert(0, {str(LAUNCH.parents[1])!r})\n'
        'import jax; from training import processes\n'
        'processes.initialize(sys.argv[1].partition("=")[2], 2, me, timeout=60)\n'
        f'processes.keep_programs(processes.Path({str(tmp_path)!r}) / f"machine-{{me}}")\n'
        'print(jax.config.jax_compilation_cache_dir or "none")\n'
    )
    run = launch(tmp_path, program, '--cpus=2', JAX_COMPILATION_CACHE_DIR='')
    said = run.communicate(timeout=120)[0]
    assert '[0] none\n' in said
    assert '[1] none\n' in said
    assert 'not seen by all processes' in said
    assert not list(tmp_path.glob('machine-*/*'))


def test_shares_cover_a_batch_in_order(monkeypatch):
    """Four devices in two processes."""

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    mesh = type('Mesh', (), {'devices': np.array([Device(i // 2) for i in range(4)])})
    shares = []
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        shares.append(processes.share_of(mesh, 64))
    assert [(s.start, s.size, s.whole) for s in shares] == [(0, 32, 64), (32, 32, 64)]


@pytest.fixture
def handlers():
    """Puts the handlers of the two signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures('handlers')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_request_to_stop_is_noted_and_a_second_one_ends_at_once(monkeypatch, number):
    raised = []
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    stop = processes.StopRequest()
    stop.listen()
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert stop.received == number.name
    assert not raised
    os.kill(os.getpid(), number)
    assert raised == [number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_flags_are_one_for_each_device():
    class Programs:
        mesh = Mesh(np.array(jax.devices()[:4]), (train_lib.AXIS,))

        @staticmethod
        def to_devices(flags):
            return flags

    stop = processes.StopRequest()
    assert stop.flags(Programs).tolist() == [0, 0, 0, 0]
    stop.received = 'SIGTERM'
    assert stop.flags(Programs).tolist() == [1, 1, 1, 1]


def test_seeds_have_63_bits():
    assert processes.seed_from_lead(2**63 - 1) == 2**63 - 1
    drawn = {processes.seed_from_lead(None) for _ in range(100)}
    assert len(drawn) == 100
    assert max(drawn) < 2**63
    assert max(drawn) > 2**60
