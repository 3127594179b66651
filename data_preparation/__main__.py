# SPDX-License-Identifier: Apache-2.0
"""The command line of data preparation; download_dataset.sh and verify_dataset.sh forward to it.

Before there is an environment they let a Python without any package check the arguments, so what
needs one is imported when it is used.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from settings.errors import REJECTED, RejectedError
from workloads.llama31_8b.datasets import FILES
from workloads.resnet.datasets import ALIASES, EVAL_SPLIT

DATA_DIR = Path(__file__).resolve().parents[1] / 'data'
STATUS = 'Exit status: 0 done, 2 an error, which says what to do, 130 stopped by Ctrl-C.'


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


# fmt: off
OPTIONS: dict[str, dict] = {
    '--from': {'dest': 'source', 'metavar': 'PATH', 'type': absolute,
               'help': 'a folder train|test/CLASS/*.jpg, or a tar of one, instead of the download'},
    '--archives_dir': {'metavar': 'PATH', 'type': absolute,
                       'help': 'the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar '
                               '(default: DIR/downloads/manual); ImageNet requires registration, '
                               'see docs/data.md'},
    '--url': {'help': 'download missing files from this folder; for ImageNet with the name and '
                      'password in IMAGENET_USER and IMAGENET_PASSWORD if the server asks'},
    '--sources': {'metavar': 'FILE', 'type': absolute,
                  'help': 'JSON with sizes and checksums of other archives of this structure'},
    '--full': {'action': 'store_true', 'help': 'decode every image, not only its header'},
    '--manifest': {'metavar': 'FILE', 'type': absolute,
                   'help': 'compare with this manifest instead of the published one'},
    '--workers': {'metavar': 'N', 'type': positive, 'default': len(os.sched_getaffinity(0)),
                  'help': 'threads or processes (default: one per core)'},
    '--raw': {'metavar': 'FOLDER', 'type': absolute,
              'help': 'make the files from the shards c4-train.*.json.gz and '
                      'c4-validation.*.json.gz in this folder'},
    '--tokenizer': {'metavar': 'FILE', 'type': absolute,
                    'help': 'the tokenizer.json of Llama 3.1, for --raw'},
    '--append_eod': {'metavar': 'TOKEN',
                     'help': 'with --raw, end every document by this token, for example '
                             '<|end_of_text|> (default: by none, as in the official preparation)'},
}
# fmt: on


def _add_options(parser: argparse.ArgumentParser, *options: str) -> None:
    help_text = 'the root of all data (default: data in the repository)'
    parser.add_argument(
        'data_dir', metavar='DIR', nargs='?', type=absolute, default=DATA_DIR, help=help_text
    )
    for option in options:
        parser.add_argument(option, **OPTIONS[option])


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments; `command` and `name` say what is to be done."""
    parser = argparse.ArgumentParser(prog='python -m data_preparation', epilog=STATUS)
    commands = parser.add_subparsers(dest='command', required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False, epilog=STATUS)
    about = 'Downloads and prepares a dataset as DIR/NAME/VERSION, if it is not there; resumes.'
    prepare = add('prepare', prog='scripts/download_dataset.sh', description=about)
    about = 'Checks a prepared dataset against metadata and manifest, and names every error.'
    verify = add('verify', prog='scripts/verify_dataset.sh', description=about)

    names = prepare.add_subparsers(dest='name', required=True, metavar='NAME')
    add = functools.partial(names.add_parser, allow_abbrev=False, epilog=STATUS)
    _add_options(add('digits', help='the digits that scikit-learn carries'))
    _add_options(add('cifar10', help='CIFAR-10'), '--from')
    _add_options(add('speeches', help='messages of presidents to Congress, as bytes'))
    c4 = add('c4', help='C4 as tokens of Llama 3.1, as MLCommons publishes it or from its texts')
    _add_options(c4, '--url', '--raw', '--tokenizer', '--append_eod', '--workers')
    imagenet = add('imagenet2012', aliases=['imagenet'], help='ILSVRC2012')
    _add_options(imagenet, '--archives_dir', '--url', '--sources', '--workers')

    known = {name: name for name in (*EVAL_SPLIT, *FILES)} | ALIASES
    verify.add_argument('name', metavar='NAME', choices=known, help=', '.join(known))
    _add_options(verify, '--full', '--manifest', '--workers')
    arguments = parser.parse_args()
    arguments.name = known[arguments.name]
    if arguments.name == 'c4' and arguments.command == 'prepare':
        if bool(arguments.raw) != bool(arguments.tokenizer) or (arguments.raw and arguments.url):
            c4.error('--raw and --tokenizer go together, and without --url')
        if arguments.append_eod is not None and not arguments.raw:
            c4.error('--append_eod needs --raw')
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Runs one command and returns the line that says what came of it."""
    from data_preparation import (
        cifar10,
        digits,
        imagenet,
        imagenet_archives,
        manifest,
        raw_c4,
        token_data,
    )  # fmt: skip
    from data_preparation.verify import verify

    name, data_dir = arguments.name, arguments.data_dir
    if arguments.command == 'verify':
        if name in FILES:
            return token_data.verify(name, data_dir)
        full, workers = arguments.full, arguments.workers
        return verify(name, data_dir, full=full, manifest_file=arguments.manifest, workers=workers)
    if name == 'c4' and arguments.raw:
        raw, tokenizer, end = arguments.raw, arguments.tokenizer, arguments.append_eod
        return f'prepared: {raw_c4.prepare(data_dir, raw, tokenizer, end, arguments.workers)}'
    if name == 'c4':
        return f'prepared: {token_data.prepare_c4(data_dir, arguments.url)}'
    if name == 'speeches':
        return f'prepared: {token_data.prepare_speeches(data_dir)}'
    if name == 'digits':
        directory = digits.prepare(data_dir)
    elif name == 'cifar10':
        directory = cifar10.prepare(data_dir, arguments.source)
    else:
        sources = imagenet_archives.OFFICIAL
        if arguments.sources:
            sources = imagenet_archives.read_sources(arguments.sources)
        archives_dir = arguments.archives_dir or data_dir / 'downloads' / 'manual'
        if arguments.url:
            imagenet_archives.fetch(arguments.url, archives_dir, sources)
        directory = imagenet.prepare(data_dir, archives_dir, sources, arguments.workers)
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
