# SPDX-License-Identifier: Apache-2.0
"""Evaluations are where the rules want them."""

import pytest

from settings.errors import ConfigError
from settings.plan import make_plan
from tests.workloads.llama31_8b.configurations import configure
from workloads.llama31_8b import course


@pytest.mark.parametrize(
    ('batch', 'samples'), [(16, 12_288), (32, 12_288), (36, 12_312), (96, 12_288), (128, 12_288)]
)
def test_evaluations_follow_multiples_of_the_batch(batch, samples):
    config = configure(
        global_batch_size=batch, micro_batch_size=1, warmup_steps=16, learning_rate=4e-4,
        end_learning_rate=4e-5, decay_steps=1_199_984,
    )  # fmt: skip
    found = course.create(config)
    first, second, *_, last = found.evaluations
    assert first.step * batch == first.count == samples
    assert first.block_start == {'samples_count': 0}
    assert first.block_stop == first.result == second.block_start == {'samples_count': samples}
    assert second.result == {'samples_count': 2 * samples}
    assert last.step <= 1_200_000 < last.step + first.step


def test_the_target_itself_ends_a_run():
    target = course.create(configure()).target
    assert target.is_met(3.3)
    assert not target.is_met(3.3000001)
    assert not target.is_met(float('nan'))


def test_a_run_without_an_evaluation_is_rejected():
    config = configure(division='open', max_steps=20, warmup_steps=16, decay_steps=4)
    with pytest.raises(ConfigError, match='max_steps=20 end before the first evaluation, .* 768'):
        course.create(config)


def test_speed_is_told_in_tokens_and_as_a_part_of_the_peak():
    """MFU by the operations that the benchmark's network is known to need."""
    config = configure()
    plan = make_plan(config, course.create(config), num_train=10**6, num_eval=1024, num_devices=8)
    speed = plan.speed(0.1, peak=989e12)
    tokens = 0.1 * config.global_batch_size * 8192
    assert speed['throughput'] == pytest.approx(tokens)
    assert plan.course.throughput_unit == 'tokens/s'
    assert speed['mfu'] == pytest.approx(tokens * 57.9e9 / (8 * 989e12), rel=1e-3)
    assert plan.speed(0.1, peak=None).keys() == {'throughput'}
