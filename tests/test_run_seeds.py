# SPDX-License-Identifier: Apache-2.0
"""Many seeds: finished runs are kept, broken ones repeated, the rest refused with a reason.

The training program is replaced by one that writes a run's files at once, or does what the file
BEHAVIOUR in the folder of the runs says for that run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import run_seeds
from tests.synthetic_runs import curve, resolve, write_run

ROOT = Path(__file__).parent.parent
PROGRAM = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.synthetic_runs import curve, plan_of, resolve, write_run
flags = dict(a[2:].split('=', 1) for a in sys.argv[1:])
workdir = Path(flags.pop('workdir'))
flags.pop('config')
config = resolve('digits', **{{k.removeprefix('config.'): v for k, v in flags.items()}})
behaviour = json.loads((workdir.parent / 'BEHAVIOUR').read_text()).get(workdir.name, 'reach')
print(f'run {{workdir.name}} will {{behaviour}}', flush=True)
if (workdir / 'config.json').exists():
    sys.exit(2)
if behaviour == 'wait':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
if behaviour == 'fail':
    sys.exit(3)
if behaviour == 'refuse':
    print('error: the data set is missing', file=sys.stderr)
    sys.exit(2)
missed = [0.5] * len(plan_of(config).evaluations)
write_run(workdir, config, missed if behaviour == 'miss' else curve(config, 5),
          seed=int.from_bytes(os.urandom(7)))
sys.exit(1 if behaviour == 'miss' else 0)
"""


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Calls run_seeds on a folder of runs, each with a behaviour by name; (status, folder)."""
    program, out = tmp_path / 'program', tmp_path / 'out'
    program.mkdir()
    out.mkdir()
    (program / 'main.py').write_text(PROGRAM)
    monkeypatch.setattr(run_seeds, 'ROOT', program)

    def call(*arguments, **behaviours):
        names = {name.removeprefix('run_'): value for name, value in behaviours.items()}
        (out / 'BEHAVIOUR').write_text(json.dumps(names))
        return run_seeds.main([f'--out={out}', '--jobs=2', *arguments]), out

    return call


def test_every_run_has_its_own_seed_and_finished_ones_are_kept(seeds, capsys):
    status, out = seeds('--runs=2')
    assert status == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob('*/mlperf.log')}
    assert len(before) == 2
    status, out = seeds('--runs=3')
    assert status == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    drawn = {json.loads(path.read_text())['seed'] for path in out.glob('*/config.json')}
    assert len(drawn) == 3
    assert '3/3 runs, 3 reached the target' in capsys.readouterr().out


def test_run_that_missed_its_target_is_a_result_and_is_kept(seeds, capsys):
    assert seeds('--runs=2', run_002='miss')[0] == 1
    assert seeds('--runs=2')[0] == 1
    assert '1 missed it' in capsys.readouterr().out


def test_failed_run_is_tried_again_next_time(seeds):
    assert seeds('--runs=2', run_001='fail')[0] == 3
    assert seeds('--runs=2')[0] == 0


def test_damaged_work_directory_is_set_aside_and_repeated(seeds):
    _, out = seeds('--runs=2')
    (out / '002' / 'mlperf.log').write_text('no log')
    assert seeds('--runs=2')[0] == 0
    assert (out / '002.damaged-1' / 'mlperf.log').read_text() == 'no log'
    assert 'run_stop' in (out / '002' / 'mlperf.log').read_text()


def test_fault_of_all_runs_ends_at_once_with_its_words(seeds, capsys):
    assert seeds('--runs=50', run_001='refuse', run_002='refuse')[0] == 2
    assert 'the data set is missing' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--config.seed=3'], 'draws its own seed'),
        (['--config.momentum=2'], 'breaks the rule'),
        (['--config=none.py'], 'no such file'),
        (['--config.learning_rate=7'], 'another configuration'),
    ],
)
def test_refusals(seeds, capsys, arguments, words):
    _, out = seeds('--runs=1')
    before = sorted(out.iterdir())
    assert seeds('--runs=2', *arguments)[0] == 2
    assert words in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_sigterm_lets_the_runs_save_and_end(tmp_path):
    program, out = tmp_path / 'program', tmp_path / 'out'
    program.mkdir()
    out.mkdir()
    (program / 'main.py').write_text(PROGRAM)
    (out / 'BEHAVIOUR').write_text(json.dumps({'001': 'wait', '002': 'wait'}))
    text = (
        f'import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path;'
        f'from scripts import run_seeds; run_seeds.ROOT = Path({str(program)!r});'
        f'sys.exit(run_seeds.main(["--runs=2", "--jobs=2", "--out={out}"]))'
    )
    process = subprocess.Popen([sys.executable, '-c', text], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not all(
        path.exists() and 'will wait' in path.read_text()
        for path in (out / '001.txt', out / '002.txt')
    ):
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert 'the same command goes on' in said


def test_finished_reads_what_a_run_left(tmp_path):
    config = resolve('digits')
    write_run(tmp_path / 'a', config, curve(config, 4))
    assert run_seeds.finished(tmp_path / 'a', config) == 0
    assert run_seeds.finished(tmp_path / 'none', config) is None
