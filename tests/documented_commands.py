# SPDX-License-Identifier: Apache-2.0
"""Finds the commands that documents and help texts name, and puts them to the real parsers.

`find` takes text and yields commands; `judge` parses a command as the program would, resolves its
configuration, and raises `Rejected` where the program would reject it. Nothing is run, prepared or
written.
"""

import argparse
import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import main
from data_preparation import __main__ as data_preparation
from scripts import launch, run_seeds

ROOT = Path(__file__).parents[1]
RESNET = ('imagenet', 'imagenet:sgd', 'cifar10', 'cifar10:sgd', 'cifar10_small', 'digits')
CONFIGS = (*RESNET, 'llama31_8b', 'speeches')
LAUNCHERS = r'(\S*/)?(python|pytest|docker|sbatch|mpirun|tensorboard) '
COMMAND = re.compile(
    rf'{LAUNCHERS}|(scripts|experiments|speed)/\S+\.(sh|py)( |$)|[a-z_]+\.(py|sub) -'
)
# What stands for a value, and one to put there.
PLACEHOLDERS = {
    r'START:STOP': '1:2',
    r'HOST:PORT': 'localhost:1234',
    r'\bPARENT\b': '1',
    r'\bCONFIG\b': 'configs/digits.py',
    r'\bNAME\b': 'digits',
    r'ARGUMENT…': '--config=configs/digits.py --workdir=DIR',
    r'\b[NJKILDMS]\b': '2',
    r'--(config)=…': r'--\1=configs/digits.py',
    r'=…': '=2',
    r'\.\.\.|…': '',
    r'<[^>]*>': 'value',
}


class Rejected(Exception):
    """A command that its program would not take; the text says why."""


class _Parsed(BaseException):
    """Raised where a program has parsed its arguments and would begin."""


def find(text: str) -> Iterator[str]:
    """The commands in a Markdown text: in fenced blocks and between backticks."""
    for block, inline in re.findall(r'```(?:sh)?\n(.*?)```|`([^`\n]+)`', text, re.S):
        if block or ' ' in inline:  # A name alone is a mention.
            yield from _lines((block or inline).splitlines())


def find_in_help(path: Path) -> Iterator[str]:
    """The commands in a script's help: indented in a docstring, or after `Usage:`."""
    if path.suffix == '.py':
        help_text = ast.get_docstring(ast.parse(path.read_text()), clean=True) or ''
        lines = re.sub(
            r'\n {8,}', ' ', help_text
        ).splitlines()  # A long command is indented further.
        lines = [line.strip() for line in lines if line.startswith('    ')]
        named_alone = f'{path.name} '
        lines = [
            f'python {path.relative_to(ROOT)} {line.removeprefix(named_alone)}'
            if line.startswith(named_alone)
            else line
            for line in lines
        ]
    else:
        lines = re.findall(r'^# Usage: (.*)', path.read_text(), re.M)
    yield from _lines(lines)


def _lines(lines: list[str]) -> Iterator[str]:
    joined = '\n'.join(lines).replace('\\\n', ' ')
    for line in joined.splitlines():
        command = re.sub(r'^([A-Z_]+=\S*\s+|\$ )+', '', line.strip()).split(' #')[0].strip()
        if COMMAND.match(command):
            yield command


def words_of(command: str) -> list[str]:
    """Its words, with optional flags, a value for every placeholder, the first of alternatives."""
    command = re.sub(r'\[(--.*?)\]', r'\1', command)
    command = re.sub(r'\[.*?\]|\(.*?\)', '', command)
    command = re.sub(r'\{\s*([^|}]*?)\s*\|[^}]*\}', r'\1', command)
    command = re.sub(r'(\S+) \| \S+', r'\1', command)
    command = re.sub(r'--config\.NAME=\S+', '', command)
    for pattern, value in PLACEHOLDERS.items():
        command = re.sub(pattern, value, command)
    return shlex.split(command)


def judge(words: list[str]) -> None:
    """Puts a command to the parser of its program.

    Raises:
      Rejected: when that would not take it, or there is no such program.
    """
    program, *arguments = words
    name = Path(program).name
    if name in ('docker', 'mpirun'):
        # What they start; the options before it are their own.
        inner = [i for i, word in enumerate(arguments) if re.search(r'\.(sh|py)$', word)]
        if inner:
            judge(arguments[inner[0] :])
    elif name == 'sbatch':
        script = next(i for i, word in enumerate(arguments) if word.endswith('.sub'))
        _exists(arguments[script])
        config, workdir, *fields = arguments[script + 1 :]
        judge(['main.py', f'--config={config}', f'--workdir={workdir}', *fields])
    elif name == 'pytest':
        for word in arguments:
            if word.startswith('tests/'):
                _exists(word)
    elif name == 'python' and arguments[0] == '-m':
        _judge_module(arguments[1], arguments[2:])
    elif name == 'python':
        _judge_program(arguments[0], arguments[1:])
    elif name != 'tensorboard':
        if '/' in program and not os.access(_exists(program), os.X_OK):
            raise Rejected(f'{program} is not executable; python {program}')
        _judge_program(program, arguments)


def _judge_program(program: str, arguments: list[str]) -> None:
    """A program of this repository, by its path or, for those that are named alone, by its name."""
    name = Path(program).name
    if name in _BY_PARSER:
        _quietly(_BY_PARSER[name], arguments)
        return
    file = _exists(program if '/' in program else f'scripts/{program}')
    if file.suffix == '.py':
        _until_parsed(program, runpy.run_path, arguments)
    elif name in ('run_and_time.sh', 'download_dataset.sh', 'verify_dataset.sh'):
        _judge_shell(name, arguments)
    else:
        _judge_by_help(file, arguments)


def _exists(path: str) -> Path:
    file = ROOT / path
    if not file.exists():
        raise Rejected(f'there is no {path}')
    return file


def _quietly(call: Callable[[list[str]], int | None], arguments: list[str]) -> None:
    """Calls a program that ends with an exit status; 0 and None are success."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = call(arguments)
        except SystemExit as end:
            status = 0 if end.code is None else 2
            status = end.code if isinstance(end.code, int) else status
        except ValueError as error:
            raise Rejected(str(error)) from error
    if status:
        raise Rejected(said.getvalue())


def _judge_main(arguments: list[str]) -> int:
    """main.py, up to the run itself."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(main, 'run', return_value=0):
            return main.main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _judge_run_seeds(arguments: list[str]) -> None:
    flags, fields = run_seeds.parse_flags(arguments)
    run_seeds.resolve(flags.config, fields)


def _judge_launch(arguments: list[str]) -> None:
    judge(launch.parse_flags(arguments)[1])


def _judge_data_preparation(arguments: list[str]) -> None:
    with mock.patch.object(sys, 'argv', ['data_preparation', *arguments]):
        data_preparation.parse_arguments()


def _judge_module(name: str, arguments: list[str]) -> None:
    if name == 'data_preparation':
        _quietly(_judge_data_preparation, arguments)
    elif name.startswith('speed.'):
        _until_parsed(name, runpy.run_module, arguments)
    # Others, such as mlperf_logging.rcp_checker, are not ours.


def _until_parsed(program: str, run: Callable, arguments: list[str]) -> None:
    """Runs a program of ours up to where it has parsed its arguments."""
    parse, parse_known = (
        argparse.ArgumentParser.parse_args,
        argparse.ArgumentParser.parse_known_args,
    )

    def stop(*args, **kwargs):
        with mock.patch.object(argparse.ArgumentParser, 'parse_known_args', parse_known):
            parse(*args, **kwargs)
        raise _Parsed

    def stop_known(*args, **kwargs):
        parse_known(*args, **kwargs)
        raise _Parsed

    def start(arguments: list[str]) -> int:
        with (
            mock.patch.object(argparse.ArgumentParser, 'parse_args', stop),
            mock.patch.object(argparse.ArgumentParser, 'parse_known_args', stop_known),
            mock.patch.object(sys, 'argv', [program, *arguments]),
            mock.patch.object(sys, 'path', [str(ROOT), *sys.path]),
            contextlib.suppress(_Parsed),
        ):
            run(str(ROOT / program) if '/' in program else program, run_name='__main__')
        return 0

    _quietly(start, arguments)


def _judge_shell(name: str, arguments: list[str]) -> None:
    """Runs a copy of a shell script whose environment's Python only notes what it is asked."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scripts, asked = root / 'scripts', root / 'asked'
        scripts.mkdir()
        for file in (name, 'lib.sh'):
            shutil.copy(ROOT / 'scripts' / file, scripts)
        python = root / 'venv' / 'bin' / 'python'
        python.parent.mkdir(parents=True)
        for stub, body in (
            (scripts / 'setup_env.sh', 'exit 0'),
            # Status 9, so that the script ends here.
            (python, f'for word in "$@"; do printf "%s\\0" "$word"; done > "{asked}"; exit 9'),
        ):
            stub.write_text(f'#!/bin/sh\n{body}\n')
            stub.chmod(0o755)
        done = subprocess.run(
            ['bash', scripts / name, *arguments],
            cwd=ROOT,
            env={'PATH': '/usr/bin:/bin', 'VENV': str(root / 'venv')},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return  # Its help.
        if not asked.exists():
            raise Rejected(done.stderr)
        words = asked.read_text().split('\0')[:-1]
    if words[0] == '-c':  # The arguments of data preparation, judged before anything is made.
        _quietly(_judge_data_preparation, words[2:])
    else:
        _quietly(_judge_main, words[1:])


def _judge_by_help(file: Path, arguments: list[str]) -> None:
    """A flag of a shell script must be in the comment that is its help, which it may print."""
    text, _, body = file.read_text().partition('\nset -')
    if arguments == ['--help'] and '--help)' in body:
        return
    for word in arguments:
        flag = word.partition('=')[0]
        if flag.startswith('-') and not re.search(rf'{re.escape(flag)}\b', text):
            raise Rejected(f'{file.name} has no {flag}')
        if word.startswith('tests/'):
            _exists(word)


_BY_PARSER: dict[str, Callable[[list[str]], int | None]] = {
    'main.py': _judge_main,
    'run_seeds.py': _judge_run_seeds,
    'launch.py': _judge_launch,
}


def judge_fields(fields: list[str]) -> None:
    """Fields that a text says to add: right for at least one of the configurations.

    Raises:
      Rejected: when they are wrong for every one.
    """
    reasons = []
    for config in CONFIGS:
        name, _, argument = config.partition(':')
        specification = f'configs/{name}.py' + f':{argument}' * bool(argument)
        try:
            _quietly(_judge_main, [f'--config={specification}', '--workdir=unused', *fields])
        except Rejected as error:
            reasons.append(str(error))
        else:
            return
    raise Rejected('\n'.join(reasons))
