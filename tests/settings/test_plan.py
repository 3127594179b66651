# SPDX-License-Identifier: Apache-2.0
"""The run's arithmetic: B = G·D·k, and evaluations after the batch that ends an epoch."""

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
def test_only_accumulation_depends_on_the_devices(num_devices):
    one, other = plan(), plan(num_devices)
    assert num_devices * 64 * other.accumulation_steps == 4096
    for field in ('evaluations', 'target', 'global_batch_size', 'total_steps', 'micro_batches'):
        assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize(
    ('batch', 'span', 'epochs', 'warmup', 'decay'),
    [(4096, 64, 47, 5, 13137), (1632, 204, 37, 2, 27476), (3264, 204, 39, 2, 14523)],
)
def test_official_points_fit_whole_epochs(batch, span, epochs, warmup, decay):
    assert decay == epochs * N_TRAIN // batch - warmup * N_TRAIN // batch
    fields = {'warmup_epochs': warmup, 'decay_steps': decay, 'micro_batch_size': span}
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
    with pytest.raises(ConfigError, match='64 micro-batches .* over 6 .*: 1, 2, 4, 8, 16, 32, 64'):
        plan(num_devices=6)
    with pytest.raises(ConfigError, match='larger than the training set of 1437'):
        plan(name='digits', num_train=1437, global_batch_size=2048)


def test_a_run_of_too_many_steps_is_rejected_at_once():
    with pytest.raises(ConfigError, match='200,182,344 steps, more than 100,000,000'):
        plan(max_epochs=10_000, global_batch_size=64, division='open')
