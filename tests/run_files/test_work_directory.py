# SPDX-License-Identifier: Apache-2.0
"""What a work directory remembers of the run's starts, and which ones no run may use."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from run_files import machine, work_directory
from run_files.line_file import SaveError
from tests.harness import resolve
from workloads.resnet.records import Dataset

DATA = Dataset('digits', 'unused', 1437, 360, 10, digest='d1ce')


def environment(path):
    return json.loads((path / 'environment.json').read_text())


def test_earlier_environments_are_kept(tmp_path, monkeypatch):
    config = resolve('digits', 'unused', seed=1)
    work_directory.record(config, DATA, tmp_path)
    work_directory.record(config, DATA, tmp_path)
    assert 'earlier' not in environment(tmp_path)
    for commit in ('another', 'a third'):
        monkeypatch.setattr(work_directory, '_commit', lambda commit=commit: commit)
        work_directory.record(config, DATA, tmp_path)
    last = environment(tmp_path)
    assert last['commit'] == 'a third'
    assert [start['commit'] for start in last['earlier']][1:] == ['another']
    assert len(last['earlier']) == 2


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    config = resolve('digits', 'unused', seed=1)
    work_directory.record(config, dataclasses.replace(DATA, digest=None), tmp_path)
    work_directory.record(config, DATA, tmp_path)  # Known now: it has been verified meanwhile.
    before = (tmp_path / 'environment.json').read_text()
    with pytest.raises(work_directory.WorkDirectoryError, match='on other data: their digest is d'):
        work_directory.record(config, dataclasses.replace(DATA, digest='fade'), tmp_path)
    assert (tmp_path / 'environment.json').read_text() == before


def test_in_a_container_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert work_directory._commit() == 'unknown'
    monkeypatch.setenv('COMMIT', 'c0ffee')
    assert work_directory._commit() == 'c0ffee'


ROOT = Path(__file__).parents[2]


@pytest.fixture
def used(tmp_path):
    """The work directory of a run of seed 1, and what it opens it with."""
    (tmp_path / 'run').mkdir()
    work_directory.record(resolve('digits', 'unused', seed=1), DATA, tmp_path / 'run')
    return tmp_path / 'run', resolve('digits', 'unused')


def contents(path):
    return {p: p.is_file() and p.read_bytes() for p in sorted(path.rglob('*')) if p.name != 'lock'}


def rejection(path, config, data=DATA) -> str:
    """Why a work directory is rejected; nothing in it is changed by that."""
    before = contents(path)
    with pytest.raises(work_directory.WorkDirectoryError) as error:
        work_directory.open_for(config, data, path)
    assert contents(path) == before
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_run_that_resumes_keeps_its_seed(used):
    path, config = used
    assert work_directory.open_for(config, DATA, path) == 1


@pytest.mark.parametrize('seed', [None, '1', -1, 2**63, 1.0, True, [1], {}, 'missing'])
@pytest.mark.parametrize('given', [None, 1])
def test_a_seed_that_is_none_is_never_replaced_by_another(used, seed, given):
    path, _ = used
    values = json.loads((path / 'config.json').read_text()) | {'seed': seed}
    if seed == 'missing':
        del values['seed']
    (path / 'config.json').write_text(json.dumps(values))
    said = rejection(path, resolve('digits', 'unused', seed=given))
    assert '"seed" is ' in said
    assert '--workdir' in said


DAMAGES = {
    'empty': b'', 'cut': b'{"seed": 1, "mo', 'binary': bytes(range(256)), 'null': b'null',
    'a list': b'[{"seed": 1}]', 'a number': b'1', 'a text': b'"seed"', 'deep': b'[' * 100_000,
    'a flipped bit': b'\xfb"seed": 1}', 'zeros': bytes(900), 'nothing': b'{}',
}  # fmt: skip


@pytest.mark.parametrize('name', ['config.json', 'environment.json'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_is_named_with_what_to_do(used, name, damage):
    path, config = used
    (path / name).write_bytes(DAMAGES[damage])
    said = rejection(path, config)
    assert str(path / name) in said
    assert '--workdir' in said or 'remove it' in said


@pytest.mark.parametrize('dataset', [None, [], 'digits', 3], ids=['null', 'list', 'text', 'number'])
def test_an_environment_without_its_data_is_named(used, dataset):
    path, config = used
    (path / 'environment.json').write_text(json.dumps({'dataset': dataset}))
    assert 'remove it' in rejection(path, config)


def test_an_environment_that_was_removed_is_written_again(used):
    path, config = used
    (path / 'environment.json').unlink()
    assert work_directory.open_for(config, DATA, path) == 1
    work_directory.record(config, DATA, path)
    assert environment(path)['dataset']['digest'] == 'd1ce'


FILES = ('config.json', 'environment.json', 'mlperf.log', 'metrics.jsonl', 'lock')


@pytest.mark.parametrize('name', [*FILES, 'checkpoints', 'tensorboard', 'profile'])
def test_what_stands_in_the_place_of_a_file_or_folder_is_named(used, name):
    path, config = used
    (path / name).unlink(missing_ok=True)
    if name in FILES:
        (path / name).mkdir()
    else:
        (path / name).write_text('')
    assert str(path / name) in rejection(path, config)


@pytest.mark.parametrize('name', FILES)
def test_a_file_without_permission_is_named(used, name, monkeypatch):
    path, config = used
    (path / name).touch()
    access = os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: p != path / name and access(p, mode))
    assert f'{path / name} cannot be read and written' in rejection(path, config)


@pytest.mark.parametrize('stranger', ['thesis.tex', 'mlperf.log', 'checkpoints', '.hidden'])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, stranger):
    """Without config.json even a run's own files are those of nobody knows which run."""
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / stranger).write_text('')
    said = rejection(tmp_path / 'w', resolve('digits', 'unused'))
    assert stranger in said
    assert [entry.name for entry in (tmp_path / 'w').iterdir()] == [stranger]


def test_the_command_that_resumes_another_run_can_be_pasted(tmp_path):
    path = tmp_path / "a run's"
    work_directory.record(resolve('digits', 'unused', seed=1), DATA, path.parent)
    path.mkdir()
    work_directory.record(resolve('digits', 'unused', seed=1), DATA, path)
    said = rejection(path, resolve('digits', 'unused', seed=2))
    command = said.rpartition('resume that run: ')[2]
    shown = subprocess.run(
        ['bash', '-c', f"printf '%s\\n' {command}"], capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == [f'--config={path}/config.json', f'--workdir={path}']


def test_a_run_does_not_end_well_without_its_configuration(used):
    path, _ = used
    work_directory.check_still_there(path)
    for name in ('config.json', 'environment.json'):
        (path / name).unlink()
        with pytest.raises(SaveError, match=name):
            work_directory.check_still_there(path)


CPUINFO = """processor\t: 0
model name\t: AMD EPYC 9B45
cpu family\t: 26
model\t\t: 2
stepping\t: 1
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_bf16 amx_tile fma

processor\t: 1
model name\t: AMD EPYC 9B45
"""


def test_the_environment_describes_the_machine(monkeypatch, used):
    texts = {'/proc/cpuinfo': CPUINFO, '/proc/meminfo': 'MemTotal:  24696832 kB\n'}
    monkeypatch.setattr(machine, 'read', lambda path: texts.get(path, 'x'))
    gpu = {'name': 'NVIDIA H100', 'driver_version': '570.1'}
    monkeypatch.setattr(machine, 'gpus', lambda: [gpu, gpu])
    monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')
    monkeypatch.setenv('HOSTNAME', 'secret')
    path, _ = used
    work_directory.record(resolve('digits', 'unused', seed=1), DATA, path)
    found = environment(path)['machine']
    assert found['processor'] == 'AMD EPYC 9B45'
    assert found['processor_model'] == 'cpu family 26 model 2 stepping 1'
    assert found['instruction_sets'] == [
        'amx_tile', 'avx', 'avx2', 'avx512_bf16', 'avx512f', 'fma', 'sse4_2',
    ]  # fmt: skip
    assert all(cache == 'Lx x x' for cache in found['caches'])
    assert found['usable_cores'] == len(os.sched_getaffinity(0))
    assert found['cores'] >= found['usable_cores']
    assert found['memory'] == '24 GiB'
    assert found['gpus'] == ['NVIDIA H100'] * 2
    assert found['gpu_driver'] == '570.1'
    assert found['settings']['XLA_FLAGS'] == '--xla_a=1'
    assert 'secret' not in (path / 'environment.json').read_text()


def test_a_machine_that_tells_nothing_is_described(monkeypatch):
    monkeypatch.setattr(machine, 'read', lambda _: '')
    monkeypatch.setenv('PATH', '')
    found = machine.describe({})
    assert found['gpus'] == []
    assert found['memory'] == found['processor'] == ''
    assert json.dumps(found)


def test_a_setting_that_the_log_already_holds_is_named(used):
    """It decides nothing, but a log of two systems would be rejected at its end."""
    path, _ = used
    assert "org: 'reference' there, 'us' here" in rejection(path, resolve('digits', 'x', org='us'))
