# SPDX-License-Identifier: Apache-2.0
"""The configuration has MLPerf's rules and log keys."""

import json
import re
from pathlib import Path

import pytest

from settings import hyperparameters, loading
from settings.errors import ConfigError
from tests.workloads.llama31_8b.configurations import configure
from workloads import by_name

LOG = Path(__file__).parents[2] / 'golden' / 'llama31_8b' / 'log' / 'pass_all_three.txt'


def logged():
    """Values by key of a log that the official checker accepts."""
    lines = re.findall(r'^:::MLLOG (.*)$', LOG.read_text(), re.MULTILINE)
    return {event['key']: event['value'] for event in map(json.loads, lines)}


def test_what_is_logged_is_what_the_checker_accepts():
    accepted = logged()
    ours = hyperparameters.logged(configure(global_batch_size=accepted['global_batch_size'],
        learning_rate=accepted['opt_base_learning_rate'],
        end_learning_rate=accepted['opt_end_learning_rate'],
        warmup_steps=accepted['opt_learning_rate_warmup_steps'],
        decay_steps=accepted['opt_learning_rate_decay_steps']))  # fmt: skip
    of_hyperparameters = {k for k in accepted if k.startswith(('opt_', 'max_'))}
    assert of_hyperparameters <= ours.keys()
    for key in of_hyperparameters | {'global_batch_size'}:
        assert ours[key] == accepted[key], key


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'end_learning_rate': 1e-4}, '0.1 · learning_rate, 4e-05'),
        ({'learning_rate': 8e-4}, 'with learning_rate=0.0008 add --config.end_learning_rate'),
        ({'learning_rate': 0}, 'learning_rate=0.0 breaks the rule: > 0 and ≤ 1'),
        ({'global_batch_size': 32}, 'with global_batch_size=32 add --config.warmup_steps'),
        ({'warmup_steps': 17}, 'with warmup_steps=17 add --config.decay_steps'),
        ({'warmup_steps': 17, 'decay_steps': 17}, 'max_steps − warmup_steps, 1199983'),
        ({'warmup_steps': -1, 'decay_steps': 17}, 'warmup_steps=-1 breaks the rule: ≥ 0'),
        ({'optimizer': 'adam'}, 'one of adamw'),
        ({'beta_1': 0.95}, 'beta_1=0.95 breaks the rule: one of 0.9'),
        ({'beta_2': 0.999}, 'one of 0.95'),
        ({'epsilon': 1e-8}, 'one of 1e-05'),
        ({'weight_decay': 0.01}, 'one of 0.1'),
        ({'gradient_clip_norm': 2}, 'one of 1.0'),
        ({'sequence_length': 4096}, 'with sequence_length=4096 add --config.division=open'),
        ({'sequence_length': 8000}, 'sequence_length=8000 breaks the rule: a multiple of 128'),
        ({'target_loss': 3.4}, 'with target_loss=3.4 add --config.division=open'),
        ({'eval_samples': 512}, 'with eval_samples=512 add --config.division=open'),
        ({'decay_norms': True}, 'with decay_norms=True add --config.division=open'),
        ({'seed': 5}, '--config.seed=none'),
        ({'max_steps': 100}, 'max_steps − warmup_steps, 84'),
    ],
)
def test_what_breaks_a_rule_is_rejected(fields, said):
    with pytest.raises(ConfigError) as caught:
        configure(**fields)
    assert said in str(caught.value)


def test_the_open_division_takes_other_sizes():
    config = configure(division='open', sequence_length=128, max_steps=600, decay_steps=584, seed=1)
    assert config.decay_steps == 584


def test_the_committed_configurations_keep_the_rules():
    benchmark = by_name.configure(loading.load('configs/llama31_8b.py'), {})
    assert benchmark.division == 'closed'
    # The official reference point for this batch.
    assert (benchmark.global_batch_size, benchmark.learning_rate) == (32, 8e-4)
    assert benchmark.warmup_steps * benchmark.global_batch_size == 4096
    assert by_name.configure(loading.load('configs/speeches.py'), {}).division == 'open'
