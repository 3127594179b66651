# SPDX-License-Identifier: Apache-2.0
"""The command line of data preparation; download_dataset.sh and verify_dataset.sh forward to it.

Before there is an environment they let a Python without any package judge the arguments, so what
needs one is imported when it is used.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from settings.errors import REJECTED, RejectedError
from workloads.resnet.datasets import ALIASES, EVAL_SPLIT

DATA_DIR = Path(__file__).resolve().parents[1] / 'data'
EPILOG = 'Exit status: 0 done, 2 an error, which says what to do, 130 stopped by Ctrl-C.'


def absolute(text: str) -> Path:
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
    """The command line's arguments; `command` and `name` say what is to be done."""
    parser = argparse.ArgumentParser(prog='python -m data_preparation', epilog=EPILOG)
    commands = parser.add_subparsers(dest='command', required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False, epilog=EPILOG)
    prepare = add(
        'prepare',
        prog='scripts/download_dataset.sh',
        description='Downloads and prepares a dataset as DIR/NAME/VERSION; does nothing if it is '
        'there, and resumes what was interrupted.',
    )
    verify = add(
        'verify',
        prog='scripts/verify_dataset.sh',
        description='Checks a prepared dataset against its metadata and its manifest, and names '
        'every error.',
    )
    datasets = prepare.add_subparsers(dest='name', required=True, metavar='NAME')
    add = functools.partial(datasets.add_parser, allow_abbrev=False, epilog=EPILOG)
    digits = add('digits', help='the digits that scikit-learn carries')
    cifar10 = add('cifar10', help='CIFAR-10')
    imagenet = add('imagenet2012', aliases=['imagenet'], help='ILSVRC2012')

    verify.add_argument(
        'name', metavar='NAME', type=lambda name: ALIASES.get(name, name), choices=EVAL_SPLIT,
        help=', '.join([*EVAL_SPLIT, *ALIASES]),
    )  # fmt: skip
    for command in (digits, cifar10, imagenet, verify):
        command.add_argument(
            'data_dir', metavar='DIR', type=absolute, nargs='?', default=DATA_DIR,
            help='the root of all data (default: data in the repository)',
        )  # fmt: skip
    cifar10.add_argument(
        '--from', dest='source', metavar='PATH', type=absolute,
        help='a folder train|test/CLASS/*.jpg, or a tar of one, instead of the download',
    )  # fmt: skip
    imagenet.add_argument(
        '--archives_dir', metavar='PATH', type=absolute,
        help='the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (default: '
        'DIR/downloads/manual); ImageNet requires registration, see docs/data.md',
    )  # fmt: skip
    imagenet.add_argument(
        '--url', help='download the archives that are missing from this folder, with the name and '
        'password in IMAGENET_USER and IMAGENET_PASSWORD if the server asks for them',
    )  # fmt: skip
    imagenet.add_argument(
        '--sources', metavar='FILE', type=absolute,
        help='JSON with sizes and checksums of other archives of this structure',
    )  # fmt: skip
    verify.add_argument('--full', action='store_true', help='decode every image, not its header')
    verify.add_argument(
        '--manifest', metavar='FILE', type=absolute,
        help='compare with this manifest instead of the published one',
    )  # fmt: skip
    for command in (imagenet, verify):
        command.add_argument(
            '--workers', metavar='N', type=positive, default=len(os.sched_getaffinity(0)),
            help='threads (default: one per core)',
        )  # fmt: skip
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> str:
    """Runs one command and returns the line that says what came of it."""
    from data_preparation import cifar10, digits, imagenet, imagenet_archives, manifest
    from data_preparation.verify import verify

    name, data_dir = ALIASES.get(arguments.name, arguments.name), arguments.data_dir
    if arguments.command == 'verify':
        return verify(
            name,
            data_dir,
            full=arguments.full,
            manifest_file=arguments.manifest,
            workers=arguments.workers,
        )
    if name == 'imagenet2012':
        sources = imagenet_archives.OFFICIAL
        if arguments.sources:
            sources = imagenet_archives.read_sources(arguments.sources)
        archives_dir = arguments.archives_dir or data_dir / 'downloads' / 'manual'
        if arguments.url:
            imagenet_archives.fetch(arguments.url, archives_dir, sources)
        directory = imagenet.prepare(data_dir, archives_dir, sources, arguments.workers)
    elif name == 'cifar10':
        directory = cifar10.prepare(data_dir, arguments.source)
    else:
        directory = digits.prepare(data_dir)
    if not (directory / manifest.FILE_NAME).exists():  # Runs record the digest in it.
        verify(name, data_dir, full=False, manifest_file=None, workers=1)
    return f'prepared: {directory}'


def main() -> int:
    """Runs one command and returns its exit status."""
    arguments = parse_arguments()
    try:
        print(run(arguments))
    except (ValueError, OSError, RejectedError) as error:
        # A write that fails for want of space does not say where.
        is_nameless = isinstance(error, OSError) and error.errno and not error.filename
        where = f' (data_dir: {arguments.data_dir})' if is_nameless else ''
        print(f'error: {error}{where}', file=sys.stderr)
        return REJECTED
    except KeyboardInterrupt:
        print('stopped; run the same command again to resume', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
