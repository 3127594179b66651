# SPDX-License-Identifier: Apache-2.0
"""Trains a configuration to its target.

    main.py --config=configs/digits.py --workdir=runs/digits [--config.NAME=VALUE …]
    main.py --config=configs/digits.py --mode=eval --config.init_from=runs/digits/checkpoints/STEP
    main.py --config=configs/digits.py --mode=check [--config.NAME=VALUE …]

The second evaluates a checkpoint over the whole set, prints top-1 and loss, and writes nothing.
The third only judges the arguments and the configuration. The same command resumes a run that was
interrupted. Exit status: 0 the target was reached, 1 it was missed, 2 the run was rejected before
it began, 3 it failed, 75 it was interrupted and saved. Before there is anything to save a signal
just ends the program; a run that hangs ends itself by SIGALRM.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

try:
    from ml_collections import ConfigDict
except ModuleNotFoundError as missing:
    root = Path(__file__).resolve().parent
    print(
        f'error: {missing}: {sys.executable} is not the environment of this program. Make it with '
        f'{shlex.quote(f"{root}/scripts/setup_env.sh")}, then use it: '
        f'source {shlex.quote(f"{root}/.venv/bin/activate")}',
        file=sys.stderr,
    )
    sys.exit(2)

from settings import backend, hyperparameters, plan
from workloads.resnet import advice

EXIT_REACHED, EXIT_MISSED, EXIT_REFUSED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 75
COMPILATION_CACHE_BYTES = 2 << 30
FLAG = '--config.'


class _Parser(argparse.ArgumentParser):
    """Prints an error alone; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_REFUSED, f'error: {message}; {self.prog} --help lists what there is\n')


def _steps(text: str) -> tuple[int, int]:
    """The steps of START:STOP."""
    first, _, stop = text.partition(':')
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f'{text!r} is not START:STOP with 0 ≤ START < STOP')
    return int(first), int(stop)


def _seconds(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text[:9]) == int(text)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number of seconds')
    return int(text)


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Splits the command line into the program's own flags and the configuration's.

    The latter are texts by name, judged by `hyperparameters.resolve`, unknown names included.
    """
    parser = _Parser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--config', default='configs/digits.py', help='FILE.py, FILE.py:ARGUMENT or FILE.json'
    )
    parser.add_argument(
        '--mode', choices=('train', 'eval', 'check'), default='train', help='default: train'
    )
    parser.add_argument('--workdir', type=Path, help='everything is written here; for train only')
    parser.add_argument(
        '--coordinator', metavar='HOST:PORT', help='of process 0; several processes'
    )
    parser.add_argument('--num_processes', type=int, help='with --coordinator')
    parser.add_argument('--process_id', type=int, help='from 0; with --coordinator')
    parser.add_argument(
        '--start_timeout',
        type=_seconds,
        default=300,
        metavar='SECONDS',
        help='a process that has not joined the others by then ends the start (default: 300)',
    )
    parser.add_argument(
        '--profile',
        type=_steps,
        metavar='START:STOP',
        help='writes a trace of these optimizer steps, from 0, into WORKDIR/profile (TensorBoard '
        'with XProf and Perfetto open it); the steps before them compile and warm up',
    )
    fields = parser.add_argument_group('configuration', 'each overrides the field of the file')
    for entry in hyperparameters.TABLE:
        optional = ' or none' if entry.optional else ''
        rule = f'{entry.type.__name__}{optional}; {entry.rule.words}'
        fields.add_argument(
            FLAG + entry.name,
            metavar=entry.type.__name__.upper(),
            help=f'{entry.help} ({rule})'.replace('%', '%%'),
        )
    own, overrides = [], {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(FLAG):
            own.append(argument)
            continue
        name, equals, value = argument.removeprefix(FLAG).partition('=')
        if not equals:
            value = next(rest, '')
        overrides[name] = value
    flags, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f'unknown argument {unknown[0]}{_meant(unknown[0])}')
    if flags.mode == 'train' and flags.workdir is None:
        parser.error('--workdir=DIR is required: everything that a run writes goes there')
    return flags, overrides


def _meant(argument: str) -> str:
    """What an unknown argument was probably meant to be."""
    name = argument.lstrip('-').partition('=')[0]
    if name in ('gpus', 'cpus'):
        return f' (--{name}=N is for scripts/run_and_time.sh and scripts/launch.py)'
    if name in hyperparameters.BY_NAME:
        return f'; did you mean {FLAG}{name}=VALUE?'
    return ''


def load_config(specification: str) -> Mapping[str, Any]:
    """Calls `get_config` of a configuration file, or reads a JSON file of names and values.

    Args:
      specification: FILE.py, FILE.py:ARGUMENT (of `get_config`), or FILE.json.

    Raises:
      ValueError: when there is no such file, or it cannot be loaded.
    """
    path, _, argument = specification.partition(':')
    folder = Path(__file__).parent
    try:
        file = next((p for p in (Path(path), folder / path) if p.is_file()), None)
    except (OSError, ValueError):  # No name of a file: too long, or with a NUL.
        file = None
    if file is None:
        known = sorted(p.name for p in (folder / 'configs').glob('[a-z]*.py'))
        known = [name for name in known if name not in ('common.py', 'from_json.py')]
        raise ValueError(
            f'--config={path[:200]}: no such file; there are configs/{{{", ".join(known)}}}, and '
            'FILE.json such as the config.json of a work directory'
        )
    if file.suffix == '.json':
        file, argument = folder / 'configs' / 'from_json.py', str(file)
    try:
        get_config = runpy.run_path(str(file))['get_config']
        config = get_config(argument) if argument else get_config()
    except (Exception, SystemExit) as error:
        raise ValueError(f'--config={specification}: {type(error).__name__}: {error}') from error
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(
            f'--config={specification}: get_config() returned {type(config).__name__}, not the '
            'names and values of a configuration'
        )
    return config


def prepare_jax(config: Mapping[str, Any]) -> None:
    """Settings that JAX reads when it is imported or started."""
    backend.set_xla_flags()
    if config['deterministic']:
        backend.set_deterministic()
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0'  # A second lock: float32 is float32.

    import jax

    jax.config.update('jax_compilation_cache_dir', None)  # Until processes.keep_programs.
    jax.config.update('jax_compilation_cache_max_size', COMPILATION_CACHE_BYTES)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    # It would answer SIGTERM in our place (see processes.StopRequest).
    jax.config.update('jax_enable_preemption_service', False)


def check_profile(steps: tuple[int, int] | None, total_steps: int) -> None:
    """Checks that the steps to trace are steps of the run.

    Raises:
      ConfigError: when they are not.
    """
    if steps and steps[1] > total_steps:
        raise hyperparameters.ConfigError(
            f'--profile={steps[0]}:{steps[1]} is beyond the last step: the run has {total_steps}, '
            f'counted from 0, so STOP is at most {total_steps}'
        )


def run(flags: argparse.Namespace, config: Mapping[str, Any], warnings: list[str]) -> int:
    """Sets up the processes and runs; the exit status."""
    prepare_jax(config)
    import input_pipeline
    from run_files import line_file, mlperf_log, work_directory
    from training import checkpointing, evaluation, processes, train_loop

    refused = (
        hyperparameters.ConfigError,
        input_pipeline.DatasetError,
        work_directory.WorkDirectoryError,
        checkpointing.CheckpointError,
        mlperf_log.LogError,
        processes.StartError,
    )
    failed = (input_pipeline.DataError, train_loop.NonFiniteError, line_file.SaveError)
    try:
        dataset = input_pipeline.find_dataset(config['dataset'], config['data_dir'])
        input_pipeline.check(config, dataset)
        if flags.mode == 'train':
            evaluations = plan.find_evaluations(config, dataset.num_train)
            check_profile(flags.profile, evaluations[-1].step)
        processes.initialize(
            flags.coordinator, flags.num_processes, flags.process_id, flags.start_timeout
        )
        if flags.mode == 'eval':
            result = evaluation.evaluate(config, dataset)
            if processes.is_lead():
                print(json.dumps(result), flush=True)
            return EXIT_REACHED
        if processes.is_lead():
            for warning in warnings:
                print(f'warning: {warning}', flush=True)
        processes.keep_programs(flags.workdir.resolve().parent / 'compilation_cache')
        outcome = train_loop.train_and_evaluate(config, dataset, flags.workdir, flags.profile)
    except refused as error:
        return complain(error, EXIT_REFUSED)
    except failed as error:
        return complain(error, EXIT_FAILED)
    except Exception:
        traceback.print_exc()
        several = 'lost another process (see what the others say), or ' * processes.is_several()
        remedy = '; the same command resumes from the last checkpoint' * (flags.mode == 'train')
        return complain(RuntimeError(f'{several}failed as shown above{remedy}'), EXIT_FAILED)
    if processes.is_lead():
        print(f'{flags.workdir}: {outcome.value}', flush=True)
    return {
        train_loop.Outcome.REACHED: EXIT_REACHED,
        train_loop.Outcome.MISSED: EXIT_MISSED,
        train_loop.Outcome.INTERRUPTED: EXIT_INTERRUPTED,
    }[outcome]


def complain(error: Exception, status: int) -> int:
    """Prints an error for people."""
    print(f'error: {error}', file=sys.stderr, flush=True)
    return status


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    # Until there is something to save, a signal ends the program at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    flags, overrides = parse_flags(arguments)
    if flags.mode == 'eval':
        overrides['division'] = 'open'  # Which rules a training kept does not matter here.
    try:
        base = load_config(flags.config)
        config = hyperparameters.resolve(base, overrides)
    except ValueError as error:
        return complain(error, EXIT_REFUSED)
    if flags.mode == 'check':
        return EXIT_REACHED
    return run(flags, config, advice.warnings(base, overrides, config))


if __name__ == '__main__':
    status = main(sys.argv[1:])
    if status == EXIT_FAILED:
        # At its exit JAX would wait for the other processes, which may wait for this one.
        sys.stdout.flush()
        for data_process in multiprocessing.active_children():
            data_process.terminate()
        os._exit(status)
    sys.exit(status)
