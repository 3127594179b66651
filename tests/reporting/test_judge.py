# SPDX-License-Identifier: Apache-2.0
"""Scripts about finished runs: a result says how it came about, and nonsense ends in one error."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reporting import finished_run, page, run_sets, verdicts
from run_files import work_directory
from scripts import (
    convert_checkpoint,
    judge_run,
    make_rcps,
    package_submission,
    report,
    run_seeds,
)
from settings import hyperparameters
from settings.hyperparameters import Config
from tests.synthetic_runs import curve, plan_of, resolve, write_run, write_runs
from workloads.resnet.records import Dataset

SCRIPTS = {
    'judge': judge_run.main,
    'report': report.main,
    'rcps': make_rcps.main,
    'package': lambda arguments: package_submission.main(
        [*arguments, '--org=reference', '--system=unknown']
    ),
}
CONVERSIONS = {
    'to-pytorch': lambda arguments: convert_checkpoint.main(
        ['to-pytorch', *arguments, f'{arguments[0]}-out.safetensors']
    ),
    'from-pytorch': lambda arguments: convert_checkpoint.main(
        ['from-pytorch', *arguments, f'{arguments[0]}-out']
    ),
}


@pytest.fixture
def run(tmp_path) -> Path:
    """The work directory of a run of digits that met its target after 10 epochs."""
    config = resolve('digits', org='us', platform='desk')
    return write_run(tmp_path / 'run', config, curve(config, 10))


def change_times(run: Path, change) -> None:
    """Replaces the time of every event of a log by change(key, time)."""
    log = run / 'mlperf.log'
    lines = []
    for line in log.read_text().splitlines():
        head, _, text = line.partition(' ')
        event = json.loads(text)
        event['time_ms'] = change(event['key'], event['time_ms'])
        lines.append(f'{head} {json.dumps(event)}\n')
    log.write_text(''.join(lines))


def test_result_names_data_set_and_seed_whoever_asks(run, capsys):
    assert judge_run.main([str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    config = finished_run.read_run(run).config
    assert last.startswith(f'RESULT,digits,{config.seed},')
    assert re.fullmatch(r'RESULT,digits,\d+,61,[^,]+,2023-11-14 22:13:\d\d', last)
    script = Path(judge_run.__file__).with_name('run_and_time.sh').read_text()
    assert 'scripts/judge_run.py" "$workdir"\n' in script  # And nothing that could change the line.


def test_pauses_are_told_from_work(run, capsys):
    """The clock of the rules runs on; what was done in the time is said beside it."""
    pause = 3_600_000
    begun = []

    def change(key, time):
        begun.append(key)
        return time + pause * (begun.count('block_start') > 3)

    change_times(run, change)
    environment = json.loads((run / 'environment.json').read_text()) | {'starts': 3}
    (run / 'environment.json').write_text(json.dumps(environment))
    assert judge_run.main([str(run)]) == 0
    said = capsys.readouterr().out
    # Ten epochs, each with 1 s of training, 0.5 s of evaluation and 0.25 s of checkpoints.
    assert '3661.0 s from run_start to run_stop, of which 17.5 s of training' in said
    assert 'interrupted 2 times' in said
    assert f'{10 * 1437 / 17.5:,.0f} images/s in that time' in said
    assert re.search(r'RESULT,digits,\d+,3661,', said)


def test_starts_are_counted(tmp_path):
    data = Dataset.__new__(Dataset)
    for name, value in {'name': 'digits', 'num_train': 9, 'num_eval': 9, 'digest': None}.items():
        object.__setattr__(data, name, value)
    for count in (1, 2, 3):
        work_directory.record(resolve('digits', seed=1), data, tmp_path)
        environment = json.loads((tmp_path / 'environment.json').read_text())
        assert environment['starts'] == count
        assert 'earlier' not in environment


LINE = (
    '{"epoch": 1, "eval_loss": 1, "eval_seconds": 1, "checkpoint_seconds": 1, '
    '"elapsed_seconds": %s}'
)


@pytest.mark.parametrize(
    'content',
    [
        None, '', 'x\n', '{}\n', '[]\n', '{"loss": NaN}\n', b'\xff\n', '[' * 10**5, LINE % '1e400',
        LINE % ('9' * 4000), LINE % '-1', LINE % '"x"', LINE % '1e9',
    ],
    ids=range(13),
)  # fmt: skip
def test_work_that_is_not_known_is_not_made_up(run, capsys, content):
    metrics = run / 'metrics.jsonl'
    metrics.unlink()
    if content is not None:
        metrics.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert judge_run.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert 'how much of it was training and evaluation is not known' in said
    assert 'images/s' not in said


DAY = 86_400_000
TIMES = {
    'clock set back': lambda key, time: time + DAY * (key == 'run_start'),
    'stop before start': lambda key, time: time - DAY * (key == 'run_stop'),
    'backwards before the start': lambda key, time: time + DAY * (key == 'init_start'),
    'negative': lambda key, time: time - 10**14,
    'near 1970': lambda key, time: time - 1_700_000_000_000,
    'absurd': lambda key, time: time + 10**30,
    'in the future': lambda key, time: time + 50 * 365 * DAY,
    'NaN': lambda key, time: float('nan'),
    'a fraction': lambda key, time: time + 0.5,
    'a text': lambda key, time: str(time),
    'no time': lambda key, time: None,
    'a list': lambda key, time: [time],
}


@pytest.mark.parametrize('change', TIMES)
def test_impossible_times_are_rejected_by_every_script(tmp_path, capsys, change):
    config = resolve('digits', org='us', platform='desk')
    runs = write_runs(tmp_path / 'runs', config, [10] * 10)
    change_times(runs / '003', TIMES[change])
    assert judge_run.main([str(runs / '003')]) == 1
    said = capsys.readouterr().out
    assert 'REJECTED' in said
    assert 'RESULT' not in said
    for script in ('rcps', 'package'):
        assert SCRIPTS[script]([str(runs)]) == 2
        assert '003/mlperf.log' in capsys.readouterr().err
    finished, (problem,) = run_sets.survey(runs)  # What the report shows, and what it leaves out.
    assert len(finished) == 9
    assert isinstance(problem, finished_run.LogRejectedError)


@pytest.mark.parametrize('lost', ['eval_accuracy', 'block_stop', 'opt_name', 'train_samples'])
def test_lost_and_changed_lines_are_rejected(run, capsys, lost):
    log = run / 'mlperf.log'
    whole = log.read_text()
    lines = whole.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if f'"key": "{lost}"' in line)
    log.write_text(''.join(lines[:first] + lines[first + 1 :]))
    assert judge_run.main([str(run)]) == 1
    assert 'REJECTED' in capsys.readouterr().out
    for ours, theirs in (('"epoch_num": 10', '"epoch_num": 4'), ('"resnet"', '"bert"')):
        assert ours in whole
        log.write_text(whole.replace(ours, theirs))
        assert judge_run.main([str(run)]) == 1


def test_logs_of_two_runs_in_one_are_rejected(tmp_path, capsys):
    config = resolve('digits')
    runs = write_runs(tmp_path, config, [3, 3])
    log = runs / '001' / 'mlperf.log'
    first, second = (
        (runs / name / 'mlperf.log').read_text().splitlines(keepends=True)
        for name in ('001', '002')
    )
    interleaved = [line for pair in zip(first, second, strict=True) for line in pair]
    for mixed in (interleaved, first + second, second + first, second[9:] + first[:9], second):
        log.write_text(''.join(mixed))
        assert judge_run.main([str(runs / '001')]) == 1
        assert 'REJECTED' in capsys.readouterr().out
    log.write_text(''.join(first))
    assert judge_run.main([str(runs / '001')]) == 0


@pytest.mark.parametrize('division', ['open', 'closed'])
def test_an_aborted_run_does_not_comply(tmp_path, division):
    config = resolve('imagenet', division=division)
    missed = [0.5] * len(plan_of(config).evaluations)
    run = finished_run.read_run(write_run(tmp_path / 'run', config, missed))
    passed, text = verdicts.complies(run)
    assert not passed
    assert ('aborted' if division == 'open' else 'eval_accuracy') in text
    assert verdicts.accepted(run.log, run.ruleset)[0] == (division == 'open')


# Of a file that every work directory has; None: there is none.
CONTENTS = [
    None, b'', b'[]', b'null', b'7', b'"x"', b'{', b'{}', b'\xff\xfe\0', b'[' * 10**5,
    b'{"a": NaN}', b'{"seed": "x"}', b':::MLLOG {}\n', b':::MLLOG 7\n',
    b':::MLLOG {"key": "run_stop"}\n',
]  # fmt: skip


@pytest.mark.parametrize('name', ['config.json', 'environment.json', 'mlperf.log'])
@pytest.mark.parametrize('content', CONTENTS, ids=range(len(CONTENTS)))
def test_damaged_work_directories_end_in_one_error(run, capsys, name, content):
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    for script, call in SCRIPTS.items():
        rejected = script == 'judge' and name == 'mlperf.log' and b'run_stop' in (content or b'')
        assert call([str(run)]) == (1 if rejected else 2)
        printed = capsys.readouterr()
        assert rejected or printed.err.startswith('error: ')
        assert name in printed.err + printed.out or 'there are no runs' in printed.err


@contextlib.contextmanager
def without_permission(folder: Path):
    """Until the block ends, this process may not look into the folder; root becomes nobody."""
    folder.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o755)


PLACES = {
    'missing': lambda path: path,
    'file': lambda path: path.write_text('x') and path,
    'empty': lambda path: path.mkdir() or path,
    'loop': lambda path: path.symlink_to(path) or path,
    'device': lambda path: Path('/dev/null'),
    'long': lambda path: path / ('x' * 300),
    'NUL': lambda path: Path(f'{path}\0'),
    'of folders': lambda path: [(path / 'a' / f).mkdir(parents=True) for f in
                                ('mlperf.log', 'config.json', 'environment.json')] and path,
}  # fmt: skip


@pytest.mark.parametrize('place', PLACES)
def test_what_is_no_work_directory_ends_in_one_error(tmp_path, capsys, place):
    path = PLACES[place](tmp_path / 'run')
    for call in (*SCRIPTS.values(), *CONVERSIONS.values()):
        assert call([str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith('error: ')
        assert not printed.out


def test_folders_without_permission_end_in_one_error(run, capsys):
    # Not above it, where pytest's own folder is closed to others.
    folder = Path('/tmp') / f'no-entry-{os.getpid()}'
    shutil.copytree(run, folder)
    try:
        with without_permission(folder):
            for call in (*SCRIPTS.values(), *CONVERSIONS.values()):
                assert call([str(folder)]) == 2
                assert capsys.readouterr().err.startswith('error: ')
    finally:
        shutil.rmtree(folder)


WRONG = (None, True, -1, 1.5, 2**70, 'x', [], ['x'], {}, {'x': 1}, float('nan'))


def paths(value, path=()):
    """The places of all values in nested mappings."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*path, key))


@pytest.mark.parametrize('name', ['config.json', 'environment.json'])
def test_no_value_of_a_wrong_type_makes_a_traceback(run, capsys, name):
    good = (run / name).read_text()
    statuses = set()
    for path in list(paths(json.loads(good)))[1:]:
        for wrong in WRONG:
            value = json.loads(good)
            place = value
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            (run / name).write_text(json.dumps(value))
            statuses.add(judge_run.main([str(run)]))
            with contextlib.suppress(finished_run.RunError):
                found = finished_run.read_run(run)
                page.machine(found)
                make_rcps.point([found], 'us')
    assert statuses <= {0, 1, 2}
    assert 2 in statuses
    capsys.readouterr()


OF_A_START = ('gradient_accumulation_steps', 'cache_clear', 'tracked_stats')


def test_events_of_a_wrong_type_are_rejected(run):
    """But for three values that may differ between the starts of one run."""
    log = run / 'mlperf.log'
    lines = log.read_text().splitlines(keepends=True)
    seen = set()
    for number, line in enumerate(lines):
        event = json.loads(line.partition(' ')[2])
        if event['key'] in seen:
            continue
        seen.add(event['key'])
        for path in list(paths(event))[1:]:
            if path[-1] in ('namespace', 'file', 'lineno'):
                continue
            for wrong in (None, True, -1, 2**70, [], {}):
                value = json.loads(json.dumps(event))
                place = value[path[0]] if len(path) == 2 else value
                if place[path[-1]] == wrong or (path == ('metadata',) and wrong == {}):
                    continue
                place[path[-1]] = wrong
                changed = f':::MLLOG {json.dumps(value)}\n'
                log.write_text(''.join([*lines[:number], changed, *lines[number + 1 :]]))
                with contextlib.suppress(finished_run.RunError):
                    finished_run.read_run(run)
                    assert path[0] == 'value'
                    assert event['key'] in OF_A_START, (path, wrong)


def test_scripts_run_by_themselves(run, tmp_path):
    """From any folder, with a status and words for users."""
    for script, expected in (('judge_run.py', 0), ('make_rcps.py', 2)):
        command = [sys.executable, Path(judge_run.__file__).with_name(script), run]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
        assert 'Traceback' not in done.stderr


def test_a_run_of_another_version_says_so(run, capsys):
    config = json.loads((run / 'config.json').read_text())
    del config['momentum']
    (run / 'config.json').write_text(json.dumps(config))
    assert judge_run.main([str(run)]) == 2
    assert 'another version of this program' in capsys.readouterr().err


def pasted(text: str) -> tuple[str, list[str]]:
    """The script and the arguments of the command in the last line of an error."""
    python, script, *arguments = shlex.split(text.strip().splitlines()[-1])
    assert python == 'python'
    assert Path(script).is_absolute()
    assert Path(script).is_file()
    return Path(script).name, arguments


def check_remedy(text: str, config, number: int, out: Path) -> Config:
    """Checks that a remedy makes runs of a configuration; the configuration that it would run."""
    script, arguments = pasted(text)
    assert script == 'run_seeds.py'
    flags, fields = run_seeds.parse_flags(arguments)
    resolved = run_seeds.resolve(flags.config, fields)
    assert hyperparameters.differences(resolved, dataclasses.asdict(config) | {'seed': None}) == []
    assert (flags.runs, flags.out) == (number, out)
    return resolved


def test_remedies_can_be_pasted(tmp_path, capsys, monkeypatch):
    """From any folder, whatever characters are in the paths, for the runs' own configuration."""
    config = resolve('cifar10', learning_rate=5.9, org='us', platform='desk')
    runs = write_runs(tmp_path / "my 'runs' & $1", config, [10, 12])
    monkeypatch.chdir(runs.parent)
    monkeypatch.setattr(sys, 'argv', ['x'])
    folder = runs.relative_to(runs.parent)
    assert make_rcps.main([str(folder)]) == 2
    check_remedy(capsys.readouterr().err, config, 10, runs)
    arguments = [str(folder), '--org=us', '--system=desk']
    assert package_submission.main(arguments) == 2
    check_remedy(capsys.readouterr().err, config, 5, runs)
    arguments = [str(folder), "--org=them's", '--system=lap top']
    assert package_submission.main(arguments) == 2
    said = capsys.readouterr().err
    assert '2 of the logs are of --org=us --system=desk' in said
    elsewhere = runs.with_name(f'{runs.name}-renamed')  # Finished runs would be kept as they are.
    resolved = check_remedy(said, config, 5, elsewhere)
    assert (resolved.org, resolved.platform) == ("them's", 'lap top')
    (tmp_path / 'empty').mkdir()
    assert report.main(['empty']) == 2
    check_remedy(capsys.readouterr().err, resolve('digits'), 10, tmp_path / 'empty')


@pytest.mark.parametrize(
    'name', ['', '.', '..', '../x', 'a/b', '/x', '.x', 'x' * 300, 'x\0', 'x\n']
)
@pytest.mark.parametrize('flag', ['org', 'system'])
def test_names_that_cannot_be_folders_are_rejected(run, capsys, flag, name):
    others = {'org': 'us', 'system': 'desk'} | {flag: name}
    arguments = [f'--{key}={value}' for key, value in others.items()]
    assert package_submission.main([str(run), *arguments]) == 2
    assert f'--{flag}=' in capsys.readouterr().err


@pytest.mark.parametrize('content', CONTENTS[1:11])
def test_system_descriptions_that_are_none_are_rejected(tmp_path, capsys, content):
    config = resolve('digits', org='us', platform='desk')
    runs = write_runs(tmp_path / 'runs', config, [4] * 5)
    file = tmp_path / 'system.json'
    file.write_bytes(content)
    arguments = [str(runs), '--org=us', '--system=desk', f'--system_description={file}']
    assert package_submission.main(arguments) == 2
    assert 'error: ' in capsys.readouterr().err
    assert not (runs / 'submission').exists()
