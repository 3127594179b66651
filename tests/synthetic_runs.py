# SPDX-License-Identifier: Apache-2.0
"""Work directories as runs leave them, without the training.

The log is written through the program's own `EventLog`, with accuracies that a test chooses; the
plan gives epochs and steps.
"""

import importlib
import itertools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from run_files import mlperf_log
from run_files.mlperf_log import EventLog
from settings import hyperparameters
from settings.plan import Plan, make_plan

EXAMPLES = {'digits': (1437, 360), 'cifar10': (50000, 10000), 'imagenet2012': (1281167, 50000)}
COMMIT = 'c0ffee' * 6 + 'beef'
_seeds: Iterator[int] = itertools.count(1)


def resolve(name: str, seed: int | None = None, **overrides: Any) -> Mapping[str, Any]:
    """A committed configuration with overrides; the seed is added as a run does, when it begins."""
    base = importlib.import_module(f'configs.{name}').get_config()
    config = hyperparameters.resolve(base, {key: str(v) for key, v in overrides.items()})
    return FrozenConfigDict(dict(config) | {'seed': seed})


def plan_of(config: Mapping[str, Any]) -> Plan:
    """The plan of a run on one device."""
    num_train, num_eval = EXAMPLES[config['dataset']]
    return make_plan(config, num_train=num_train, num_eval=num_eval, num_devices=1)


def curve(config: Mapping[str, Any], epochs: int) -> list[float]:
    """Accuracies that meet the target at the evaluation after `epochs`, and not before."""
    evaluations = [e.epoch for e in plan_of(config).evaluations if e.epoch <= epochs]
    assert evaluations[-1] == epochs
    target = config['target_top1']
    return [target * e / epochs for e in evaluations[:-1]] + [target]


def write_log(path: Path, config: Mapping[str, Any], accuracies: Sequence[float]) -> None:
    """The log of a run with these accuracies; it goes on with a log that is there.

    A second passes from each event to the next. The run ends where the target is met, or is aborted
    at the last epoch; with fewer accuracies it is left unfinished.
    """
    last = mlperf_log.read(path)[-1]['time_ms'] if path.exists() else 1_700_000_000_000
    _write_log(EventLog(path, itertools.count(last, 1000).__next__), config, accuracies)


def _write_log(log: EventLog, config: Mapping[str, Any], accuracies: Sequence[float]) -> None:
    plan = plan_of(config)
    log.cache_clear(drop=False)
    log.init_start()
    log.header(config, plan)
    log.init_stop()
    log.run_start()
    reached = False
    for evaluation, top1 in zip(plan.evaluations, accuracies, strict=False):
        log.block_start(evaluation)
        log.block_stop(evaluation)
        log.eval_start(evaluation)
        log.eval_stop(evaluation, top1)
        reached = top1 >= config['target_top1']
        if reached:
            break
    if reached or len(accuracies) >= len(plan.evaluations):
        log.run_stop(reached)


def _metrics(config: Mapping[str, Any], accuracies: Sequence[float]) -> Iterator[dict[str, Any]]:
    plan = plan_of(config)
    for number, (evaluation, top1) in enumerate(zip(plan.evaluations, accuracies, strict=False)):
        at = {'step': evaluation.step, 'epoch': round(plan.epoch(evaluation.step), 4)}
        yield at | {
            'loss': 2 - top1, 'top1': top1, 'learning_rate': 1.0, 'images_per_second': 100.0,
            'input_wait': 0.25, 'seconds': 1.0, 'elapsed_seconds': 1.75 * number + 1,
        }  # fmt: skip
        yield at | {
            'eval_top1': top1, 'eval_loss': 1 - top1, 'eval_seconds': 0.5,
            'checkpoint_seconds': 0.25, 'elapsed_seconds': 1.75 * (number + 1),
        }  # fmt: skip


def write_run(
    directory: Path,
    config: Mapping[str, Any],
    accuracies: Sequence[float],
    *,
    seed: int | None = None,
    commit: str = COMMIT,
    digest: str = 'd1ce',
) -> Path:
    """A work directory of a run with these accuracies; the directory."""
    directory.mkdir(parents=True)
    seed = next(_seeds) if seed is None else seed
    config = dict(config) | {'seed': seed}
    num_train, num_eval = EXAMPLES[config['dataset']]
    environment = {
        'versions': {'jax': '0.10.2', 'numpy': '2.4.6'},
        'python': platform.python_version(),
        'system': platform.platform(),
        'devices': 1,
        'device_kind': 'cpu',
        'processes': 1,
        'commit': commit,
        'dataset': {
            'name': config['dataset'],
            'num_train': num_train,
            'num_eval': num_eval,
            'digest': digest,
        },
    }
    (directory / 'config.json').write_text(json.dumps(config))
    (directory / 'environment.json').write_text(json.dumps(environment))
    lines = [json.dumps(line) for line in _metrics(config, accuracies)]
    (directory / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    write_log(directory / 'mlperf.log', config, accuracies)
    return directory


def write_runs(
    folder: Path, config: Mapping[str, Any], epochs: Sequence[int], **details: Any
) -> Path:
    """A folder of runs that met their target after so many epochs; the folder."""
    for number, epoch in enumerate(epochs, start=1):
        write_run(folder / f'{number:03}', config, curve(config, epoch), **details)
    return folder
