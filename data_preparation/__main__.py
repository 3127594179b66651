# SPDX-License-Identifier: Apache-2.0
"""The command line of data preparation; `scripts/download_dataset.sh` calls it.

Exit status: 0 done, 2 an error, which is printed in one paragraph that says what to do, 130 stopped
by Ctrl-C.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from workloads.resnet.records import EVAL_SPLIT, DatasetError


def folder(text: str) -> Path:
    """A path from the command line, absolute, so that remedies can be pasted anywhere."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise argparse.ArgumentTypeError(f'{text!r}: {error}') from error


def positive(text: str) -> int:
    """A number of threads from the command line."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments; each command has its own."""
    parser = argparse.ArgumentParser(
        prog='python -m data_preparation',
        description='Prepares and verifies datasets.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False)

    digits = add('digits', help='prepare the digits that scikit-learn carries')
    cifar10 = add('cifar10', help='download and prepare CIFAR-10')
    cifar10.add_argument(
        '--from',
        dest='folder',
        type=folder,
        help='a folder train|test/CLASS/*.jpg, or a tar of one, instead of the download',
    )
    imagenet = add('imagenet', help='prepare ILSVRC2012 from its two archives')
    imagenet.add_argument('--archives_dir', type=folder, help='where the archives are, or go to')
    imagenet.add_argument('--url', help='the folder to download missing archives from')
    imagenet.add_argument('--sources', type=folder, help='JSON: checksums of other archives')
    verify = add('verify', help='check a prepared dataset')
    verify.add_argument('name', choices=EVAL_SPLIT)
    verify.add_argument('--full', action='store_true', help='decode every image')
    verify.add_argument('--manifest', type=folder, help='compare with this one')
    for command in (imagenet, verify):
        command.add_argument('--workers', type=positive, default=len(os.sched_getaffinity(0)))
    for command in (digits, cifar10, imagenet, verify):
        command.add_argument('--data_dir', type=folder, default='data', help='root of all data')
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> str:
    """Runs one command and returns the line that says what came of it."""
    # Each command imports what it alone needs.
    if arguments.command == 'digits':
        from data_preparation import digits

        return _prepared('digits', digits.prepare(arguments.data_dir), arguments.data_dir)
    if arguments.command == 'cifar10':
        from data_preparation import cifar10

        directory = cifar10.prepare(arguments.data_dir, arguments.folder)
        return _prepared('cifar10', directory, arguments.data_dir)
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


def _prepared(name: str, directory: Path, data_dir: Path) -> str:
    """Sees to it that the digest of a small dataset is beside it, for runs to record."""
    from data_preparation import manifest, verify

    if not (directory / manifest.FILE_NAME).exists():
        verify.verify(name, data_dir, full=False, manifest_file=None, workers=1)
    return f'prepared: {directory}'


def main() -> int:
    """Runs one command and returns its exit status."""
    arguments = parse_arguments()
    try:
        print(run(arguments))
    except (ValueError, OSError, DatasetError) as error:
        # A write that fails for want of space does not say where.
        is_nameless = isinstance(error, OSError) and error.errno and not error.filename
        where = f' (data_dir: {arguments.data_dir})' if is_nameless else ''
        print(f'error: {error}{where}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; run the same command again to resume', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
