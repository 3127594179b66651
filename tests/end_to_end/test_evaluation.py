# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are evaluated alone and start other runs, ours and imported ones alike."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import harness
from tests.end_to_end import program as programs
from training import checkpointing, compilation, restoring

pytestmark = pytest.mark.slow


def run(program, *arguments, status=0, devices=1):
    done = programs.run(program, *arguments, devices=devices)
    assert done.returncode == status, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stderr if status else done.stdout


def newest(run) -> Path:
    return run.workdir / 'checkpoints' / str(max(run.steps()))


def test_evaluation_repeats_what_the_run_reported(reached, digits_dir, tmp_path):
    """Of the run's checkpoint, and of the same weights after a journey through PyTorch's form.

    On three devices too, among which the training batch of 256 cannot be shared out.
    """
    reported = reached.evaluated()[-1]
    run('scripts/convert_checkpoint.py', 'to-pytorch', newest(reached), tmp_path / 'w.safetensors')
    run('scripts/convert_checkpoint.py', 'from-pytorch', tmp_path / 'w.safetensors', tmp_path / 'w')
    before = sorted(tmp_path.rglob('*'))
    for checkpoint, devices in (newest(reached), 1), (newest(reached), 3), (tmp_path / 'w', 1):
        result = json.loads(run('main.py', '--mode=eval', f'--config.data_dir={digits_dir}',
                                f'--config.init_from={checkpoint}', devices=devices))  # fmt: skip
        assert result['examples'] == 360
        assert result['eval_top1'] == reported['eval_top1']
        assert result['eval_loss'] == pytest.approx(reported['eval_loss'], rel=1e-6)
    assert sorted(tmp_path.rglob('*')) == before


def test_wrong_checkpoints_are_rejected(reached, digits_dir, tmp_path):
    data = f'--config.data_dir={digits_dir}'
    assert '--config.init_from' in run('main.py', '--mode=eval', data, status=2)
    error = run('main.py', '--mode=eval', data, f'--config.init_from={tmp_path}', status=2)
    assert 'no checkpoint' in error
    error = run('main.py', '--mode=eval', data, f'--config.init_from={newest(reached)}',
                '--config.model=resnet18_cifar', status=2)  # fmt: skip
    assert 'another model' in error


@pytest.mark.parametrize('value', [np.nan, 1e38])
def test_a_checkpoint_that_has_diverged_is_no_result(reached, digits_dir, tmp_path, value):
    """Neither values that are not finite, nor such that only the loss is not."""
    tree, _ = checkpointing.read(newest(reached))
    kernel = np.array(tree['variables']['params']['fc']['kernel'])
    kernel[:] = np.where(np.indices(kernel.shape).sum(0) % 2, value, -value)
    tree['variables']['params']['fc']['kernel'] = kernel
    checkpointing.write(tmp_path / 'wild', tree, {})
    error = run('main.py', '--mode=eval', f'--config.data_dir={digits_dir}',
                f'--config.init_from={tmp_path / "wild"}', status=2)  # fmt: skip
    assert 'not finite' in error
    assert ('params/fc/kernel' if not np.isfinite(value) else 'eval_loss') in error


def test_an_imported_checkpoint_starts_a_run(reached, digits_dir, tmp_path):
    """With the imported head where the classes are as many, else with a new one."""
    tree, _ = checkpointing.read(newest(reached))
    ours = jax.tree.map(np.zeros_like, tree['variables'])
    checkpointing.write(
        tmp_path / 'imported', {'variables': tree['variables'], 'step': np.int32(0)}, {}
    )
    head = ('params', 'fc')
    path, mesh = tmp_path / 'imported', compilation.make_mesh()
    assert restoring.check_weights(path, ours, head) == []
    weights = restoring.weights(path, compilation.place(mesh, ours))
    assert harness.is_same(weights, tree['variables'])
    ours['params']['fc'] = {'kernel': np.zeros((256, 3), np.float32),
                            'bias': np.zeros(3, np.float32)}  # fmt: skip
    assert restoring.check_weights(path, ours, head) == ['params/fc/bias', 'params/fc/kernel']
    weights = restoring.weights(path, compilation.place(mesh, ours))
    assert harness.is_same(weights['params']['fc'], ours['params']['fc'])
    assert harness.is_same(weights['batch_stats'], tree['variables']['batch_stats'])
    programs.share_programs(tmp_path)
    run('main.py', f'--workdir={tmp_path / "second"}', f'--config.data_dir={digits_dir}',
        f'--config.init_from={tmp_path / "imported"}', '--config.target_top1=0.3')  # fmt: skip
