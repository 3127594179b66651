# SPDX-License-Identifier: Apache-2.0
"""What the official checkers of mlperf-logging say, as (passed, words).

The checkers of logs run in this process, which takes milliseconds; those of whole submission trees
run as the commands that people know.
"""

import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.package_checker import seed_checker
from mlperf_logging.rcp_checker import rcp_checker

from reporting.finished_run import FinishedRun, RunError
from settings.errors import ConfigError
from workloads import by_name

_PACKAGE = Path(mlp_compliance.__file__).parents[1]


def runs_per_result(benchmark: str) -> int:
    """How many runs make a result of a benchmark.

    Raises:
      RunError: when MLPerf Training has no such benchmark.
    """
    known = rcp_checker.submission_runs['training']
    if benchmark not in known:
        raise RunError(f'{benchmark} is no benchmark of MLPerf Training: {", ".join(known)}')
    return known[benchmark]


def official(
    tool: str, *arguments: str | Path, ruleset: str = '', changes: Mapping[str, str] | None = None
) -> tuple[bool, str]:
    """Runs `python -m mlperf_logging.TOOL`; whether it exited 0, and what it printed.

    It runs in a folder of its own, for the tools leave files behind where they run.

    Args:
      tool: such as 'package_checker'.
      arguments: of the command.
      ruleset, changes: texts of the rules of a version to be changed; see `Ruleset`.

    Raises:
      KeyError: a text that is to be changed is not in the rules.
    """
    command = [sys.executable, '-m', f'mlperf_logging.{tool}', *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        if changes:  # Python takes a package of the folder that it is started in.
            copy = Path(folder) / _PACKAGE.name
            shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
            _change(copy / 'compliance_checker' / f'training_{ruleset}', changes)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def _said(function: Callable[[], Any]) -> tuple[Any, str]:
    """What a checker's function returns, and the warnings and errors that it logs meanwhile."""
    text = io.StringIO()
    handler, root = logging.StreamHandler(text), logging.getLogger()
    handler.setLevel(logging.WARNING)
    others, root.handlers = root.handlers, [handler]
    try:
        return function(), text.getvalue().strip()
    finally:
        root.handlers = others


def accepted(log: Path, ruleset: str, changes: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """The official compliance checker's verdict on one log.

    Args:
      log: of the run.
      ruleset: of MLPerf Training.
      changes: see `Ruleset`.

    Raises:
      KeyError: a text that is to be changed is not in the rules.
    """
    checker = mlp_compliance.make_checker('training', ruleset, quiet=False, werror=False)
    with tempfile.TemporaryDirectory() as folder:
        rules = _changed_rules(ruleset, changes, Path(folder)) if changes else Path()
        # The checker finds its rules from where its own are, unless a path is absolute.
        first = str(rules / f'training_{ruleset}' / 'common.yaml')
        (passed, *_), text = _said(lambda: mlp_compliance.main(str(log), first, checker))
    return passed, text


def _changed_rules(ruleset: str, changes: Mapping[str, str], folder: Path) -> Path:
    """Copies the rules, which name each other, with changes."""
    name = f'training_{ruleset}'
    shutil.copytree(_PACKAGE / 'compliance_checker' / name, folder / name)
    _change(folder / name, {f'{name}/': f'{folder}/{name}/', **changes})
    return folder


def _change(rules: Path, changes: Mapping[str, str]) -> None:
    """Changes texts of the rules in a folder."""
    found = set()
    for path in rules.glob('*.yaml'):
        text = path.read_text()
        for old, new in changes.items():
            found |= {old} if old in text else set()
            text = text.replace(old, new)
        path.write_text(text)
    if missing := changes.keys() - found:
        raise KeyError(f'the rules in {rules.name} have no {missing}')


def complies(run: FinishedRun) -> tuple[bool, str]:
    """Whether a run can be part of a result: the checker accepts its log, and it met its target.

    The checker alone passes an aborted run of the open division: its rules ask for a status, not
    for which.
    """
    passed, text = accepted(run.log, run.ruleset, run.plan.course.ruleset.changes)
    if passed and not run.reached:
        return False, 'the run was aborted: it did not meet its target'
    return passed, text


def seeds_differ(logs: Sequence[Path], ruleset: str) -> tuple[bool, str]:
    """The official seed checker's verdict on a set of logs."""
    return _said(lambda: seed_checker.SeedChecker(ruleset).check_seeds(list(map(str, logs))))


def converges_as(logs: Sequence[Path], points: Mapping[str, Any], ruleset: str) -> tuple[bool, str]:
    """The official RCP checker's verdict on a set of logs, and its reason.

    Args:
      logs: of a result's runs.
      points: reference convergence points by name, in the official form.
      ruleset: of MLPerf Training.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number, log in enumerate(logs):
            shutil.copyfile(log, Path(folder) / f'result_{number}.txt')
        (passed, reason, _), text = _said(
            lambda: rcp_checker.check_directory(
                folder,
                'training',
                ruleset,
                verbose=False,
                bert_train_samples=False,
                rcp_file=io.StringIO(json.dumps(points)),
                rcp_pass='pruned_rcps',
            )
        )
    return passed, '; '.join(filter(None, (reason, text)))


def official_points(benchmark: str, ruleset: str) -> dict[str, Any]:
    """The reference convergence points that mlperf-logging carries; empty if it has none."""
    folder = Path(rcp_checker.__file__).parent / f'training_{ruleset}'
    path = folder / f'rcps_{benchmark}.json'
    return json.loads(path.read_text()) if path.exists() else {}


def official_counts(run: FinishedRun) -> list[int]:
    """Where the official reference's runs with the same batch and optimizer met the target.

    Empty unless the run's configuration is one that the closed division allows.
    """
    try:
        by_name.configure(dataclasses.asdict(run.config), {'division': 'closed', 'seed': 'none'})
    except ConfigError:
        return []
    return [
        count
        for point in official_points(run.config.benchmark, run.ruleset).values()
        if point['BS'] == run.config.global_batch_size
        and point['Hyperparams'].get('optimizer', run.config.optimizer) == run.config.optimizer
        for count in point['Epochs to converge']
    ]
