# SPDX-License-Identifier: Apache-2.0
"""What the documents say is so: links lead somewhere, commands name what exists and work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hyperparameters

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('tests/**/*.md')])
CODE = re.compile(r'```sh\n(.*?)```|`([^`\n]+)`', re.S)


def commands(document):
    """Every command in a document, without its comment."""
    for block, inline in CODE.findall(document.read_text()):
        for line in (block or inline).splitlines():
            line = line.split(' #')[0].strip()
            if re.match(r'(scripts/\S+\.(sh|py)|python|pytest)( |$)', line):
                yield line


def blocks(document):
    return re.findall(r'```sh\n(.*?)```', document.read_text(), re.S)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(document):
    assert not re.findall(r'@[A-Z]+@|TODO|FIXME|XXX', document.read_text())


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', document.read_text()):
        if not target.startswith('http'):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_and_flags_that_exist(document):
    for command in commands(document):
        for word in shlex.split(command):
            if re.fullmatch(r'(scripts|tests|configs|benchmarks)/[\w./]+\.(py|sh|sub)', word):
                assert (ROOT / word).is_file(), command
            flag = re.match(r'--config\.(\w+)=', word)
            assert not flag or flag[1] == 'NAME' or flag[1] in hyperparameters.BY_NAME, command


def test_commands_marked_in_the_requirements_work():
    text = (ROOT / 'docs' / 'requirements.md').read_text()
    marked = re.findall(r'✓ `([^`]+)`', text)
    assert len(marked) >= 3
    for command in marked:
        words = [sys.executable if word == 'python' else word for word in shlex.split(command)]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_readmes_commands_work(tmp_path):
    """The commands of its blocks, to the letter, but for where they write."""
    environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    environment |= {'VENV': sys.prefix, 'LOCK': 'cpu'}
    ran = 0
    for block in blocks(ROOT / 'README.md'):
        for line in block.splitlines():
            command = line.split(' #')[0].strip()
            if command.startswith('scripts/run_tests.sh'):
                continue  # This is it.
            if 'run_and_time.sh' in command:
                command += f' --workdir={tmp_path / str(ran)}'
            done = subprocess.run(
                command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
            ran += 1
    assert ran >= 4
