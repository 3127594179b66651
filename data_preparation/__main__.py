# SPDX-License-Identifier: Apache-2.0
"""The command line of data preparation; `scripts/download_dataset.sh` calls it."""

import argparse
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments, each command's in its own section."""
    parser = argparse.ArgumentParser(prog='python -m data_preparation')
    commands = parser.add_subparsers(dest='command', required=True)
    digits = commands.add_parser('digits', help='prepare the digits that scikit-learn carries')
    digits.add_argument('--data_dir', type=Path, default=Path('data'), help='root of all datasets')
    return parser.parse_args()


def main() -> None:
    """Runs one command; what the user can mend is one line, `error: …`, and exit code 2."""
    arguments = parse_arguments()
    try:
        from data_preparation import digits

        print(f'prepared: {digits.prepare(arguments.data_dir)}')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
