# SPDX-License-Identifier: Apache-2.0
"""The command line of data preparation; `scripts/download_dataset.sh` calls it."""

import argparse
import os
import sys
from pathlib import Path

from records import DatasetError


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments; each command has its own."""
    parser = argparse.ArgumentParser(
        prog='python -m data_preparation', description='Prepares and verifies datasets.'
    )
    commands = parser.add_subparsers(dest='command', required=True)

    digits = commands.add_parser('digits', help='prepare the digits that scikit-learn carries')
    cifar10 = commands.add_parser('cifar10', help='fetch and prepare CIFAR-10')
    cifar10.add_argument(
        '--from',
        dest='folder',
        type=Path,
        help='a folder train|test/CLASS/*.jpg, or an archive of one, instead of the download',
    )
    imagenet = commands.add_parser('imagenet', help='prepare ILSVRC2012 from its two archives')
    imagenet.add_argument('--archives_dir', type=Path, help='where the archives are, or go to')
    imagenet.add_argument('--url', help='the folder to download missing archives from')
    imagenet.add_argument('--sources', type=Path, help='JSON: checksums of other archives')
    imagenet.add_argument('--workers', type=int, default=len(os.sched_getaffinity(0)))
    verify = commands.add_parser('verify', help='check a prepared dataset')
    verify.add_argument('name', help='digits, cifar10 or imagenet2012')
    verify.add_argument('--full', action='store_true', help='decode every image')
    verify.add_argument('--manifest', type=Path, help='compare with this one')
    verify.add_argument('--workers', type=int, default=len(os.sched_getaffinity(0)))
    for command in (digits, cifar10, imagenet, verify):
        command.add_argument('--data_dir', type=Path, default=Path('data'), help='root of all data')
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> str:
    """Runs one command and returns the line that says what came of it."""
    # Each command imports what it alone needs.
    if arguments.command == 'digits':
        from data_preparation import digits

        return f'prepared: {digits.prepare(arguments.data_dir)}'
    if arguments.command == 'cifar10':
        from data_preparation import cifar10

        return f'prepared: {cifar10.prepare(arguments.data_dir, arguments.folder)}'
    if arguments.command == 'imagenet':
        from data_preparation import imagenet, imagenet_archives

        sources = imagenet_archives.OFFICIAL
        if arguments.sources:
            sources = imagenet_archives.read_sources(arguments.sources)
        archives_dir = arguments.archives_dir or arguments.data_dir / 'downloads' / 'manual'
        if arguments.url:
            imagenet_archives.fetch(arguments.url, archives_dir, sources)
        directory = imagenet.prepare(arguments.data_dir, archives_dir, sources, arguments.workers)
        return f'prepared: {directory}'
    from data_preparation import verify

    return verify.verify(
        arguments.name,
        arguments.data_dir,
        full=arguments.full,
        manifest_file=arguments.manifest,
        workers=arguments.workers,
    )


def main() -> None:
    """Runs one command; what the user can mend is one paragraph, `error: …`, and exit code 2."""
    try:
        print(run(parse_arguments()))
    except (ValueError, OSError, DatasetError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit('stopped; the same command goes on from here')


if __name__ == '__main__':
    main()
