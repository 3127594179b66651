# SPDX-License-Identifier: Apache-2.0
"""Logs of real runs: of several processes, resumed, aborted; and from seeds to a submission."""

import json

import pytest

from reporting import run_sets, verdicts
from scripts import make_rcps, report
from tests.end_to_end.conftest import EASY
from tests.end_to_end.program import run, share_programs

pytestmark = pytest.mark.slow


def test_a_run_that_misses_its_target_is_no_result(undisturbed):
    judged = run('scripts/judge_run.py', undisturbed.workdir)
    assert judged.returncode == 1
    assert 'MISSED' in judged.stdout


def test_seeds_make_a_report_and_a_checked_set(digits_dir, tmp_path, capsys):
    """Real files of two real runs go through every reader of them."""
    out = tmp_path / 'seeds'
    out.mkdir()
    fields = [f'--config.{name}={value}' for name, value in EASY.items()]
    arguments = ('--runs=2', f'--out={share_programs(out)}', f'--config.data_dir={digits_dir}')
    done = run('scripts/run_seeds.py', *arguments, *fields)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = run_sets.read_runs(out)
    assert run_sets.differences(runs) == []
    assert verdicts.seeds_differ([each.log for each in runs], '4.0.0')[0]
    assert report.main([str(out)]) == 0
    assert '2 of 2 runs' in (out / 'report.html').read_text()
    for each in runs:
        (logged,) = (event['value'] for event in each.events if event['key'] == 'seed')
        assert json.loads((each.directory / 'config.json').read_text())['seed'] == logged
    assert make_rcps.main([str(out)]) == 2
    assert 'at least 10' in capsys.readouterr().err
