# SPDX-License-Identifier: Apache-2.0
"""Fingerprints tell states apart, and scripts/compare_runs.py the step at which runs part."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fingerprints
from scripts import compare_runs, fingerprint
from training import checkpointing

AXIS = 'data'


@pytest.fixture
def tree():
    """What a checkpoint may hold."""
    rng = np.random.default_rng(0)
    return {
        'variables': {'params': {'fc': rng.standard_normal((16, 5)).astype(np.float32)}},
        'opt_state': {'trace': rng.standard_normal(64).astype(jax.numpy.bfloat16)},
        'loss_scale': {'value': np.float32(2.0)},
        'step': np.int32(12),
    }


def test_devices_find_the_fingerprint_that_a_host_finds(tree):
    expected = fingerprints.of_host_arrays(tree)
    program = jax.jit(fingerprints.of)
    assert program(tree).tolist() == expected
    mesh = Mesh(np.array(jax.devices()[:8]), (AXIS,))
    spread, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))
    split = jax.tree.map(lambda x: jax.device_put(x, spread if np.size(x) > 1 else whole), tree)
    assert program(split).tolist() == expected


def lowest_bit(tree):
    """Of one weight."""
    tree['variables']['params']['fc'].view(np.uint32)[3, 2] ^= 1


def sign_of_zero(tree):
    """A zero where there was one, of the other sign."""
    fc = tree['variables']['params']['fc']
    fc[0, 0] = -0.0 if not np.signbit(fc[0, 0]) else 0.0


def swapped(tree):
    """Two weights."""
    fc = tree['variables']['params']['fc']
    fc[0, 0], fc[0, 1] = fc[0, 1], fc[0, 0]


def renamed(tree):
    """An array."""
    tree['opt_state']['v'] = tree['opt_state'].pop('trace')


def reshaped(tree):
    """An array, with the same elements."""
    tree['opt_state']['trace'] = tree['opt_state']['trace'].reshape(8, 8)


def another_dtype(tree):
    """An array, with the same bits."""
    tree['step'] = tree['step'].view(np.float32)


def next_step(tree):
    """The step alone."""
    tree['step'] = np.int32(13)


@pytest.mark.parametrize(
    'change',
    [lowest_bit, sign_of_zero, swapped, renamed, reshaped, another_dtype, next_step],
)
def test_any_change_is_another_fingerprint(tree, change):
    before = fingerprints.of_host_arrays(tree)
    assert fingerprints.of_host_arrays(copy.deepcopy(tree)) == before
    change(tree)
    assert fingerprints.of_host_arrays(tree) != before


def test_a_checkpoint_and_a_work_directory_are_read(tree, tmp_path, capsys):
    for step in (12, 5):
        path = tmp_path / 'run' / 'checkpoints' / str(step)
        checkpointing.write(path, tree | {'step': np.int32(step)}, {'step': step})
    expected = fingerprints.shown(fingerprints.of_host_arrays(tree))
    assert fingerprint.main([str(tmp_path / 'run' / 'checkpoints' / '12')]) == 0
    assert capsys.readouterr().out.split()[:3] == [expected, 'step', '12']
    assert fingerprint.main([str(tmp_path / 'run')]) == 0
    assert capsys.readouterr().out.startswith(expected)
    assert fingerprint.main([str(tmp_path)]) == 2
    assert 'is no checkpoint' in capsys.readouterr().err


CONFIG = {'benchmark': 'resnet', 'learning_rate': 1.0, 'data_threads': None}
ENVIRONMENT = {'versions': {'jax': '1'}, 'machine': {'processor': 'x'}, 'commit': 'c', 'starts': 1}


@pytest.fixture
def two_runs(tmp_path):
    """Work directories with the same records of steps 10 (a loss), 12 (an evaluation) and 20."""
    lines = [
        {'step': 10, 'loss': 0.5, 'step_loss': 0.25},
        {'step': 12, 'eval_loss': 0.5, 'fingerprint': 'a' * 16},
        {'step': 20, 'loss': 0.5, 'step_loss': 0.125},
    ]
    for name in 'AB':
        (tmp_path / name).mkdir()
        write(tmp_path / name, lines)
        (tmp_path / name / 'config.json').write_text(json.dumps(CONFIG))
        (tmp_path / name / 'environment.json').write_text(json.dumps(ENVIRONMENT))
    return tmp_path / 'A', tmp_path / 'B', lines


def write(workdir, lines):
    (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))


def test_runs_that_are_the_same_as_far_as_both_have_come(two_runs, capsys):
    ours, theirs, lines = two_runs
    # A window since a resumed start, and another machine, are no difference.
    write(theirs, [*lines[:2], lines[2] | {'loss': 0.75}, {'step': 30, 'step_loss': 1.0}])
    assert compare_runs.main([str(ours), str(theirs)]) == 0
    assert 'the same run in all 3 records of both, up to step 20' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('line', 'change', 'said'),
    [
        (0, {'step_loss': 0.26}, 'different at once; at step 10 step_loss is 0.25 and 0.26'),
        (1, {'fingerprint': 'b' * 16}, 'the same up to step 10; at step 12 fingerprint is aaaa'),
        (2, {'step_loss': 0.126}, 'the same up to step 12; at step 20 step_loss is'),
    ],
)
def test_runs_part_at_the_first_record_that_differs(two_runs, capsys, line, change, said):
    ours, theirs, lines = two_runs
    lines[line] |= change
    write(theirs, lines)
    (theirs / 'config.json').write_text(
        json.dumps(CONFIG | {'learning_rate': 2.0, 'data_threads': 3})
    )
    (theirs / 'environment.json').write_text(
        json.dumps(ENVIRONMENT | {'versions': {'jax': '2'}, 'starts': 9})
    )
    assert compare_runs.main([str(ours), str(theirs)]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert [text.strip() for text in out.splitlines()[1:]] == [
        'learning_rate: 1.0, 2.0',
        "versions.jax: '1', '2'",
    ]


@pytest.mark.parametrize('content', [None, '', 'no JSON', '{"step": 1, "loss": 2}'])
def test_what_cannot_be_compared_is_an_error(two_runs, capsys, content):
    ours, theirs, _ = two_runs
    if content is None:
        shutil.rmtree(theirs)
    else:
        (theirs / 'metrics.jsonl').write_text(content)
    assert compare_runs.main([str(ours), str(theirs)]) == 2
    assert 'error: ' in capsys.readouterr().err


def test_runs_without_a_common_step_are_an_error(two_runs, capsys):
    ours, theirs, _ = two_runs
    write(theirs, [{'step': 11, 'step_loss': 1.0}])
    assert compare_runs.main([str(ours), str(theirs)]) == 2
    assert 'nothing at the same step' in capsys.readouterr().err
