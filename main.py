# SPDX-License-Identifier: Apache-2.0
"""Trains a configuration to its target.

    main.py --config=configs/digits.py --workdir=runs/digits [--config.NAME=VALUE …]
    main.py --config=configs/digits.py --mode=eval --config.init_from=runs/digits/checkpoints/STEP
    main.py --config=configs/digits.py --mode=check [--config.NAME=VALUE …]

The second evaluates a checkpoint over the whole set, prints its quality, and writes nothing.
The third only checks the arguments and the configuration. The same command resumes a run that was
interrupted. Exit status: 0 the target was reached, 1 it was missed, 2 the run was rejected before
it began, 3 it failed, 75 it was interrupted and saved. Before there is anything to save a signal
just ends the program; a run that hangs ends itself by SIGALRM, and one of several processes that
fails alone, and would wait for the others, by SIGUSR1.
"""

import argparse
import json
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from run_files import terminal
    from settings import backend, command_line, errors, hyperparameters, loading
    from workloads import by_name
except ModuleNotFoundError as missing:
    root = Path(__file__).resolve().parent
    print(
        f'error: {missing}: {sys.executable} is not the environment of this program. Make it with '
        f'{shlex.quote(f"{root}/scripts/setup_env.sh")}, then use it: '
        f'source {shlex.quote(f"{root}/.venv/bin/activate")}',
        file=sys.stderr,
    )
    sys.exit(2)


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The program's own flags, and the configuration's as texts by name, not judged yet."""
    own, overrides = loading.split(arguments)
    try:
        fields = by_name.config_type(loading.load(command_line.configuration(own)))
    except errors.ConfigError:  # It is reported when the configuration is needed.
        fields = hyperparameters.Config
    return command_line.parse(own, __doc__, hyperparameters.table(fields)), overrides


def run(
    flags: argparse.Namespace,
    base: Mapping[str, Any],
    overrides: Mapping[str, str],
    config: hyperparameters.Config,
) -> int:
    """Sets up the processes and runs; the exit status."""
    alone = flags.coordinator is None and not backend.in_cluster()
    micro_batches = config.global_batch_size // config.micro_batch_size
    backend.prepare(config.deterministic, micro_batches if alone else 1)
    from training import compilation_cache, evaluation, processes, train_loop

    for name in ('absl', 'asyncio'):  # What fails is raised; their tracebacks would bury it.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    compilation_cache.configure()
    workload = by_name.load(config.benchmark)
    dataset = workload.data(config)
    workload.check(config, dataset)
    if flags.mode == 'train':
        course = workload.course(config, dataset.num_train)
        command_line.check_profile(flags.profile, course.evaluations[-1].step)
    place = (flags.coordinator, flags.num_processes, flags.process_id, flags.start_timeout)
    with processes.joined(*place):
        print_line = terminal.show if processes.is_lead() else lambda text: None
        if flags.mode == 'eval':
            print_line(json.dumps(evaluation.evaluate(workload, config, dataset)))
            return errors.REACHED
        for warning in workload.warnings(base, overrides, config):
            print_line(f'warning: {warning}')
        compilation_cache.keep(flags.workdir.resolve().parent / 'compilation_cache')
        outcome = train_loop.train_and_evaluate(
            workload, config, dataset, flags.workdir, flags.profile
        )
        print_line(f'{flags.workdir}: {outcome.value}')
        return outcome.status


def print_error(text: str, status: int) -> int:
    """Prints an error for people."""
    sys.stdout.flush()
    terminal.show(f'error: {text}', file=sys.stderr)
    return status


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    # Until there is something to save, a signal ends the program at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        flags, overrides = parse_flags(arguments)
    except errors.ConfigError as error:
        return print_error(str(error), error.status)
    if flags.mode == 'eval':
        overrides['division'] = 'open'  # Which rules a training kept does not matter here.
    try:
        base = loading.load(flags.config)
        config = by_name.configure(base, overrides)
        return errors.REACHED if flags.mode == 'check' else run(flags, base, overrides, config)
    except (errors.RejectedError, errors.FailedError) as error:
        return print_error(str(error), error.status)
    except Exception:
        terminal.show(traceback.format_exc(), end='', file=sys.stderr)
        text = 'failed as shown above (of several processes, the first to fail says why)'
        if flags.mode == 'train':
            text += '; the same command resumes from the last checkpoint'
        return print_error(text, errors.FAILED)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
