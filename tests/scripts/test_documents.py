# SPDX-License-Identifier: Apache-2.0
"""What the documents say is so: links, commands, the map of modules and its drawing."""

import ast
import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documented_commands, structure
from tests.documented_commands import Rejected

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('tests/**/*.md')])
# Programs that people call; others in these folders are modules, or are called by a program.
PROGRAMS = sorted(
    path
    for folder in ('', 'scripts/**/', 'experiments/', 'speed/')
    for suffix in ('py', 'sh', 'sub')
    for path in ROOT.glob(f'{folder}*.{suffix}')
    if re.search(r'^# Usage: |ArgumentParser\(|command_line\.parse\(', path.read_text(), re.M)
)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(document):
    assert not re.findall(r'@[A-Z]+@|TODO|FIXME|XXX', document.read_text())


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_at_most_120_columns_wide(document):
    prose = re.sub(r'```.*?```', '', document.read_text(), flags=re.S)
    assert not re.findall(r'^(?!\||!\[)(?:.{121,})$', prose, re.M)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r'\]\(([^)#\s]*)#?([^)\s]*)\)', document.read_text()):
        if not target.startswith('http'):
            there = document.parent / target if target else document
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f'{target}#{anchor}'


def test_the_newest_entry_of_the_changelog_is_of_this_version():
    said = subprocess.run(
        [ROOT / 'scripts' / 'run_and_time.sh', '--version'], stdout=subprocess.PIPE, text=True
    ).stdout
    cited = (ROOT / 'CITATION.cff').read_text()
    date = re.search("^date-released: '(.*)'$", cited, re.M)[1]
    changes = (ROOT / 'CHANGELOG.md').read_text()
    assert re.search('^## (.*)$', changes, re.M)[1] == f'{said.strip()} ({date})'


def anchors(document) -> set[str]:
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r'```.*?```', '', document.read_text(), flags=re.S)
    headings = re.findall(r'^#+ (.*)$', prose, re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def rejected(commands, judge) -> list[str]:
    """Those that their own parsers, or the configuration they name, do not take."""
    said = []
    for command in commands:
        try:
            judge(documented_commands.words_of(command))
        except Rejected as error:
            said.append(f'{command}\n{error}')
    return said


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_takes(document):
    commands = documented_commands.find(document.read_text())
    assert not rejected(commands, documented_commands.judge)


@pytest.mark.parametrize('program', PROGRAMS, ids=lambda path: path.name)
def test_every_command_in_a_help_text_is_one_that_its_program_takes(program):
    commands = list(documented_commands.find_in_help(program))
    assert commands
    assert not rejected(commands, documented_commands.judge)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_fields_that_a_text_names_fit_a_configuration(document):
    found = re.findall(r'`(--config\.[^`\n]+)`', document.read_text())
    fields = [text for text in found if '=' in text and '.NAME' not in text]
    assert not rejected(fields, documented_commands.judge_fields)


@pytest.mark.parametrize(
    'command',
    [
        'python main.py --config=configs/imagenet.py --workdir=DIR --config.init_from=CHECKPOINT',
        'python main.py --config=configs/imagenet.py --workdir=DIR --config.lars_epsilon=1e-7',
        'scripts/run_and_time.sh configs/digits.py --config.batch_size=8',
        'scripts/run_and_time.sh configs/nothing.py',
        'scripts/run_and_time.sh configs/digits.py --gpus=none',
        'python scripts/launch.py --cpus=N -- main.py --config=configs/digits.py',
        'python scripts/run_seeds.py --config=configs/digits.py --runs=N --config.seed=1',
        'python scripts/report.py',
        'experiments/study_cifar10.sh --tiny',
        'python experiments/kills.py [--kills=20] [--config=DIR]',
        'scripts/download_dataset.sh imagenet --from PATH',
        'docker run training-jax scripts/run_and_time.sh --config.dtype=float8',
        'sbatch --nodes=N scripts/slurm.sub configs/imagenet.py WORKDIR --config.momentum=2',
        'python scripts/nothing.py',
        'scripts/run_seeds.py --config=configs/digits.py --runs=N',
        'pytest tests/test_nothing.py',
    ],
)
def test_a_wrong_command_would_be_found(command):
    assert list(documented_commands.find(f'`{command}`')) == [command]
    assert rejected([command], documented_commands.judge)


# Files, clocks, signals, processes, logs: a pure module imports and calls none of these.
IMPURE = {
    'datetime', 'io', 'logging', 'multiprocessing', 'os', 'pathlib', 'random', 'shutil', 'signal',
    'socket', 'subprocess', 'sys', 'tempfile', 'threading', 'time', 'input()', 'open()', 'print()',
}  # fmt: skip


def mapped() -> dict[str, bool]:
    """The modules of CONTRIBUTING.md's map by path, and whether they are marked as pure."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    found: dict[str, bool] = {}
    for title, section in re.findall(r'^### (.*)\n([^#]*)', text, re.M):
        folder = '' if title == 'Root' else title
        for name, pure in re.findall(r'^\| `([^`]+)`( \*pure\*)? \|', section, re.M):
            assert folder + name not in found, name
            found[folder + name] = bool(pure)
    return found


def test_the_map_has_every_module():
    modules = {path for path in structure.read_sources() if not path.endswith('__init__.py')}
    assert len(modules) > 60
    assert set(mapped()) == modules - {'.ci/run'}


@pytest.mark.parametrize('path', [path for path, pure in mapped().items() if pure])
def test_a_pure_module_uses_nothing_of_the_system(path):
    tree = ast.parse((ROOT / path).read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used.add(node.module.partition('.')[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used.add(f'{node.func.id}()')
    assert not used & IMPURE


def test_the_drawing_is_that_of_its_source():
    source = (ROOT / 'docs' / 'modules.dot').read_bytes()
    drawing = (ROOT / 'docs' / 'modules.svg').read_text()
    renew = 'renew it: scripts/dev/draw_modules.sh'
    assert f'SHA-256 of modules.dot: {hashlib.sha256(source).hexdigest()}' in drawing, renew


def test_the_drawing_names_the_modules_of_its_folders():
    source = (ROOT / 'docs' / 'modules.dot').read_text()
    nodes = re.findall(r'"([^"]+)" \[id="(?:([^"]+)/)?[^"/]+"', source)
    others = re.findall(r'"others of ([^"]+)" \[.*label="(.*?)"', source)
    nodes += [(names, folder) for folder, names in others]
    drawn = {
        f'{folder}/{name}.py'.lstrip('/')
        for names, folder in nodes
        for name in re.findall(r'\w+', names.replace('\\l', ' '))
    }
    folders = {folder for _, folder in nodes if folder}
    expected = {path for path in mapped() if path.rpartition('/')[0] in folders}
    assert len(expected) > 40
    assert {path for path in drawn if '/' in path} == expected
    assert drawn <= set(mapped())


def test_commands_marked_in_the_requirements_work():
    text = (ROOT / 'docs' / 'requirements.md').read_text()
    marked = re.findall(r'✓ `([^`]+)`', text)
    assert len(marked) >= 3
    for command in marked:
        words = [sys.executable if word == 'python' else word for word in shlex.split(command)]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
