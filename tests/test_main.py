# SPDX-License-Identifier: Apache-2.0
"""The command line: what it means, and that nonsense is one clear error with status 2."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import main
from settings import command_line, hyperparameters, loading
from settings.errors import ConfigError
from workloads.by_name import configure
from workloads.resnet.fields import ResNetConfig

ROOT = Path(__file__).resolve().parents[1]


def rejected(capsys, *arguments):
    """What a rejected command line prints, without usage."""
    with pytest.raises(SystemExit) as ended:
        main.parse_flags(list(arguments))
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith('error: ')
    assert text.count('\n') == 1
    return text


def checked(capsys, *arguments):
    """Status and words of the program where it only judges."""
    status = main.main([*arguments, '--mode=check'])
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--seed=1'], 'did you mean --config.seed=VALUE?'),
        (['--cpus', '2'], '--cpus=N is for scripts/run_and_time.sh'),
        (['--bogus'], 'unknown argument --bogus'),
        ([], '--workdir=DIR is required'),
        (['--workdir=w', '--profile=5'], "'5' is not START:STOP"),
        (['--workdir=w', '--profile=9:3'], 'not START:STOP'),
        (['--workdir=w', '--profile=5:5'], 'not START:STOP'),
        (['--workdir=w', '--profile=-1:3'], 'not START:STOP'),
        (['--workdir=w', '--profile=a:b'], 'not START:STOP'),
        (['--workdir=w', '--mode=evaluate'], 'invalid choice'),
        (['--workdir=w', '--num_processes=two'], 'invalid int value'),
    ],
)
def test_an_argument_that_is_not_known_is_one_line_with_what_was_meant(capsys, arguments, words):
    assert words in rejected(capsys, *arguments)


@pytest.mark.parametrize('rest', [[], ['--workdir=w']])
def test_a_field_without_a_value_takes_no_other_argument_for_one(capsys, rest):
    assert main.main(['--config.drop_page_cache', *rest]) == 2
    said = capsys.readouterr().err
    assert said == 'error: --config.drop_page_cache needs a value: --config.drop_page_cache=VALUE\n'


def test_a_field_takes_its_value_to_the_letter():
    _, overrides = main.parse_flags([
        '--workdir=w', '--config.org=--', '--config.platform', 'a b', '--config.seed=',
    ])  # fmt: skip
    assert overrides == {'org': '--', 'platform': 'a b', 'seed': ''}


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('def get_config(): return None', 'returned NoneType'),
        ('def get_config(): return [1]', 'returned list'),
        ('def get_config(): return "text"', 'returned str'),
        ('def get_config(): raise SystemExit(0)', 'SystemExit'),
        ('import sys; sys.exit(0)', 'SystemExit'),
        ('def get_config(): return {1: 2}', 'benchmark is missing'),
        ("def get_config(): return {1: 2, 'benchmark': 'resnet'}", 'unknown hyperparameter 1'),
        ('get_config = 5', 'not callable'),
        ('x = 5', 'get_config'),
        ('syntax error', 'SyntaxError'),
        ('\0', 'null byte'),
    ],
)
def test_a_file_that_is_no_configuration_is_rejected(capsys, tmp_path, text, words):
    file = tmp_path / 'mine.py'
    file.write_text(text)
    status, said = checked(capsys, f'--config={file}')
    assert status == 2
    assert words in said


@pytest.mark.parametrize('name', ['x' * 300, 'a\0b', '', '/', 'configs', '~nobody/x.py'])
def test_a_name_of_no_file_is_rejected(capsys, name):
    status, said = checked(capsys, f'--config={name}')
    assert status == 2
    assert (
        'no such file; there are configs/cifar10.py, configs/cifar10_small.py, configs/digits'
        in said
    )


@pytest.mark.parametrize(
    'text', ['', '[]', '{', '{"seed": }', '{"momentum": 1e999}', '"x"', '\x00', '{"a": [' * 500]
)
def test_a_json_file_that_is_no_configuration_is_rejected(capsys, tmp_path, text):
    file = tmp_path / 'config.json'
    file.write_text(text)
    status, said = checked(capsys, f'--config={file}')
    assert status == 2
    assert said.startswith('error: ')


def test_a_json_configuration_is_taken_directly(capsys, tmp_path):
    config = configure(loading.load('configs/digits.py'), {'seed': '5'})
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(dataclasses.asdict(config)))
    assert configure(loading.load(str(file)), {}) == config
    assert checked(capsys, f'--config={file}', '--config.seed=none') == (0, '')


def test_the_benchmark_has_a_configuration_for_each_optimizer(capsys):
    for optimizer in ('lars', 'sgd'):
        config = configure(loading.load(f'configs/imagenet.py:{optimizer}'), {})
        assert config.optimizer == optimizer
        assert config.division == 'closed'
    status, said = checked(capsys, '--config=configs/imagenet.py:adam')
    assert status == 2
    assert 'not one of lars, sgd' in said


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--config.seed=1', 'or --config.seed=none, with which a run that resumes keeps its own'),
        ('--config.optimizer=sgd', 'with optimizer=sgd add --config.learning_rate=VALUE'),
        ('--config.init_from=x', 'with init_from=x add --config.division=open'),
    ],
)
def test_the_closed_division_is_kept(capsys, flag, words):
    status, said = checked(capsys, '--config=configs/imagenet.py', flag)
    assert status == 2
    assert words in said


def test_an_evaluation_does_not_ask_which_division_a_training_was_of(capsys, tmp_path):
    status = main.main([
        '--mode=eval', '--config=configs/imagenet.py', '--config.init_from=x',
        f'--config.data_dir={tmp_path}',
    ])  # fmt: skip
    assert status == 2
    assert 'imagenet2012 is not in' in capsys.readouterr().err


def test_steps_to_trace_are_steps_of_the_run():
    command_line.check_profile(None, 10)
    command_line.check_profile((3, 10), 10)
    with pytest.raises(ConfigError, match='the run has 10, counted from 0'):
        command_line.check_profile((3, 11), 10)


def test_without_the_environment_the_program_says_how_to_get_it():
    done = subprocess.run(
        [sys.executable, '-S', '-I', ROOT / 'main.py', '--help'], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No module named 'run_files'")
    assert f'source {ROOT}/.venv/bin/activate' in done.stderr


NASTY = (
    '', ' ', '--', 'none', 'None', 'nan', 'inf', '-inf', '1e308', '1e-320', '-1', '0', '1', '2.5',
    '1e5', str(2**31), str(2**63), '9' * 400, '9' * 5000, 'true', 'x', '\0', 'a\nb', '\udcff',
    '１２', '[]', '~nobody', '/', 'é' * 3000,
)  # fmt: skip


def assert_resolved_or_named(base, overrides, changed):
    """Either the configuration is taken, or the error names a field that was changed."""
    error = None
    try:
        configure(base, overrides)
    except ConfigError as caught:
        error = str(caught)
    assert error is None or any(name in error for name in changed), (changed, error)


def test_no_value_of_any_field_is_a_traceback(capsys):
    """Alone, and some together: judged whole, within moments."""
    names = list(hyperparameters.table(ResNetConfig))
    draw = random.Random(0)
    trials = [{name: value} for name in names for value in NASTY]
    trials += [{n: draw.choice(NASTY) for n in draw.sample(names, 3)} for _ in range(1000)]
    base = loading.load('configs/digits.py')
    for overrides in trials:
        assert_resolved_or_named(base, overrides, overrides)


def test_no_value_of_any_type_in_a_file_is_a_traceback():
    values = (None, True, -1, 0, 2**70, 10**400, -1.5, 1e308, '', 'x', b'x', [], {}, (1,), object())
    names = list(hyperparameters.table(ResNetConfig))
    draw = random.Random(1)
    base = dict(loading.load('configs/digits.py'))
    trials = [{name: value} for name in names for value in values]
    trials += [{n: draw.choice(values) for n in draw.sample(names, 4)} for _ in range(1000)]
    for changes in trials:
        assert_resolved_or_named(base | changes, {}, changes)


def test_scripts_judge_arguments_before_anything_is_prepared(tmp_path, own_environment):
    environment = os.environ | own_environment | {'JAX_PLATFORMS': 'cpu'}
    for arguments in (
        ['--config.momentum=3'],
        ['--gpus=0'],
        ['--gpus=1', '--cpus=1'],
        ['--bogus'],
        ['configs/digits.py', 'configs/cifar10.py'],
        ['--config=-rf'],
        ['--workdir'],
        ['--mode=eval'],
    ):
        done = subprocess.run(
            [
                ROOT / 'scripts' / 'run_and_time.sh',
                *arguments,
                f'--config.data_dir={tmp_path}/data',
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith('error: ')
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('visible', 'processes'), [(None, 2), pytest.param('0,1,4', 3, marks=pytest.mark.slow)]
)
def test_every_gpu_of_a_machine_has_a_process(tmp_path, own_environment, visible, processes):
    """With a driver that names two GPUs; that they cannot be used is the launcher's error."""
    driver = tmp_path / 'bin' / 'nvidia-smi'
    driver.parent.mkdir()
    driver.write_text('#!/bin/sh\nfor i in 0 1; do echo "GPU $i: NVIDIA (UUID: GPU-$i)"; done\n')
    driver.chmod(0o755)
    path = f'{driver.parent}:{os.environ["PATH"]}'
    environment = os.environ | own_environment | {'PATH': path}
    if visible:
        environment['CUDA_VISIBLE_DEVICES'] = visible
    done = subprocess.run(
        [ROOT / 'scripts' / 'run_and_time.sh', f'--config.data_dir={tmp_path}/data'],
        cwd=tmp_path,
        env=environment | {'JAX_PLATFORMS': ''},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = {line[:3] for line in done.stdout.splitlines() if 'A GPU was asked for' in line}
    assert said == {f'[{i}]' for i in range(processes)}
