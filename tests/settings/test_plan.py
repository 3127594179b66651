# SPDX-License-Identifier: Apache-2.0
"""The run's arithmetic: B = D·M·k, and evaluations after the batch that ends an epoch."""

import math

import pytest

from settings.errors import ConfigError
from tests import harness
from workloads.resnet import optimizers

N_TRAIN, N_EVAL = 1_281_167, 50_000


def plan(num_devices=1, num_train=N_TRAIN, num_eval=N_EVAL, name='imagenet', **overrides):
    config = harness.resolve(name, 'nowhere', **overrides)
    return harness.plan_for(config, num_train=num_train, num_eval=num_eval, num_devices=num_devices)


@pytest.mark.parametrize('num_devices', [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize('accelerator', ['v100-16gb', 'v100-32gb', 'a100', 'h200'])
def test_only_micro_steps_depend_on_hardware(num_devices, accelerator):
    one, other = plan(), plan(num_devices, accelerator=accelerator)
    assert other.num_devices * other.per_device_batch * other.accumulation_steps == 4096
    assert other.per_device_batch % 64 == 0
    for field in ('evaluations', 'target', 'global_batch_size', 'total_steps'):
        assert getattr(one, field) == getattr(other, field)


def test_accelerators_differ_in_the_per_device_batch():
    sizes = [plan(accelerator=a).per_device_batch for a in ('v100-16gb', 'v100-32gb', 'h200')]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ('batch', 'span', 'epochs', 'warmup', 'decay'),
    [(4096, 64, 47, 5, 13137), (1632, 204, 37, 2, 27476), (3264, 204, 39, 2, 14523)],
)
def test_official_points_fit_whole_epochs(batch, span, epochs, warmup, decay):
    assert decay == epochs * N_TRAIN // batch - warmup * N_TRAIN // batch
    fields = {'warmup_epochs': warmup, 'decay_steps': decay, 'accelerator': 'a100'}
    config = harness.resolve('imagenet', 'x', global_batch_size=batch, bn_span=span, **fields)
    assert optimizers.warmup_steps(config, N_TRAIN) == warmup * math.ceil(N_TRAIN / batch)
    assert harness.plan_for(config, num_train=N_TRAIN).global_batch_size == batch


@pytest.mark.parametrize('offset', [0, 1, 2, 3])
def test_evaluations_follow_the_batch_that_ends_the_epoch(offset):
    made = plan(eval_offset_epochs=offset, max_epochs=40 + offset)
    epochs = [evaluation.count for evaluation in made.evaluations]
    assert epochs == [e for e in range(1, 41 + offset) if e % 4 == offset]
    for evaluation in made.evaluations:
        assert (evaluation.step - 1) * 4096 < evaluation.count * N_TRAIN <= evaluation.step * 4096
    firsts = [evaluation.block_start['first_epoch_num'] for evaluation in made.evaluations]
    assert firsts == [1, *(epoch + 1 for epoch in epochs[:-1])]


def test_a_batch_that_does_not_fit_tells_what_does():
    with pytest.raises(ConfigError, match='nearest that are: 3840, 4224'):
        plan(num_devices=6)
    with pytest.raises(ConfigError, match='those that fit: 64, 128, 256, 512, 1024, 2048, 4096'):
        plan(per_device_batch=192)
    with pytest.raises(ConfigError, match='larger than the training set of 1437'):
        plan(name='digits', num_train=1437, global_batch_size=2048)


def test_a_span_that_a_device_does_not_hold_is_reported():
    with pytest.raises(ConfigError, match='more than the 64 examples that such a device holds'):
        plan(global_batch_size=4080, bn_span=204)
    assert plan(global_batch_size=4080, bn_span=204, per_device_batch=204).per_device_batch == 204


def test_a_run_of_too_many_steps_is_rejected_at_once():
    with pytest.raises(ConfigError, match='200,182,344 steps, more than 100,000,000'):
        plan(max_epochs=10_000, global_batch_size=64, division='open')
