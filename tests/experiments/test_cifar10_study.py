# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 configurations hold together, and the reduced one learns from the JPEGs."""

import importlib
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_preparation import cifar10 as preparation
from settings import hyperparameters
from tests import harness
from workloads.resnet import optimizers
from workloads.resnet.fields import ResNetConfig

ROOT = Path(__file__).parents[2]
SIZES = {'num_train': 50_000, 'num_eval': 10_000}


def resolved(name, *arguments, **overrides):
    config = importlib.import_module(f'configs.{name}').get_config(*arguments)
    return hyperparameters.resolve(ResNetConfig, config, {k: str(v) for k, v in overrides.items()})


@pytest.mark.parametrize('spec', [('cifar10',), ('cifar10', 'sgd'), ('cifar10_small',)])
def test_the_learning_rate_reaches_its_end_with_the_last_epoch(spec):
    config = resolved(*spec)
    warmup_steps = optimizers.warmup_steps(config, SIZES['num_train'])
    assert warmup_steps + config.decay_steps == harness.plan_for(config, **SIZES).total_steps


@pytest.mark.parametrize('micro_steps', [1, 4, 16])
def test_the_batch_accumulates_as_the_study_asks(micro_steps):
    config = resolved('cifar10', micro_batch_size=512 // micro_steps)
    assert harness.plan_for(config, **SIZES).accumulation_steps == micro_steps


def test_the_decoded_training_set_fits_its_budget_of_memory():
    config = resolved('cifar10')
    gib = 50_000 * 3 * 32**2 / 2**30
    assert gib <= config.cache_gib


@pytest.mark.parametrize('wrong', ['--smal', '--dtype=float16'])
def test_the_study_refuses_what_it_does_not_know(wrong):
    command = [ROOT / 'experiments' / 'study_cifar10.sh', wrong]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert wrong in ended.stderr


@pytest.mark.slow
def test_the_reduced_configuration_learns_from_the_jpegs(tmp_path, cifar10_jpeg):
    preparation.prepare(tmp_path, cifar10_jpeg)
    config = harness.resolve('cifar10_small', tmp_path, seed=1, warmup_epochs=0.05, decay_steps=80)
    losses = [m['loss'] for m in harness.train(config, steps=100).measured()]
    assert np.mean(losses[:5]) > 0.9 * math.log(10)  # It starts by guessing one of ten.
    assert np.mean(losses[-20:]) < 0.9 * math.log(10)
