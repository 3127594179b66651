# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit or not at all, and hold nothing about hardware."""

import shutil
import threading

import jax
import numpy as np
import pytest

import checkpointing
import optimizers
import plan
import train_lib
from image_classification import ImageClassification
from tests import harness


def template(*, devices=1, per_device_batch=None, **overrides):
    config = harness.resolve('digits', 'nowhere', per_device_batch=per_device_batch, **overrides)
    numbers = plan.make_plan(config, num_train=1437, num_eval=360, num_devices=devices)
    task, optimizer = ImageClassification(config, 10), optimizers.create(config, numbers)
    return jax.eval_shape(
        lambda key: train_lib.create_train_state(key, task, optimizer), jax.random.key(0)
    )


def tree_at(step):
    """A tree as a run has it at a step, of arrays that differ from step to step."""
    rng = np.random.default_rng(step)
    tree = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(s.dtype),
        checkpointing.to_tree(template()),
    )
    return tree | {'step': np.int32(step)}


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
    """A directory with checkpoints of steps 3 and 7."""
    directory = tmp_path_factory.mktemp('two')
    with_checkpoints(directory, lambda c: [c.save(tree_at(s), {'step': s}) for s in (3, 7)])
    return directory


def with_checkpoints(directory, use):
    """What `use` returns, and what was reported meanwhile."""
    reports = []
    checkpoints = checkpointing.Checkpoints(directory, reports.append)
    result = use(checkpoints)
    checkpoints.close()
    return result, reports


def restored(directory):
    return with_checkpoints(directory, lambda c: c.restore(template()))


def test_the_newest_comes_back_bit_for_bit(two_saved):
    tree, reports = restored(two_saved)
    assert harness.is_same(tree, tree_at(7))
    assert not reports
    assert checkpointing.read(two_saved / '7')[1]['step'] == 7


def test_an_empty_directory_has_none(tmp_path):
    assert restored(tmp_path / 'new') == (None, [])


def test_no_more_than_two_are_kept(tmp_path):
    with_checkpoints(tmp_path, lambda c: [c.save(tree_at(s), {}) for s in (1, 2, 3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {'flipped': flip, 'truncated': truncate, 'deleted': lambda file: file.unlink()}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_costs_one_checkpoint_and_is_reported(two_saved, tmp_path, damage):
    """Each file of the newest in turn. One that nothing depends on may be damaged unnoticed."""
    files = [f for f in (two_saved / '7').rglob('*') if f.is_file() and f.stat().st_size]
    noticed = 0
    for i, file in enumerate(files):
        directory = tmp_path / str(i)
        shutil.copytree(two_saved, directory)
        DAMAGES[damage](directory / file.relative_to(two_saved))
        tree, reports = restored(directory)
        if not reports:
            assert harness.is_same(tree, tree_at(7)), file
            continue
        noticed += 1
        assert harness.is_same(tree, tree_at(3)), file
        assert f'{directory / "7"} is damaged' in reports[0]
        assert (directory / 'damaged-7').is_dir()
    assert noticed


def test_a_half_written_checkpoint_is_not_used(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(two_saved / '7', tmp_path / '9.orbax-checkpoint-tmp')
    (tmp_path / '11').mkdir()
    tree, _ = restored(tmp_path)
    assert harness.is_same(tree, tree_at(7))
    assert not (tmp_path / '9.orbax-checkpoint-tmp').exists()


def test_a_run_goes_on_saving_after_a_damaged_checkpoint(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / '7' / 'state')

    def go_on(checkpoints):
        checkpoints.restore(template())
        checkpoints.save(tree_at(7), {'step': 7})

    with_checkpoints(tmp_path, go_on)
    tree, reports = restored(tmp_path)
    assert harness.is_same(tree, tree_at(7))
    assert not reports


def test_the_same_step_may_be_damaged_twice(two_saved, tmp_path):
    for _ in range(2):
        shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
        (tmp_path / '7' / 'state' / '_METADATA').write_text('no JSON')
        tree, _ = restored(tmp_path)
        assert harness.is_same(tree, tree_at(3))
    assert (tmp_path / 'damaged-7').is_dir()
    assert (tmp_path / 'damaged-7-2').is_dir()


def test_a_save_returns_before_anything_is_written(tmp_path, monkeypatch):
    may_write, reports = threading.Event(), []
    checkpoints = checkpointing.Checkpoints(tmp_path, reports.append)
    write = checkpoints._manager.save
    monkeypatch.setattr(
        checkpoints._manager, 'save', lambda *a, **k: may_write.wait(60) and write(*a, **k)
    )
    checkpoints.save(tree_at(1), {})
    assert not list(tmp_path.iterdir())
    may_write.set()
    assert checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ['1']
    assert not reports


def test_closing_says_whether_the_last_save_landed(tmp_path):
    reports = []
    checkpoints = checkpointing.Checkpoints(tmp_path / 'good', reports.append)
    checkpoints.save(tree_at(1), {})
    assert checkpoints.close()
    checkpoints = checkpointing.Checkpoints(tmp_path / 'bad', reports.append)
    shutil.rmtree(tmp_path / 'bad')
    (tmp_path / 'bad').write_text('in the way')
    checkpoints.save(tree_at(1), {})
    checkpoints.wait()
    (tmp_path / 'bad').unlink()
    (tmp_path / 'bad').mkdir()
    assert not checkpoints.close()
    assert 'could not be saved' in reports[0]


def test_it_is_an_error_when_none_is_whole(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for step in ('3', '7'):
        shutil.rmtree(tmp_path / step / 'state')
    with pytest.raises(checkpointing.CheckpointError, match='start again in an empty'):
        restored(tmp_path)


def test_another_models_checkpoint_is_refused(two_saved):
    with pytest.raises(checkpointing.CheckpointError, match='another model or optimizer'):
        with_checkpoints(
            two_saved, lambda c: c.restore(template(model='resnet18_cifar', image_size=32))
        )


def test_it_does_not_depend_on_devices_and_accumulation():
    described = [
        checkpointing.to_tree(template(devices=devices, per_device_batch=batch))
        for devices, batch in ((1, 128), (1, 16), (8, 16))
    ]
    assert described[0] == described[1] == described[2]


def test_a_state_survives_the_way_through_a_tree():
    tree = tree_at(5)
    state = checkpointing.from_tree(tree, template(per_device_batch=16))
    assert harness.is_same(checkpointing.to_tree(state), tree)
    assert int(state.step) == 5
    assert not np.any(state.opt_state.mini_step)


def test_the_checksum_sees_names_shapes_and_bits():
    tree = {'a': np.arange(6, dtype=np.float32), 'b': np.zeros(2, np.int32)}
    others = [
        {'a': tree['a'], 'c': tree['b']},
        {'a': tree['a'].reshape(2, 3), 'b': tree['b']},
        {'a': np.nextafter(tree['a'], 9, dtype=np.float32), 'b': tree['b']},
        {'a': tree['a'], 'b': tree['b'].astype(np.int64)},
    ]
    sums = {checkpointing.checksum(t) for t in (tree, *others)}
    assert len(sums) == 5
