# SPDX-License-Identifier: Apache-2.0
"""Processes: how they find each other, what they agree on, who has which part, and how they end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from run_files.progress import Progress
from scripts.launch import free_port
from settings import backend
from tests.run_files.test_progress import DIGITS
from training import processes, train_loop

PROGRAM = Path(__file__).with_name('joined.py')
LAUNCH = PROGRAM.parents[2] / 'scripts' / 'launch.py'


def start(*arguments, **environment):
    """Starts Python on these arguments, with one CPU device."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '1'} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launched(*what, flag='--cpus=2', **environment):
    """Runs the program under the launcher; its exit status and what it said."""
    run = start(LAUNCH, flag, '--', PROGRAM, *what, **environment)
    said = run.communicate(timeout=120)[0]
    return run.returncode, said


def peers(*what):
    """Starts the program as two processes that nobody supervises."""
    place = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
    return [start(PROGRAM, *what, *place, f'--process_id={i}') for i in range(2)]


@pytest.mark.parametrize('number', [1, 2])
def test_gpus_that_are_not_there_reject_the_run(number):
    """A CPU in their place would be a surprise after hours."""
    status, said = launched('starts', flag=f'--gpus={number}', CUDA_VISIBLE_DEVICES='98,99')
    assert status == 2, said
    assert 'A GPU was asked for (--gpus=N)' in said


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
    assert backend.in_cluster() is inside


def test_half_the_arguments_are_rejected():
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


@pytest.mark.parametrize(
    ('several', 'message'),
    [(True, 'Unable .* must resolve'), (False, 'Unable .* Unset JAX_PLATFORMS=xpu')],
)
def test_devices_that_cannot_be_started_refuse_the_run(monkeypatch, several, message):
    def fails():
        raise RuntimeError('Unable to initialize backend')

    monkeypatch.setattr(jax, 'default_backend', fails)
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: several)
    monkeypatch.setenv('JAX_PLATFORMS', 'xpu')
    with pytest.raises(processes.StartError, match=message):
        processes.initialize(None, None, None, timeout=1)


@pytest.mark.parametrize('process', [0, 1])
def test_a_peer_that_never_appears_ends_the_start(process):
    place = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
    place += [f'--process_id={process}', '--start_timeout=2']
    run = start(PROGRAM, 'starts', *place)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 2, said
    assert 'not all processes have joined within --start_timeout=2 seconds' in said
    assert said.splitlines()[-1].startswith('error: ')
    assert 'stack trace' not in said


def test_what_process_0_knows_all_have():
    status, said = launched('agrees')
    assert status == 0, said


@pytest.mark.slow
def test_a_process_that_fails_alone_does_not_wait_for_the_others():
    first, second = peers('fails', '1')
    said = second.communicate(timeout=60)[0]
    assert second.returncode == -signal.SIGUSR1, said
    assert 'error: process 1 failed' in said
    assert 'stack trace' not in said
    said = first.communicate(timeout=60)[0]
    assert first.returncode not in (0, 1, 75), said
    assert 'stack trace' not in said


def test_processes_that_fail_together_end_with_the_status_of_the_failure():
    for i, process in enumerate(peers('fails', 'all')):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 3, said
        assert f'error: process {i} failed' in said
        assert 'stack trace' not in said


def test_what_process_0_alone_cannot_do_ends_all_with_its_status():
    for i, process in enumerate(peers('lead_fails')):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 3, said
        assert ('error: the disk is full' if i == 0 else 'error: process 0 could not') in said


def test_what_another_process_than_0_reports_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(jax, 'process_index', lambda: 3)
    train_loop.reporter(Progress(None, DIGITS, 0))('its part could not be saved')
    assert capsys.readouterr().out == 'process 3: its part could not be saved\n'


def test_each_process_saves_its_own_part_of_an_array(tmp_path):
    for process in peers('saves', str(tmp_path / 'all')):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
    written = {path.name for path in (tmp_path / 'all' / '3' / 'state').iterdir()}
    assert {'ocdbt.process_0', 'ocdbt.process_1'} <= written


def test_a_process_that_does_not_see_the_work_directory_rejects_the_run(tmp_path):
    for process in peers('saves', str(tmp_path / 'of-{}')):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2, said
        assert 'error: process 1 does not see' in said


def test_a_process_that_is_done_waits_for_the_others():
    for process in peers('ends_late', '3'):
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said


def test_shares_cover_a_batch_in_order(monkeypatch):
    """Four devices in two processes."""

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    mesh = type('Mesh', (), {'devices': np.array([Device(i // 2) for i in range(4)])})
    shares = []
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        shares.append(processes.local_share(mesh, 64))
    assert [(s.start, s.size, s.whole) for s in shares] == [(0, 32, 64), (32, 32, 64)]


def test_seeds_have_63_bits():
    assert processes.seed_from_lead(2**63 - 1) == 2**63 - 1
    drawn = {processes.seed_from_lead(None) for _ in range(100)}
    assert len(drawn) == 100
    assert max(drawn) < 2**63
    assert max(drawn) > 2**60
