# SPDX-License-Identifier: Apache-2.0
"""What is legal and likely a mistake is said, and nothing else."""

import pytest

import main
from settings import hyperparameters, loading
from workloads.by_name import configure
from workloads.resnet import advice
from workloads.resnet.fields import ResNetConfig


def warnings(config, **overrides):
    base = loading.load(f'configs/{config}.py')
    texts = {name: str(value) for name, value in overrides.items()}
    return advice.warnings(base, texts, configure(base, texts))


def test_a_changed_batch_names_what_its_reference_point_uses():
    (text,) = warnings('imagenet', global_batch_size=8192)
    assert 'decay_steps=13137 are meant for global_batch_size=4096, not 8192' in text
    flags = [flag for flag in text.split() if flag.startswith('--config.')]
    assert '--config.decay_steps=6095' in flags
    assert '--config.learning_rate=17' in flags
    arguments = ['--workdir=w', '--config.global_batch_size=8192', *flags]
    _, overrides = main.parse_flags(arguments)
    base = loading.load('configs/imagenet.py')
    config = configure(base, overrides)
    assert advice.warnings(base, overrides, config) == []


def test_a_batch_without_a_reference_point_names_those_that_have_one():
    (text,) = warnings('imagenet', global_batch_size=2048)
    assert 'reference points exist for batches of 1632, 3264, 4096, 8192' in text


def test_elsewhere_the_steps_that_keep_the_epochs_are_named():
    (text,) = warnings('digits', global_batch_size=128, learning_rate=10)
    assert text.startswith('decay_steps=195 is meant for global_batch_size=256')
    assert text.endswith('390 steps')


@pytest.mark.parametrize(
    'overrides',
    [
        {},
        {'global_batch_size': 256},
        {'global_batch_size': 128, 'learning_rate': 9, 'decay_steps': 9},
    ],
)
def test_what_fits_is_not_warned_of(overrides):
    assert warnings('digits', **overrides) == []


def test_points_are_named_as_the_fields_are():
    assert set(advice.NAMES.values()) <= hyperparameters.table(ResNetConfig).keys()
    assert advice.reference_points()[4096]['decay_steps'] == 13137
