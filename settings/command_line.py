# SPDX-License-Identifier: Apache-2.0
"""The flags of main.py, but for those of the configuration's fields."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from settings.errors import REJECTED, ConfigError
from settings.hyperparameters import Field
from settings.loading import FLAG

DEFAULT_CONFIG = 'configs/digits.py'


class _Parser(argparse.ArgumentParser):
    """Prints an error alone; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(REJECTED, f'error: {message}; {self.prog} --help lists what there is\n')


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


def configuration(arguments: Sequence[str]) -> str:
    """The value of --config, whatever the other arguments are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument('--config', nargs='?', default=DEFAULT_CONFIG)
    return parser.parse_known_args(arguments)[0].config or DEFAULT_CONFIG


def parse(
    arguments: Sequence[str], description: str | None, fields: Mapping[str, Field]
) -> argparse.Namespace:
    """Parses the flags; ends the program where they are wrong, or --help is among them.

    Args:
      arguments: without --config.NAME=VALUE.
      description: what --help says first.
      fields: of the configuration, for --help and for hints.
    """
    parser = _Parser(
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--config', default=DEFAULT_CONFIG, help='FILE.py, FILE.py:ARGUMENT or FILE.json')
    add('--mode', choices=('train', 'eval', 'check'), default='train', help='default: train')
    add('--workdir', type=Path, help='everything is written here; for train only')
    add('--coordinator', metavar='HOST:PORT', help='of process 0; several processes')
    add('--num_processes', type=int, help='with --coordinator')
    add('--process_id', type=int, help='from 0; with --coordinator')
    add(
        '--start_timeout',
        type=_seconds,
        default=300,
        metavar='SECONDS',
        help='a process that has not joined the others by then ends the start (default: 300)',
    )
    add(
        '--profile',
        type=_steps,
        metavar='START:STOP',
        help='writes a trace of these optimizer steps, from 0, into WORKDIR/profile (TensorBoard '
        'with XProf and Perfetto open it); the steps before them compile and warm up',
    )
    group = parser.add_argument_group('configuration', 'each overrides the field of the file')
    for field in fields.values():
        optional = ' or none' if field.optional else ''
        rule = f'{field.type.__name__}{optional}; {field.rule.words}'
        group.add_argument(
            FLAG + field.name,
            metavar=field.type.__name__.upper(),
            help=f'{field.help} ({rule})'.replace('%', '%%'),
        )
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f'unknown argument {unknown[0]}{_meant(unknown[0], fields)}')
    if flags.mode == 'train' and flags.workdir is None:
        parser.error('--workdir=DIR is required: everything that a run writes goes there')
    return flags


def _meant(argument: str, fields: Mapping[str, Field]) -> str:
    """What an unknown argument was probably meant to be."""
    name = argument.lstrip('-').partition('=')[0]
    if name in ('gpus', 'cpus'):
        return f' (--{name}=N is for scripts/run_and_time.sh and scripts/launch.py)'
    if name in fields:
        return f'; did you mean {FLAG}{name}=VALUE?'
    return ''


def check_profile(steps: tuple[int, int] | None, total_steps: int) -> None:
    """Checks that the steps to trace are steps of the run.

    Raises:
      ConfigError: when they are not.
    """
    if steps and steps[1] > total_steps:
        raise ConfigError(
            f'--profile={steps[0]}:{steps[1]} is beyond the last step: the run has {total_steps}, '
            f'counted from 0, so STOP is at most {total_steps}'
        )
