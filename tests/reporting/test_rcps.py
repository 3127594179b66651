# SPDX-License-Identifier: Apache-2.0
"""Reference convergence points: the official checker uses ours, and mixed runs make none."""

import json
import re
import shutil

import pytest

from reporting.verdicts import converges_as, official
from scripts import make_rcps
from tests.synthetic_runs import COMMIT, curve, plan_of, resolve, write_run, write_runs

EPOCHS = [10, 11, 10, 12, 11, 10, 11, 11, 9, 10]


@pytest.fixture
def runs(tmp_path):
    """Ten runs of digits."""
    return write_runs(tmp_path / 'runs', resolve('digits', platform='desk'), EPOCHS)


def rejection(capsys, *arguments) -> str:
    assert make_rcps.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_official_checker_accepts_our_runs_and_rejects_faster_ones(tmp_path, runs):
    assert make_rcps.main([str(runs)]) == 0
    folder = tmp_path / 'result'
    for epochs, expected in (([10, 11, 10, 12, 11], True), ([8, 8, 9, 8, 8], False)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        fresh = write_runs(tmp_path / f'runs-{expected}', resolve('digits'), epochs)
        for number, run in enumerate(sorted(fresh.iterdir())):
            shutil.copy(run / 'mlperf.log', folder / f'result_{number}.txt')
        passed, text = official(
            'rcp_checker', folder, '--rcp_version', '4.0.0', '--custom_rcps', runs / 'rcps.json'
        )
        assert passed == expected, text
        assert 'RCP found' in text
        # The same question, asked from Python.
        points = json.loads((runs / 'rcps.json').read_text())
        assert converges_as(sorted(folder.iterdir()), points, '4.0.0')[0] == expected


def test_point_says_what_was_run(runs):
    assert make_rcps.main([str(runs), '--creator', 'us']) == 0
    (name, point), *others = json.loads((runs / 'rcps.json').read_text()).items()
    assert not others
    config = resolve('digits')
    assert name == 'resnet_ref_256'
    assert point['Benchmark'] == 'resnet'
    assert point['Creator'] == 'us'
    assert 'desk' in point['Platform']
    assert point['BS'] == config.global_batch_size
    assert point['Epochs to converge'] == EPOCHS
    assert point['Code version'] == COMMIT
    assert point['Data']['digest'] == 'd1ce'
    hyperparameters = point['Hyperparams']
    assert hyperparameters['model_bn_span'] == config.bn_span
    assert hyperparameters['lars_opt_base_learning_rate'] == config.learning_rate
    assert 'seed' not in hyperparameters
    assert 'submission_org' not in hyperparameters


def test_statistics_are_the_official_ones(runs):
    """Fastest and slowest are dropped from the mean alone."""
    assert make_rcps.main([str(runs)]) == 0
    point = json.loads((runs / 'rcps.json').read_text())['resnet_ref_256']
    middle = sorted(EPOCHS)[1:-1]
    assert point['RCP Mean'] == pytest.approx(sum(middle) / len(middle))
    mean = sum(EPOCHS) / len(EPOCHS)
    variance = sum((e - mean) ** 2 for e in EPOCHS) / len(EPOCHS)
    assert point['RCP Stdev'] == pytest.approx(variance**0.5, abs=1e-4)
    assert point['Min Epochs'] < point['RCP Mean']


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'overrides': {'learning_rate': 7.9}}, 'hyperparameter learning_rate: 7.9'),
        ({'overrides': {'bn_span': 8}}, 'hyperparameter bn_span: 8'),
        ({'overrides': {'label_smoothing': 0.0}}, 'hyperparameter label_smoothing'),
        ({'commit': 'd' * 40}, 'code version: ' + 'd' * 40),
        ({'digest': 'other'}, 'data: .*other'),
        ({'seed': 1000}, 'the same seed 1000'),
    ],
)
def test_runs_of_another_experiment_are_rejected(tmp_path, capsys, change, named):
    runs = write_runs(tmp_path / 'runs', resolve('digits'), EPOCHS)
    write_run(runs / '011', resolve('digits'), curve(resolve('digits'), 10), seed=1000)
    config = resolve('digits', **change.pop('overrides', {}))
    write_run(runs / '012', config, curve(config, 10), **change)
    said = rejection(capsys, runs)
    assert '012' in said
    assert re.search(named, said)
    assert not (runs / 'rcps.json').exists()


def test_what_is_about_the_machine_or_the_paperwork_may_differ(tmp_path):
    runs = write_runs(tmp_path / 'runs', resolve('digits'), EPOCHS[:9])
    config = resolve('digits', data_processes=1, data_threads=3, org='they', data_dir='/else')
    write_run(runs / '010', config, curve(config, 10))
    assert make_rcps.main([str(runs)]) == 0


def test_unstable_recipe_makes_no_point(runs, capsys):
    config = resolve('digits')
    write_run(runs / '011', config, [0.5] * len(plan_of(config).evaluations))
    assert '1 of 11 runs' in rejection(capsys, runs)


def test_unfinished_run_is_named(runs, capsys):
    write_run(runs / '011', resolve('digits'), [0.5])
    assert '011/mlperf.log cannot be used: it is not whole' in rejection(capsys, runs)


def test_few_runs_or_uncommitted_code_make_no_point(tmp_path, capsys):
    few = write_runs(tmp_path / 'few', resolve('digits'), EPOCHS[:9])
    assert 'at least 10' in rejection(capsys, few)
    for commit in (f'{COMMIT}-dirty', 'unknown'):
        runs = write_runs(tmp_path / commit, resolve('digits'), EPOCHS, commit=commit)
        assert 'Commit the code' in rejection(capsys, runs)
    (tmp_path / 'empty').mkdir()
    assert 'there are no runs' in rejection(capsys, tmp_path / 'empty')


def test_two_batches_make_one_file(tmp_path, runs):
    config = resolve('digits', global_batch_size=64)
    others = write_runs(tmp_path / 'others', config, [e - 1 for e in EPOCHS])
    assert make_rcps.main([str(runs), str(others), '--out', str(tmp_path / 'both.json')]) == 0
    points = json.loads((tmp_path / 'both.json').read_text())
    assert {point['BS'] for point in points.values()} == {64, 256}
