# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of hyperparameters into the documents, each between two markers.

    hyperparameter_table.py [--check] [FILE…]

Without FILEs, docs/resnet50.md and docs/llama31_8b.md. With --check nothing is written: exit status
1 if one differs.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from settings import hyperparameters
from settings.hyperparameters import Config, Field
from workloads.by_name import BENCHMARKS

BEGIN, END = '<!-- hyperparameters of {} -->', '<!-- /hyperparameters -->'
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / 'docs' / name for name in ('resnet50.md', 'llama31_8b.md')]


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


def table(config_type: type[Config]) -> str:
    """The fields that decide what is computed, as a Markdown table, with their tuning rules."""
    fields = hyperparameters.table(config_type).values()
    rows = [_row(entry) for entry in fields if entry.group == 'benchmark']
    return '\n'.join(['| field | rule | log key | meaning |', '|---|---|---|---|', *rows])


def updated(text: str) -> str:
    """The text of a document with the table between its markers renewed.

    Raises:
      ValueError: when it does not have the markers of one benchmark, once each and in order.
    """
    for name, (config_type, _) in BENCHMARKS.items():
        begin = BEGIN.format(name)
        if text.count(begin) == text.count(END) == 1 and text.index(begin) < text.index(END):
            before, rest = text.split(begin)
            return f'{before}{begin}\n{table(config_type)}\n{END}{rest.split(END)[1]}'
    raise ValueError(
        f'it must have the line {BEGIN.format("BENCHMARK")} and, after it, {END}, once each'
    )


def main(arguments: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('files', nargs='*', type=Path, metavar='FILE')
    parser.add_argument('--check', action='store_true')
    flags = parser.parse_args(arguments)
    differs = False
    for file in flags.files or DOCUMENTS:
        try:
            text = file.read_text()
            new = updated(text)
        except (OSError, ValueError) as error:
            print(f'error: {file}: {error}', file=sys.stderr)
            return 2
        if flags.check and new != text:
            print(f'{file} differs from the table; renew it: python {Path(__file__)}')
            differs = True
        elif not flags.check:
            file.write_text(new)
    return int(differs)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
