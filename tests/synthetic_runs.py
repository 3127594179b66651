# SPDX-License-Identifier: Apache-2.0
"""Work directories as runs leave them, without the training.

The log is written through the program's own `EventLog`, with qualities that a test chooses; the
plan gives epochs and steps.
"""

import dataclasses
import importlib
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from run_files import mlperf_log
from run_files.mlperf_log import EventLog
from settings.hyperparameters import Config
from settings.plan import Plan, make_plan
from workloads import by_name

EXAMPLES = {
    'digits': (1437, 360),
    'cifar10': (50000, 10000),
    'imagenet2012': (1281167, 50000),
    'c4': (1_500_000, 1024),
    'speeches': (90_000, 562),
}
COMMIT = 'c0ffee' * 6 + 'beef'
_seeds: Iterator[int] = itertools.count(1)


def resolve(name: str, seed: int | None = None, **overrides: Any) -> Any:
    """A committed configuration with overrides; the seed is added as a run does, when it begins."""
    base = importlib.import_module(f'configs.{name}').get_config()
    config = by_name.configure(base, {key: str(value) for key, value in overrides.items()})
    return dataclasses.replace(config, seed=seed)


def plan_of(config: Config) -> Plan:
    """The plan of a run on one device."""
    num_train, num_eval = EXAMPLES[config.dataset]
    course = by_name.load(config.benchmark).course(config, num_train)
    return make_plan(config, course, num_train=num_train, num_eval=num_eval, num_devices=1)


def curve(config: Config, count: int) -> list[float]:
    """Qualities that meet the target at the evaluation of this count, and not before."""
    plan = plan_of(config)
    counts = [e.count for e in plan.evaluations if e.count <= count]
    assert counts[-1] == count
    return [plan.target.value * (c / count if plan.target.at_least else count / c) for c in counts]


def write_log(path: Path, config: Config, qualities: Sequence[float]) -> None:
    """The log of a run with these qualities; it continues a log that is there.

    A second passes from each event to the next. The run ends where the target is met, or is aborted
    at the last epoch; with fewer qualities it is left unfinished.
    """
    last = mlperf_log.read(path)[-1]['time_ms'] if path.exists() else 1_700_000_000_000
    _write_log(EventLog(path, itertools.count(last, 1000).__next__), config, qualities)


def _write_log(log: EventLog, config: Config, qualities: Sequence[float]) -> None:
    plan = plan_of(config)
    log.cache_clear(drop=False)
    log.init_start()
    log.header(config, plan)
    log.init_stop()
    log.run_start()
    reached = False
    for evaluation, quality in zip(plan.evaluations, qualities, strict=False):
        log.block_start(evaluation)
        log.block_stop(evaluation)
        log.tracked_stats(evaluation, {'throughput': 100.0})
        log.eval_start(evaluation)
        log.eval_stop(evaluation, quality)
        reached = plan.target.is_met(quality)
        if reached:
            break
    if reached or len(qualities) >= len(plan.evaluations):
        log.run_stop(reached)


def _metrics(config: Config, qualities: Sequence[float]) -> Iterator[dict[str, Any]]:
    plan = plan_of(config)
    for number, (evaluation, quality) in enumerate(zip(plan.evaluations, qualities, strict=False)):
        position = round(plan.position(evaluation.step), 4)
        at = {'step': evaluation.step, plan.course.unit: position}
        yield at | {
            'loss': abs(2 - quality), 'learning_rate': 1.0, 'throughput': 100.0,
            'input_wait': 0.25, 'seconds': 1.0, 'elapsed_seconds': 1.75 * number + 1,
        }  # fmt: skip
        yield at | {
            'eval_loss': abs(1 - quality), plan.target.metric: quality, 'eval_seconds': 0.5,
            'checkpoint_seconds': 0.25, 'elapsed_seconds': 1.75 * (number + 1),
        }  # fmt: skip


def write_run(
    directory: Path,
    config: Config,
    qualities: Sequence[float],
    *,
    seed: int | None = None,
    commit: str = COMMIT,
    digest: str = 'd1ce',
) -> Path:
    """A work directory of a run with these qualities; the directory."""
    directory.mkdir(parents=True)
    config = dataclasses.replace(config, seed=next(_seeds) if seed is None else seed)
    num_train, num_eval = EXAMPLES[config.dataset]
    environment = {
        'versions': {'jax': '0.10.2', 'numpy': '2.4.6'},
        'python': platform.python_version(),
        'system': platform.platform(),
        'devices': 1,
        'device_kind': 'cpu',
        'processes': 1,
        'commit': commit,
        'dataset': {
            'name': config.dataset,
            'num_train': num_train,
            'num_eval': num_eval,
            'digest': digest,
        },
    }
    (directory / 'config.json').write_text(json.dumps(dataclasses.asdict(config)))
    (directory / 'environment.json').write_text(json.dumps(environment))
    lines = [json.dumps(line) for line in _metrics(config, qualities)]
    (directory / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    write_log(directory / 'mlperf.log', config, qualities)
    return directory


def write_runs(folder: Path, config: Config, counts: Sequence[int], **details: Any) -> Path:
    """A folder of runs that met their target after so many epochs; the folder."""
    for number, count in enumerate(counts, start=1):
        write_run(folder / f'{number:03}', config, curve(config, count), **details)
    return folder
