# SPDX-License-Identifier: Apache-2.0
"""Logs: the official checkers accept what they should; what is no whole log is rejected by name.

Accuracies are chosen here; everything else in a log is written by the program's own calls.
"""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml
from mlperf_logging.compliance_checker import mlp_compliance

from reporting import finished_run, verdicts
from run_files import line_file, log_check, mlperf_log
from settings import hyperparameters
from tests.synthetic_runs import curve, plan_of, resolve, write_log

CLOSED = {
    'lars': {'division': 'closed'},
    'sgd': {'division': 'closed', 'optimizer': 'sgd', 'learning_rate': 1.6},
}
RULESET = '4.0.0'
RULES = Path(mlp_compliance.__file__).parent / f'training_{RULESET}'


def official_keys(optimizer: str) -> list[str]:
    """The keys that the closed division asks for, by the checker's own files."""
    files = ('closed_resnet.yaml', f'closed_resnet_{optimizer}.yaml')
    rules = [rule for file in files for rule in yaml.safe_load((RULES / file).read_text())]
    return sorted({rule['KEY']['NAME'] for rule in rules} - {'eval_accuracy'})


@pytest.mark.parametrize('optimizer', ['lars', 'sgd'])
def test_imagenet_log_above_the_target_passes_as_closed(tmp_path, optimizer):
    config = resolve('imagenet', seed=1, **CLOSED[optimizer])
    write_log(tmp_path / 'log', config, curve(config, 40))
    passed, text = verdicts.accepted(tmp_path / 'log', RULESET)
    assert passed, text
    # The command that people know says the same.
    passed, text = verdicts.official('compliance_checker', '--ruleset', RULESET, tmp_path / 'log')
    assert passed, text


def test_imagenet_log_below_the_target_is_rejected_as_closed(tmp_path):
    config = resolve('imagenet', seed=1, **CLOSED['lars'])
    write_log(tmp_path / 'log', config, [0.7589] * len(plan_of(config).evaluations))
    passed, text = verdicts.accepted(tmp_path / 'log', RULESET)
    assert not passed
    assert 'eval_accuracy' in text
    assert '0.7590' in text


@pytest.mark.parametrize(
    ('optimizer', 'key'), [(o, k) for o in ('lars', 'sgd') for k in official_keys(o)]
)
def test_every_key_that_the_closed_division_asks_for_is_ours(tmp_path, monkeypatch, optimizer, key):
    """Without it the checker rejects the log: so it is looked at, under the name that we write."""
    config = resolve('imagenet', seed=1, **CLOSED[optimizer])
    event = mlperf_log.EventLog.event
    monkeypatch.setattr(
        mlperf_log.EventLog,
        'event',
        lambda self, name, value, **data: None if name == key else event(self, name, value, **data),
    )
    write_log(tmp_path / 'log', config, curve(config, 40))
    passed, text = verdicts.accepted(tmp_path / 'log', RULESET)
    assert not passed
    assert f"'{key}'" in text


def test_log_says_what_the_run_uses(tmp_path):
    config = resolve('imagenet', seed=7, micro_batch_size=512)
    write_log(tmp_path / 'log', config, curve(config, 40))
    events = finished_run.read_events(tmp_path / 'log')
    values = {event['key']: event['value'] for event in events}
    for key, value in hyperparameters.logged(config).items():
        assert values[key] == value
    assert values['gradient_accumulation_steps'] == 4096 // 512
    assert values['train_samples'] == 1281167
    assert values['eval_samples'] == 50000
    assert [key for key in values if key.startswith('sgd')] == []
    epochs = [e['metadata']['epoch_num'] for e in events if e['key'] == 'eval_accuracy']
    assert epochs == list(range(4, 41, 4))
    blocks = [e['metadata'] for e in events if e['key'] == 'block_start']
    assert [b['first_epoch_num'] for b in blocks] == list(range(1, 41, 4))
    assert {b['epoch_count'] for b in blocks} == {4}
    # Where the seed checker looks: file and line, the file as in the repository.
    assert {e['metadata']['file'] for e in events} <= {
        'run_files/mlperf_log.py',
        'tests/synthetic_runs.py',
    }


@pytest.mark.parametrize('name', ['digits', 'imagenet'])
def test_resumed_run_leaves_the_log_of_an_unbroken_one(tmp_path, name):
    config = resolve(name, seed=1)
    accuracies = curve(config, 12)
    write_log(tmp_path / 'whole', config, accuracies)
    # Stopped after one evaluation, then in the middle of a line, then resumed from the start.
    write_log(tmp_path / 'log', config, accuracies[:1])
    text = (tmp_path / 'log').read_text()
    (tmp_path / 'log').write_text(text + text.splitlines()[-1][:40])
    write_log(tmp_path / 'log', config, accuracies)

    def without_time(path):
        return [
            (e['event_type'], e['key'], e['value'], e['metadata'])
            for e in finished_run.read_events(path)
        ]

    assert without_time(tmp_path / 'log') == without_time(tmp_path / 'whole')
    passed, words = verdicts.accepted(tmp_path / 'log', RULESET)
    assert passed, words


def test_an_evaluation_that_is_done_again_counts_as_logged(tmp_path):
    config = resolve('digits', seed=1)
    evaluation = plan_of(config).evaluations[0]
    first = mlperf_log.EventLog(tmp_path / 'log')
    assert first.eval_stop(evaluation, 0.97999) == 0.97999
    again = mlperf_log.EventLog(tmp_path / 'log')
    assert again.eval_stop(evaluation, 0.98001) == 0.97999
    assert mlperf_log.EventLog(None).eval_stop(evaluation, 0.98001) == 0.98001


def test_a_log_that_is_no_text_is_reported(tmp_path):
    (tmp_path / 'log').write_bytes(b':::MLLOG \xff\n')
    with pytest.raises(mlperf_log.LogError, match='is no text'):
        mlperf_log.EventLog(tmp_path / 'log')


def test_unfinished_run_is_rejected_and_says_so(tmp_path):
    config = resolve('digits', seed=1)
    write_log(tmp_path / 'log', config, [0.5])
    passed, text = verdicts.accepted(tmp_path / 'log', RULESET)
    assert not passed
    assert 'run_stop' in text
    with pytest.raises(finished_run.RunError, match='run_stop is missing'):
        finished_run.read_events(tmp_path / 'log')


def test_seed_checker_wants_every_seed_once(tmp_path):
    logs = []
    for seed in (1, 2, 2**63 - 1, 4, 5, 2):
        config = resolve('digits', seed=seed)
        logs.append(tmp_path / f'log-{len(logs)}')
        write_log(logs[-1], config, curve(config, 3))
    passed, text = verdicts.seeds_differ(logs[:5], RULESET)
    assert passed, text
    passed, text = verdicts.seeds_differ(logs, RULESET)
    assert not passed
    assert 'logs seed 2 ' in text


@pytest.fixture
def two_logs(tmp_path):
    """The lines of the logs of two runs."""
    lines = []
    for seed in (1, 2):
        config = resolve('digits', seed=seed)
        write_log(tmp_path / f'{seed}', config, curve(config, 3))
        lines.append((tmp_path / f'{seed}').read_text().splitlines(keepends=True))
    return lines


def reading_error(path: Path, content: str | bytes) -> str:
    """What is said of a file with this content; never anything but a RunError."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(finished_run.RunError) as error:
        finished_run.read_events(path)
    assert str(path) in str(error.value)
    assert not verdicts.accepted(path, RULESET)[0]
    return str(error.value)


def test_log_cut_anywhere_is_rejected(tmp_path, two_logs):
    lines, _ = two_logs
    for count in range(len(lines)):
        for rest in ('', lines[count][: len(lines[count]) // 2], lines[count][:-2]):
            said = reading_error(tmp_path / 'log', ''.join(lines[:count]) + rest)
            assert re.search('is missing|no MLPerf log', said)


def test_damaged_line_is_rejected(tmp_path, two_logs):
    lines, _ = two_logs
    half = len(lines[4]) // 2
    lines[4] = lines[4][:half] + '\0\0}\n'
    assert 'line 5' in reading_error(tmp_path / 'log', ''.join(lines))


def test_foreign_files_are_rejected(tmp_path, two_logs):
    assert 'no MLPerf log' in reading_error(tmp_path / 'log', '')
    assert 'no MLPerf log' in reading_error(tmp_path / 'log', 'epoch 1 loss 2.3\n' * 9)
    assert 'damaged' in reading_error(tmp_path / 'log', bytes(range(256)))
    with pytest.raises(finished_run.RunError, match='cannot be read'):
        finished_run.read_events(tmp_path / 'none')


def test_run_does_not_resume_with_a_damaged_log(tmp_path, two_logs):
    lines, _ = two_logs
    (tmp_path / 'log').write_text(''.join([*lines[:4], lines[4][9:40] + lines[4], ':::MLLOG {\n']))
    with pytest.raises(mlperf_log.LogError, match='line 6 of .* empty work directory'):
        mlperf_log.EventLog(tmp_path / 'log')


@pytest.fixture
def interrupted(tmp_path):
    """A run's configuration and plan, and its log: stopped in the third block."""
    config = resolve('digits', seed=1)
    write_log(tmp_path / 'log', config, curve(config, 8)[:2])
    plan = plan_of(config)
    mlperf_log.EventLog(tmp_path / 'log', lambda: 1_900_000_000_000).block_start(
        plan.evaluations[2]
    )
    return config, plan


def check(path, config, plan, step, now=2_000_000_000_000):
    log_check.check(mlperf_log.EventLog(path, lambda: now), config, plan, step)


def rejection(path, config, plan, step=10, **how) -> str:
    """Why a log is rejected; nothing is changed by that."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(mlperf_log.LogError) as error:
        check(path, config, plan, step, **how)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert str(path) in str(error.value)
    assert 'new work directory' in str(error.value)
    return str(error.value)


def test_log_must_hold_what_a_run_up_to_its_checkpoint_has_written(tmp_path, interrupted):
    """Cut after every line: enough for some checkpoints, and for no later one."""
    config, plan = interrupted
    lines = (tmp_path / 'log').read_text().splitlines(keepends=True)
    first, second, third = (e.step for e in plan.evaluations[:3])
    steps = [0, 1, first - 1, first, first + 1, second, second + 1, third - 1, third]
    keys = [event['key'] for event in mlperf_log.read(tmp_path / 'log')]
    started = keys.index('run_start') + 1
    needed = [0, *[started + 1] * 2, started + 3, started + 7, started + 9, *[len(keys)] * 2,
              len(keys) + 2]  # fmt: skip
    for count in range(len(lines) + 1):
        for half in ('', lines[min(count, len(lines) - 1)][:30]):
            (tmp_path / 'cut').write_text(''.join(lines[:count]) + half)
            for step, least in zip(steps, needed, strict=True):
                if count >= least:
                    check(tmp_path / 'cut', config, plan, step)
                else:
                    said = rejection(tmp_path / 'cut', config, plan, step)
                    assert f'a checkpoint of step {step}' in said


def test_log_that_is_missing_is_reported_where_there_is_a_checkpoint(tmp_path, interrupted):
    config, plan = interrupted
    check(tmp_path / 'none', config, plan, step=0)
    assert 'missing or empty' in rejection(tmp_path / 'none', config, plan)
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('finished', [False, True])
def test_log_with_a_line_lost_doubled_or_moved_is_rejected(tmp_path, interrupted, finished):
    config, plan = interrupted
    if finished:
        write_log(tmp_path / 'log', config, curve(config, 8))
        check(tmp_path / 'log', config, plan, step=0)
    lines = (tmp_path / 'log').read_text().splitlines(keepends=True)
    for i in range(len(lines) - 1):
        before, line, after = lines[:i], lines[i], lines[i + 1 :]
        for changed in (
            [*before, *after],
            [*before, line, line, *after],
            [*before, after[0], line, *after[1:]],
            [*before, 'a line\n', line, *after],
            [*before, line[2:], *after],
        ):
            (tmp_path / 'log').write_text(''.join(changed))
            rejection(tmp_path / 'log', config, plan, step=0)


@pytest.mark.parametrize(
    'overrides', [{'seed': 2}, {'learning_rate': 7.0}, {'org': 'another'}, {'momentum': 0.95}]
)
def test_log_of_another_run_is_rejected(tmp_path, interrupted, overrides):
    config, plan = interrupted
    said = rejection(tmp_path / 'log', dataclasses.replace(config, **overrides), plan, step=0)
    assert repr(next(iter(overrides.values()))) in said


@pytest.mark.parametrize('value', [None, 'high', -0.1, 1.5, float('nan'), [0.5]])
def test_log_with_an_accuracy_that_is_none_is_rejected(tmp_path, interrupted, value):
    config, plan = interrupted
    text = (tmp_path / 'log').read_text()
    accuracy = next(e['value'] for e in mlperf_log.read(tmp_path / 'log') if 'accu' in e['key'][:9])
    (tmp_path / 'log').write_text(text.replace(json.dumps(accuracy), json.dumps(value)))
    rejection(tmp_path / 'log', config, plan)


def test_run_that_resumes_on_other_devices_keeps_its_log(tmp_path, interrupted):
    config, plan = interrupted
    several = dataclasses.replace(plan, num_devices=4)
    check(tmp_path / 'log', config, several, 10)


def test_log_of_the_future_is_rejected_with_both_times(tmp_path, interrupted):
    config, plan = interrupted
    said = rejection(tmp_path / 'log', config, plan, now=1_899_999_999_999)
    assert '2030-03-17 17:46:40 UTC' in said
    assert '2030-03-17 17:46:39 UTC' in said
    check(tmp_path / 'log', config, plan, 10, now=1_900_000_000_000)


def test_log_whose_times_run_backwards_is_rejected(tmp_path, interrupted):
    config, plan = interrupted
    lines = (tmp_path / 'log').read_text().splitlines(keepends=True)
    lines[3] = re.sub(r'"time_ms": \d+', '"time_ms": 2000000000', lines[3])
    (tmp_path / 'log').write_text(''.join(lines))
    assert 'backwards' in rejection(tmp_path / 'log', config, plan)


@pytest.mark.parametrize('damage', ['folder', 'binary', 'foreign'])
def test_what_is_no_log_is_rejected(tmp_path, interrupted, damage):
    config, plan = interrupted
    path = tmp_path / 'not_a_log'
    if damage == 'folder':
        path.mkdir()
    else:
        path.write_bytes(bytes(range(256)) if damage == 'binary' else b'some notes\nof mine\n')
    with pytest.raises(mlperf_log.LogError, match='not_a_log'):
        check(path, config, plan, step=0)


def test_times_do_not_follow_a_clock_that_is_set(tmp_path, monkeypatch):
    log = mlperf_log.EventLog(tmp_path / 'log')
    log.init_start()
    monkeypatch.setattr(time, 'time_ns', lambda: 0)
    monkeypatch.setattr(time, 'time', lambda: 0.0)
    log.init_stop()
    first, second = (event['time_ms'] for event in mlperf_log.read(tmp_path / 'log'))
    assert 0 <= second - first < 10_000


LOSSES = {
    'folder deleted': lambda path: shutil.rmtree(path.parent),
    'deleted': lambda path: path.unlink(),
    'emptied': lambda path: path.write_text(''),
    'replaced': lambda path: [path.unlink(), path.write_text('another\n')],
    'added to': lambda path: path.open('a').write('more\n'),
}


@pytest.mark.parametrize('loss', LOSSES)
def test_log_that_is_lost_while_it_is_written_ends_the_run(tmp_path, loss):
    path = tmp_path / 'run' / 'mlperf.log'
    path.parent.mkdir()
    log = mlperf_log.EventLog(path)
    log.init_start()
    LOSSES[loss](path)
    with pytest.raises(line_file.SaveError, match='deleted, replaced or changed'):
        log.init_stop()
    assert not path.exists() or 'init_stop' not in path.read_text()


def test_run_does_not_end_well_if_its_log_has_changed(tmp_path):
    log = mlperf_log.EventLog(tmp_path / 'log')
    log.init_start()
    log.init_stop()
    (tmp_path / 'log').write_text((tmp_path / 'log').read_text().replace('init_st', 'init-st'))
    with pytest.raises(line_file.SaveError, match='does not hold what this run has written'):
        log.run_stop(reached=True)
