# SPDX-License-Identifier: Apache-2.0
"""What a work directory remembers of the run's starts."""

import dataclasses
import json

import pytest

import work_directory
from records import Dataset
from tests.harness import resolve

DATA = Dataset('digits', 'unused', 1437, 360, 10, digest='d1ce')


def environment(path):
    return json.loads((path / 'environment.json').read_text())


def test_earlier_environments_are_kept(tmp_path, monkeypatch):
    config = resolve('digits', 'unused', seed=1)
    work_directory.record(config, DATA, tmp_path)
    work_directory.record(config, DATA, tmp_path)
    assert 'earlier' not in environment(tmp_path)
    for commit in ('another', 'a third'):
        monkeypatch.setattr(work_directory, '_commit', lambda commit=commit: commit)
        work_directory.record(config, DATA, tmp_path)
    last = environment(tmp_path)
    assert last['commit'] == 'a third'
    assert [start['commit'] for start in last['earlier']][1:] == ['another']
    assert len(last['earlier']) == 2


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    config = resolve('digits', 'unused', seed=1)
    work_directory.record(config, dataclasses.replace(DATA, digest=None), tmp_path)
    work_directory.record(config, DATA, tmp_path)  # Known now: it has been verified meanwhile.
    before = (tmp_path / 'environment.json').read_text()
    with pytest.raises(work_directory.WorkDirectoryError, match='on other data: their digest is d'):
        work_directory.record(config, dataclasses.replace(DATA, digest='fade'), tmp_path)
    assert (tmp_path / 'environment.json').read_text() == before


def test_in_a_container_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert work_directory._commit() == 'unknown'
    monkeypatch.setenv('COMMIT', 'c0ffee')
    assert work_directory._commit() == 'c0ffee'
