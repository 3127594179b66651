# SPDX-License-Identifier: Apache-2.0
"""Every fault of a configuration is found, at once, and said with its rule."""

import dataclasses
import importlib
import json

import pytest

import main
from models.resnet.architectures import ARCHITECTURES
from settings import hyperparameters, loading
from settings.errors import ConfigError
from workloads.by_name import configure as resolve
from workloads.resnet.fields import ResNetConfig

TABLE = hyperparameters.table(ResNetConfig)
CONFIGS = ('digits', 'cifar10', 'cifar10_small', 'imagenet')


def load(name):
    return importlib.import_module(f'configs.{name}').get_config()


def fault(overrides, name='imagenet'):
    with pytest.raises(ConfigError) as caught:
        resolve(load(name), overrides)
    return str(caught.value)


@pytest.mark.parametrize('name', CONFIGS)
def test_committed_configurations_are_good_and_complete(name):
    config = resolve(load(name), {})
    assert type(config) is ResNetConfig
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_model_names_are_those_of_the_models():
    assert TABLE['model'].rule.words == 'one of ' + ', '.join(ARCHITECTURES)


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        ({'global_batch_size': 'many'}, "global_batch_size='many' is not of type int"),
        ({'global_batch_size': '0'}, 'global_batch_size=0 breaks the rule: > 0'),
        ({'weight_decay': '0.0003'}, 'weight_decay=0.0003 breaks the rule: 0.0001·2^N'),
        ({'momentum': '0.95'}, 'momentum=0.95 breaks the rule: 0.9'),
        ({'optimizer': 'sgd', 'learning_rate': '0.0105'}, 'multiple of 0.001'),
        ({'optimizer': 'sgd', 'warmup_epochs': '2.5'}, 'for SGD an integer'),
        ({'optimizer': 'adam'}, "optimizer='adam' breaks the rule: one of lars, sgd"),
        ({'decay_steps': '0'}, 'decay_steps=0 breaks the rule'),
        ({'bn_span': '60'}, 'bn_span=60 breaks the rule: > 0 and divides micro_batch_size'),
        ({'micro_batch_size': '48'}, 'divides global_batch_size (global_batch_size=4096)'),
        ({'label_smoothing': '0.2'}, 'one of 0.0, 0.1'),
        ({'eval_offset_epochs': '4'}, '0, 1, 2 or 3'),
        ({'max_epochs': '50'}, 'an epoch that is evaluated; nearest that are: 48, 52'),
        ({'target_top1': '75.9'}, 'in (0, 1)'),
        ({'target_top1': '0.3'}, 'with target_top1=0.3 add --config.division=open'),
        ({'init_from': 'x', 'image_size': '64'}, 'with image_size=64, init_from=x add --config'),
        ({'division': 'half'}, "division='half' breaks the rule: open; or closed"),
        ({'end_learning_rate': '0.001'}, 'one of 0.0001'),
        ({'lars_epsilon': '1e-7'}, 'one of 0.0'),
        ({'dtype': 'tf32'}, 'one of float32'),
        ({'seed': '-1'}, 'in [0, 2^63)'),
        ({'deterministic': 'maybe'}, "deterministic='maybe' is not of type bool"),
        ({'learning_rate': 'nan'}, 'learning_rate=nan is not of type float'),
        ({'learning_rat': '1'}, 'unknown hyperparameter learning_rat; did you mean learning_rate?'),
        ({'momentum': 'none'}, "momentum='none' is not of type float"),
        ({'optimizer': 'sgd'}, 'learning_rate=10.0 is given for optimizer=lars'),
        ({'optimizer': 'sgd', 'learning_rate': '1e-10'}, 'for SGD a multiple of 0.001'),
        ({'optimizer': 'sgd', 'learning_rate': '1e-300'}, 'for SGD a multiple of 0.001'),
        ({'learning_rate': '1e308'}, 'learning_rate=1e+308 breaks the rule: > 0 and ≤ 1e+06'),
        ({'weight_decay': '1e308'}, 'weight_decay=1e+308 breaks the rule'),
        ({'warmup_epochs': '1e308'}, 'warmup_epochs=1e+308 breaks the rule'),
        ({'decay_steps': str(2**31)}, 'decay_steps=2147483648 breaks the rule'),
        ({'max_epochs': '2000000000'}, 'at most 10000 and an epoch that is evaluated'),
        ({'image_size': '100000'}, 'image_size=100000 breaks the rule: > 0 and ≤ 2048'),
        ({'org': ''}, "org='' breaks the rule: not empty"),
        ({'platform': 'a\nb'}, 'not empty, on one line'),
        ({'data_dir': ''}, "data_dir='' breaks the rule: a path"),
        ({'init_from': 'a\0b'}, 'breaks the rule: a path'),
        ({'seed': '5'}, 'with seed=5 add --config.division=open, or --config.seed=none'),
    ],
)
def test_an_error_names_field_value_and_rule(overrides, words):
    assert words in fault(overrides)


def test_all_errors_are_reported_at_once():
    overrides = {'weight_decay': '0.0003', 'momentum': '0.5', 'bn_spam': '3', 'seed': 'x'}
    text = fault(overrides)
    for name in overrides:
        assert name in text
    assert text.count('\n') == len(overrides)


def test_a_benchmark_that_is_not_here_is_rejected():
    base = load('digits')
    for change in ({'benchmark': 'chess'}, {'benchmark': None}):
        with pytest.raises(ConfigError, match='it is one of: resnet'):
            resolve(dict(base) | change, {})


def test_a_missing_field_is_reported():
    base = load('digits')
    del base['momentum']
    with pytest.raises(ConfigError, match='momentum is missing'):
        resolve(base, {})


@pytest.mark.parametrize(
    'overrides',
    [
        {'weight_decay': '2.5e-05'},
        {'weight_decay': '0.0512'},
        {'global_batch_size': '65536', 'momentum': '0.951807'},
        {'optimizer': 'sgd', 'learning_rate': '0.017', 'decay_steps': '0'},
        {'max_epochs': '49', 'eval_offset_epochs': '1'},
        {'seed': str(2**63 - 1), 'division': 'open'},
        {'optimizer': 'sgd', 'learning_rate': '10'},
        {'truncated_init': 'false'},
        {'weight_decay': '1e-4'},
        {'micro_batch_size': '512'},
    ],
)
def test_legal_values_pass(overrides):
    resolve(load('imagenet'), overrides)


def test_flags_win_over_json_and_json_round_trips(tmp_path):
    path = tmp_path / 'config.json'
    config = resolve(load('digits'), {'seed': '5', 'learning_rate': '3.5'})
    path.write_text(json.dumps(dataclasses.asdict(config)))
    again = resolve(loading.load(str(path)), {'seed': '6'})
    assert again == dataclasses.replace(config, seed=6)


def test_every_field_has_a_flag():
    arguments = ['--workdir=w']
    arguments += [f'--config.{name}=1' for name in TABLE]
    _, overrides = main.parse_flags(arguments)
    assert overrides == dict.fromkeys(TABLE, '1')


def test_unknown_configuration_flags_are_judged_not_ignored():
    _, overrides = main.parse_flags(['--workdir=w', '--config.learning_rte=3'])
    assert overrides == {'learning_rte': '3'}


@pytest.mark.parametrize('optimizer', ['lars', 'sgd'])
def test_logged_hyperparameters_are_those_in_use(optimizer):
    config = resolve(load('imagenet'), {'optimizer': optimizer, 'learning_rate': '0.4'})
    lines = hyperparameters.logged(config)
    other = {'lars': 'sgd', 'sgd': 'lars'}[optimizer]
    assert not any(key.startswith(f'{other}_') for key in lines)
    assert lines['opt_name'] == optimizer
    assert lines[f'{optimizer}_opt_base_learning_rate'] == config.learning_rate
    assert lines['model_bn_span'] == 64


def test_hardware_is_no_difference_between_runs():
    ours = resolve(load('digits'), {'data_processes': '2', 'data_threads': '3'})
    assert hyperparameters.differences(ours, dataclasses.asdict(resolve(load('digits'), {}))) == []
    theirs = resolve(load('digits'), {'learning_rate': '1'})
    assert len(hyperparameters.differences(ours, dataclasses.asdict(theirs))) == 1
