# SPDX-License-Identifier: Apache-2.0
"""Submissions: the official checkers accept the tree; what is missing is named beforehand."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from reporting import run_sets, system_description
from scripts import package_submission
from tests.synthetic_runs import curve, plan_of, resolve, write_run, write_runs

DETAILS = {'org': 'us', 'platform': 'desk'}
EPOCHS = [10, 11, 10, 12, 11]


@pytest.fixture(scope='module')
def commit() -> str:
    """The commit that the tests run from."""
    command = ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip('this is no git checkout')
    return done.stdout.strip()


@pytest.fixture
def runs(tmp_path, commit):
    """Five runs of digits."""
    return write_runs(tmp_path / 'runs', resolve('digits', **DETAILS), EPOCHS, commit=commit)


def package(directory, *, org='us', system='desk', more=()) -> int:
    return package_submission.main([str(directory), f'--org={org}', f'--system={system}', *more])


def rejection(capsys, *arguments, **flags) -> str:
    assert package(*arguments, **flags) == 2
    return capsys.readouterr().err


def test_official_checkers_accept_the_tree(runs, capsys):
    assert package(runs) == 0
    minutes = sorted(run.seconds / 60 for run in run_sets.read_runs(runs))[1:-1]
    assert minutes[0] > 0.5
    assert f'accepted, result {sum(minutes) / 3:.3f} minutes' in capsys.readouterr().out
    tree = runs / 'submission' / 'us'
    results = sorted((tree / 'results/desk/resnet').iterdir())
    assert [path.name for path in results] == [f'result_{i}.txt' for i in range(5)]
    for path, run in zip(results, sorted(runs.glob('0*')), strict=True):
        assert path.read_bytes() == (run / 'mlperf.log').read_bytes()
    code = tree / 'benchmarks/resnet/implementations/desk-jax'
    assert (code / 'main.py').is_file()
    assert json.loads((code / 'run_config.json').read_text())['seed'] is None
    assert not [path for path in tree.rglob('*') if path.name.startswith('.')]


@pytest.mark.parametrize(
    ('name', 'counts', 'change'),
    [
        ('llama31_8b', [172_032, 184_320], False),
        ('speeches', [8_000, 8_800], True),  # Open: the official rules want a loss below 1.
    ],
)
def test_ten_runs_that_are_judged_by_a_loss_are_a_result(
    tmp_path, commit, capsys, name, counts, change
):
    runs = write_runs(tmp_path / 'runs', resolve(name, **DETAILS), 5 * counts, commit=commit)
    assert package(runs) == 0
    said = capsys.readouterr().out
    assert ('with a change of their rules' in said) == change
    tree = runs / 'submission' / 'us'
    assert len(list((tree / 'results/desk/llama31_8b').glob('result_*.txt'))) == 10
    code = tree / 'benchmarks/llama31_8b/implementations/desk-jax'
    assert json.loads((code / 'run_config.json').read_text())['model'] == resolve(name).model


@pytest.mark.slow
@pytest.mark.parametrize(('epochs', 'status'), [([40, 40, 40, 44, 40], 0), ([32] * 5, 1)])
def test_closed_imagenet_results_are_held_against_the_official_points(
    tmp_path, commit, capsys, epochs, status
):
    config = resolve('imagenet', division='closed', **DETAILS)
    runs = write_runs(tmp_path / 'runs', config, epochs, commit=commit)
    assert package(runs) == status
    assert ('RCP Test Failed' in capsys.readouterr().out) == bool(status)


def test_what_is_missing_is_named_at_once(tmp_path, commit, capsys):
    config = resolve('digits', **DETAILS)
    runs = write_runs(tmp_path / 'runs', config, EPOCHS[:2], commit=commit)
    for number in (3, 4):
        missed = [0.5] * len(plan_of(config).evaluations)
        write_run(runs / f'{number:03}', config, missed, commit=commit)
    said = rejection(capsys, runs, org='them', system='laptop')
    assert '4 runs are there, and it takes at least 5' in said
    assert '2 of 4 runs missed their target (003, 004)' in said
    assert '--config.org=them' in said
    assert '--config.platform=laptop' in said
    assert not (runs / 'submission').exists()


def test_one_run_may_miss_the_target(tmp_path, commit):
    config = resolve('digits', **DETAILS)
    runs = write_runs(tmp_path / 'runs', config, EPOCHS[:4], commit=commit)
    write_run(runs / '005', config, [0.5] * len(plan_of(config).evaluations), commit=commit)
    chosen = package_submission.choose(run_sets.read_runs(runs), 'us', 'desk')
    assert sum(not run.reached for run in chosen) == 1


def test_results_are_not_chosen(runs, commit):
    """Of more than five runs the first are taken, not the fastest."""
    config = resolve('digits', **DETAILS)
    write_run(runs / '006', config, curve(config, 2), commit=commit)
    chosen = package_submission.choose(run_sets.read_runs(runs), 'us', 'desk')
    assert [run.directory.name for run in chosen] == ['001', '002', '003', '004', '005']


def test_mixed_runs_are_rejected(runs, commit, capsys):
    config = resolve('digits', learning_rate=7.5, **DETAILS)
    write_run(runs / '006', config, curve(config, 2), commit=commit)
    assert 'not of one experiment' in rejection(capsys, runs)


def test_tree_that_is_there_is_left_alone(runs, capsys):
    (runs / 'submission' / 'us').mkdir(parents=True)
    assert 'is there already' in rejection(capsys, runs)


def test_code_that_git_does_not_know_is_rejected(tmp_path, commit, capsys):
    runs = write_runs(tmp_path / 'runs', resolve('digits', **DETAILS), EPOCHS, commit='0' * 40)
    assert 'cannot be copied' in rejection(capsys, runs)


def test_system_of_other_runs_is_not_described_from_this_machine(runs, capsys):
    for path in runs.glob('*/environment.json'):
        environment = json.loads(path.read_text()) | {'device_kind': 'NVIDIA H200'}
        path.write_text(json.dumps(environment))
    assert 'another machine' in rejection(capsys, runs)


def test_description_is_of_this_machine(runs):
    run = run_sets.read_runs(runs)[0]
    found = system_description.describe(run.config, run.environment)
    assert int(found['host_processor_vcpu_count']) == os.cpu_count()
    gibibytes = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
    assert abs(float(found['host_memory_capacity'].split()[0]) - gibibytes) <= 1
    assert found['accelerators_per_node'] == '0'
    assert found['framework'] == 'JAX 0.10.2'
    assert 'numpy 2.4.6' in found['other_software_stack']
    assert found['status'] == 'Research, Development, or Internal (RDI)'


def test_processors_of_two_sockets():
    cpuinfo = '\n\n'.join(
        f'processor\t: {n}\nmodel name\t: CPU X\ncpu MHz\t\t: 2000.000\n'
        f'physical id\t: {n // 4}\ncore id\t\t: {n % 2}'
        for n in range(8)
    )
    assert system_description.processors(cpuinfo) == {
        'host_processors_per_node': '2',
        'host_processor_model_name': 'CPU X',
        'host_processor_core_count': '2',
        'host_processor_vcpu_count': '8',
        'host_processor_frequency': '2000.000 MHz',
    }
