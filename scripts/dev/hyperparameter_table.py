# SPDX-License-Identifier: Apache-2.0
"""Writes the table of hyperparameters into the README, between its two markers.

    hyperparameter_table.py [--check] [FILE]

FILE is README.md unless given. With --check nothing is written: exit status 1 if it differs.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from settings import hyperparameters
from settings.hyperparameters import Field
from workloads.resnet.fields import ResNetConfig

BEGIN, END = '<!-- hyperparameters -->', '<!-- /hyperparameters -->'
README = Path(__file__).resolve().parents[2] / 'README.md'


def _row(entry: Field) -> str:
    rule, meaning, keys = entry.rule.words, entry.help, entry.log_key
    if entry.optional:
        rule += '; or none'
    if isinstance(keys, Mapping) and len(keys) == 1:
        meaning = f'{next(iter(keys)).upper()} only. {meaning}'
    logged = keys.values() if isinstance(keys, Mapping) else filter(None, [keys])
    shown = ', '.join(f'`{key}`' for key in dict.fromkeys(logged))
    cells = (f'`{entry.name}`', rule, shown, meaning)
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def table() -> str:
    """The fields that decide what is computed, as a Markdown table, with their tuning rules."""
    fields = hyperparameters.table(ResNetConfig).values()
    rows = [_row(entry) for entry in fields if entry.group == 'benchmark']
    return '\n'.join(['| field | rule | log key | meaning |', '|---|---|---|---|', *rows])


def updated(text: str) -> str:
    """The text of a README with the table between its markers renewed.

    Raises:
      ValueError: when it does not have the markers, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f'it must have the line {BEGIN} and, after it, the line {END}, once each')
    before, rest = text.split(BEGIN)
    return f'{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}'


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', nargs='?', type=Path, default=README)
    parser.add_argument('--check', action='store_true')
    flags = parser.parse_args(arguments)
    try:
        text = flags.file.read_text()
        new = updated(text)
    except (OSError, ValueError) as error:
        print(f'error: {flags.file}: {error}', file=sys.stderr)
        return 2
    if flags.check:
        if new != text:
            print(f'{flags.file} differs from the table; renew it: python {Path(__file__)}')
        return int(new != text)
    flags.file.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
