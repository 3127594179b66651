# SPDX-License-Identifier: Apache-2.0
"""A run has the fingerprint that is known for its machine and versions."""

import json

import pytest

from experiments import known_fingerprints
from run_files import machine


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_the_fingerprint_is_the_known_one(digits_dir, dtype):
    why = 'none is known for {}; `python experiments/known_fingerprints.py --record` adds it'
    if not known_fingerprints.has_machine():
        pytest.skip(why.format(known_fingerprints.described(machine.describe())))
    ours = known_fingerprints.found(dtype, digits_dir)
    expected = known_fingerprints.known(ours)
    if expected is None:
        pytest.skip(why.format(ours))
    assert ours['fingerprint'] == expected


def test_another_machine_has_no_known_fingerprint(tmp_path, monkeypatch):
    entry = {'dtype': 'float32', 'caches': ['L1 32K'], 'fingerprint': 'a'}
    monkeypatch.setattr(known_fingerprints, 'TABLE', tmp_path / 'table.json')
    (tmp_path / 'table.json').write_text(json.dumps([entry]))
    assert known_fingerprints.known(entry | {'fingerprint': 'b'}) == 'a'
    assert known_fingerprints.known(entry | {'caches': ['L1 48K']}) is None
    assert not known_fingerprints.has_machine()
    ours = known_fingerprints.described(machine.describe())
    (tmp_path / 'table.json').write_text(json.dumps([entry, entry | ours]))
    assert known_fingerprints.has_machine()
