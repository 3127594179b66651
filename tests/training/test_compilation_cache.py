# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept where all processes of a run see them, and only there."""

import jax

from tests.training.test_processes import launched
from training import compilation_cache


def test_the_next_start_finds_what_was_compiled(tmp_path):
    """Process 0 does; on CPUs, JAX has no name for a program that is the same in all processes."""
    for again in (False, True):
        status, said = launched('compiles', str(tmp_path / 'cache'))
        assert status == 0, said
        assert '[0] sum 6.0 hits ' in said
        assert ('[0] sum 6.0 hits 0' not in said) == again


def test_a_cache_that_not_all_processes_see_is_not_used(tmp_path):
    """As on machines without a common file system: one would find what others must compile."""
    status, said = launched('compiles', str(tmp_path / 'machine-{}'))
    assert status == 0, said
    assert all(f'[{i}] cache None' in said for i in range(2))
    assert 'not seen by all processes' in said
    assert not list(tmp_path.glob('machine-*/*'))


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch, capsys):
    changed = []
    monkeypatch.setattr(jax.config, 'update', lambda *change: changed.append(change))
    (tmp_path / 'file').touch()
    compilation_cache.keep(tmp_path / 'file' / 'cache')
    assert not changed
    assert 'cache cannot be written: compiled programs are not kept' in capsys.readouterr().out
    compilation_cache.keep(tmp_path / 'cache')
    assert changed == [('jax_compilation_cache_dir', str(tmp_path / 'cache'))]
    assert not list((tmp_path / 'cache').iterdir())
