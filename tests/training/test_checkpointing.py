# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit or not at all, and hold nothing about hardware."""

import errno
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import accumulation
import exact_sums
import train_lib
from models.llama.architectures import Architecture
from settings.errors import CheckpointError, SaveError
from tests import harness
from training import checkpointing, compilation, restoring
from training.checkpoint_saver import CheckpointSaver
from workloads.llama31_8b.task import LanguageModelling


def model_of(*, devices=1, task_type=harness.OneBlock, **overrides):
    config = harness.resolve('digits', 'nowhere', **overrides)
    plan = harness.plan_for(config, num_train=1437, num_eval=360, num_devices=devices)
    return harness.model_for(config, plan, task_type(config, 10))


def template(**kwargs):
    return train_lib.abstract_state(model_of(**kwargs))


def find(directory, model=None, devices=1):
    mesh = Mesh(np.array(jax.devices()[:devices]), (train_lib.AXIS,))
    return restoring.find(directory, model or model_of(), mesh)


def save(saver, step):
    saver.save(tree_at(step), checkpointing.signed({'step': step}, tree_at(step)))


def tree_at(step):
    """A tree as a run has it at a step, of arrays that differ from step to step."""
    rng = np.random.default_rng(step)
    tree = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(s.dtype),
        train_lib.to_saved(template()),
    )
    return tree | {'step': np.int32(step)}


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
    """A directory with checkpoints of steps 3 and 7."""
    directory = tmp_path_factory.mktemp('two')
    with_checkpoints(directory, lambda c: [save(c, s) for s in (3, 7)])
    return directory


def with_checkpoints(directory, use):
    """What `use` returns, and what was reported meanwhile."""
    reports = []
    checkpoints = CheckpointSaver(directory, reports.append)
    result = use(checkpoints)
    checkpoints.close()
    return result, reports


def restored(directory):
    """What is found, as a tree; and what is reported when the run then opens the directory."""
    found = find(directory)
    reports = []
    CheckpointSaver(directory, reports.append, found.damaged).close()
    return found.tree, reports


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


@pytest.mark.parametrize(
    'damage',
    ['flipped', *(pytest.param(d, marks=pytest.mark.slow) for d in ('truncated', 'deleted'))],
)
def test_a_damaged_file_costs_one_checkpoint_and_a_line(two_saved, tmp_path, damage, capfd):
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
        assert len(reports) == 1
        assert f'{directory / "7"} is damaged' in reports[0]
        assert (directory / 'damaged-7').is_dir()
    assert noticed
    assert capfd.readouterr() == ('', '')


def test_arrays_that_are_named_and_not_there_cost_a_line(two_saved, tmp_path, capfd):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    metadata = tmp_path / '7' / 'state' / '_METADATA'
    metadata.write_text(metadata.read_text().replace('"layer1_0"', '"layer9_0"'))
    tree, reports = restored(tmp_path)
    assert harness.is_same(tree, tree_at(3))
    assert 'it has no array' in reports[0]
    assert capfd.readouterr() == ('', '')


def test_looking_for_a_checkpoint_writes_nothing(two_saved, tmp_path):
    assert find(tmp_path / 'none').step == 0
    assert not (tmp_path / 'none').exists()
    shutil.copytree(two_saved, tmp_path / 'some')
    shutil.rmtree(tmp_path / 'some' / '7' / 'state')
    (tmp_path / 'some' / '9.orbax-checkpoint-tmp').mkdir()
    before = sorted(tmp_path.rglob('*'))
    found = find(tmp_path / 'some')
    assert found.step == 3
    assert [path.name for path, _ in found.damaged] == ['7']
    assert sorted(tmp_path.rglob('*')) == before


def test_a_half_written_checkpoint_is_not_used(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(two_saved / '7', tmp_path / '9.orbax-checkpoint-tmp')
    (tmp_path / '11').mkdir()
    tree, _ = restored(tmp_path)
    assert harness.is_same(tree, tree_at(7))
    # Orbax removes it in the background, and has done so when the next save begins.
    with_checkpoints(tmp_path, lambda c: save(c, 8))
    assert not (tmp_path / '9.orbax-checkpoint-tmp').exists()


def test_a_run_continues_to_save_after_a_damaged_checkpoint(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / '7' / 'state')

    restored(tmp_path)
    with_checkpoints(tmp_path, lambda c: save(c, 7))
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
    checkpoints = CheckpointSaver(tmp_path, reports.append)
    write = checkpoints._manager.save
    monkeypatch.setattr(
        checkpoints._manager, 'save', lambda *a, **k: may_write.wait(60) and write(*a, **k)
    )
    save(checkpoints, 1)
    assert not list(tmp_path.iterdir())
    may_write.set()
    assert checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ['1']
    assert not reports


def test_closing_says_whether_the_last_save_succeeded(tmp_path, monkeypatch, capfd):
    reports = []
    checkpoints = CheckpointSaver(tmp_path / 'good', reports.append)
    save(checkpoints, 1)
    assert checkpoints.close()
    checkpoints = CheckpointSaver(tmp_path / 'bad', reports.append)
    monkeypatch.setattr(os, 'posix_fallocate', full)
    save(checkpoints, 1)
    assert not checkpoints.close()
    assert reports == [f'a checkpoint could not be saved in {tmp_path / "bad"}: [Errno 28] full']
    assert not list((tmp_path / 'bad').iterdir())
    assert capfd.readouterr() == ('', '')


def full(*_):
    raise OSError(errno.ENOSPC, 'full')


def test_a_folder_that_is_gone_ends_the_run(tmp_path):
    checkpoints = CheckpointSaver(tmp_path / 'w' / 'checkpoints', print)
    shutil.rmtree(tmp_path / 'w')
    with pytest.raises(SaveError, match='is gone'):
        save(checkpoints, 1)
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_start_no_run(tmp_path, value):
    tree = tree_at(3)
    tree['variables']['params']['conv1']['kernel'][0, 0, 0, 0] = value
    checkpointing.write(tmp_path / '3', tree, {})
    with pytest.raises(CheckpointError, match='1 arrays .* params/conv1/kernel'):
        restoring.check_weights(tmp_path / '3', template().variables, ())


def test_a_checkpoint_of_before_fingerprints_is_reported(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(checkpointing, 'signed', lambda record, tree: dict(record))
        checkpointing.write(tmp_path / '3', tree_at(3), {})
    with pytest.raises(CheckpointError, match='of an earlier version of this program'):
        checkpointing.read(tmp_path / '3')


def test_it_is_an_error_when_none_is_whole(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for step in ('3', '7'):
        shutil.rmtree(tmp_path / step / 'state')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(CheckpointError, match='start again in a new'):
        find(tmp_path)
    assert sorted(tmp_path.rglob('*')) == before


def test_another_models_checkpoint_is_rejected(two_saved):
    with pytest.raises(CheckpointError, match='another model or optimizer'):
        find(two_saved, model_of(task_type=harness.TinyBottleneck))


def test_it_does_not_depend_on_devices_and_accumulation():
    described = [
        train_lib.to_saved(template(devices=devices, micro_batch_size=size))
        for devices, size in ((1, 256), (1, 32), (8, 32))
    ]
    assert described[0] == described[1] == described[2]


def test_a_state_survives_the_way_through_a_tree():
    tree = tree_at(5)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), template())
    state = train_lib.from_saved(tree, zeros)
    assert harness.is_same(train_lib.to_saved(state), tree)
    assert int(state.step) == 5
    assert not np.any(state.opt_state.mini_step)


def test_an_array_that_is_not_what_was_written_is_named(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / '7' / 'record' / 'metadata'
    record = json.loads(path.read_text())
    record['fingerprints']['variables/params/fc/kernel'] = '0' * 16
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match='variables/params/fc/kernel'):
        checkpointing.read(tmp_path / '7')
    with pytest.raises(CheckpointError, match='variables/params/fc/kernel'):
        restoring.check_weights(tmp_path / '7', template().variables, ())
    tree, reports = restored(tmp_path)
    assert harness.is_same(tree, tree_at(3))
    assert '1 of its arrays are not what was written' in reports[0]
    assert 'variables/params/fc/kernel' in reports[0]


@pytest.mark.parametrize('head', [(), ('params', 'fc')])
def test_weights_of_another_model_start_no_run(two_saved, head):
    other = template(task_type=harness.TinyBottleneck).variables
    with pytest.raises(CheckpointError, match='of another model'):
        restoring.check_weights(two_saved / '7', other, head)


def test_pieces_are_judged_as_the_whole(two_saved, monkeypatch):
    monkeypatch.setattr(checkpointing, 'PIECE', 100)
    assert restoring.check_weights(two_saved / '7', template().variables, ()) == []


def languages(devices):
    """A run's model whose state is split, and its mesh."""
    task = LanguageModelling(Architecture(2, 64, 160, 8, 2, 8, 512), 16, 'float32')
    optimizer = accumulation.accumulated(optax.adam(1e-3), 1, devices, task.split)
    mesh = Mesh(np.array(jax.devices()[:devices]), (train_lib.AXIS,))
    return train_lib.Model(task, optimizer, lambda step: 1e-3, devices), mesh


@pytest.mark.parametrize('numbers', [(8, 2), pytest.param((2, 8, 1, 4), marks=pytest.mark.slow)])
def test_parts_are_saved_and_found_on_another_number_of_devices(tmp_path, numbers):
    """Each device has its part from the start; the weights are the same for any number."""
    before = 0
    for devices in numbers:
        model, mesh = languages(devices)
        found = restoring.find(tmp_path, model, mesh)
        if found.tree is None:
            state = compilation.initial_state(5, model, mesh)
        else:
            state = compilation.resumed_state(found.tree, model, mesh)
        assert found.step == int(state.step) == before
        for name, x in exact_sums.named(state.variables):
            parts = devices if name in model.task.split else 1
            assert x.addressable_data(0).size * parts == x.size
        saved = train_lib.to_saved(state)
        fresh = compilation.initial_state(5, model, mesh)
        assert harness.is_same(saved['variables'], fresh.variables)
        before = devices
        saved = compilation.on_host(saved) | {'step': np.int32(devices)}
        shutil.rmtree(tmp_path)
        saver = CheckpointSaver(tmp_path, print)
        saver.save(saved, checkpointing.signed({}, jax.device_get(saved)))
        assert saver.close()


def test_what_is_on_the_host_stays_when_the_next_step_has_overwritten_the_state():
    model, mesh = languages(4)
    state = compilation.initial_state(5, model, mesh)
    before = jax.tree.map(np.array, train_lib.to_saved(state))
    held = compilation.on_host(train_lib.to_saved(state))
    negated = jax.jit(lambda t: jax.tree.map(jnp.negative, t), donate_argnums=0)
    jax.block_until_ready(negated(state.variables))
    assert harness.is_same(jax.tree.map(np.asarray, held), before)
