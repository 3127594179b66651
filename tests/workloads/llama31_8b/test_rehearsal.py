# SPDX-License-Identifier: Apache-2.0
"""A rehearsal: the log of the benchmark's own configuration with losses that nobody has measured.

What writes it is what writes a run's; the official checker judges it by rules that are not changed.
"""

import json

import pytest

from reporting import verdicts
from tests import synthetic_runs
from tests.workloads.llama31_8b.configurations import EACH_RULESET, RULESETS

# The official curve of a submission at this batch, rounded.
LOSSES = [5.6, 4.5, 4.1, 3.9, 3.7, 3.6, 3.56, 3.5, 3.45, 3.41, 3.38, 3.34, 3.32, 3.29]


def rehearse(folder, losses, **fields):
    path = folder / 'rehearsal.log'
    synthetic_runs.write_log(path, synthetic_runs.resolve('llama31_8b', seed=1, **fields), losses)
    return path


@pytest.mark.parametrize('version', RULESETS)
def test_a_rehearsal_is_accepted_by_the_rules_as_they_stand(tmp_path, version):
    log = rehearse(tmp_path, LOSSES, ruleset=version)
    passed, said = verdicts.accepted(log, version)
    assert passed, said


@pytest.mark.parametrize('version', EACH_RULESET)
def test_one_that_does_not_meet_the_target_is_rejected_for_it(tmp_path, version):
    losses = [3.31] * (1_200_000 // 384)
    passed, said = verdicts.accepted(rehearse(tmp_path, losses, ruleset=version), version)
    assert not passed
    assert 'eval_accuracy' in said


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('max_steps', 1000),
        ('opt_adamw_beta_2', 0.999),
        ('max_sequence_length', 2048),
        ('eval_samples', 1056),
        ('tensor_parallelism', 0),
        ('lowest_numerical_precision_in_linear', 'bf16'),
    ],
)
def test_a_wrong_value_is_rejected(tmp_path, key, value):
    log = rehearse(tmp_path, LOSSES)
    lines = []
    for line in log.read_text().splitlines():
        head, _, text = line.partition(' ')
        event = json.loads(text)
        if event['key'] == key:
            event['value'] = value
        lines.append(f'{head} {json.dumps(event)}\n')
    log.write_text(''.join(lines))
    passed, said = verdicts.accepted(log, '6.1.0')
    assert not passed
    assert key in said
