# SPDX-License-Identifier: Apache-2.0
"""Every script is strict and explains itself from anywhere; every source file names its licence.

shellcheck, hadolint, ruff and mypy are run by scripts/run_tests.sh.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL = sorted(path for path in (ROOT / 'scripts').glob('*.sh') if path.name != 'lib.sh')
PYTHON = sorted((ROOT / 'scripts').glob('*.py'))


def source_files() -> list[Path]:
    """The Python and shell files of the repository, without what set-up and runs leave in it."""
    made = {'data', 'runs', '__pycache__'}
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in made and not f.startswith('.')]
        found += [Path(folder, name) for name in names if name.endswith(('.py', '.sh'))]
    return [ROOT / '.ci' / 'run', *(path for path in found if path.stat().st_size)]


def test_every_source_file_names_the_licence():
    without = [
        str(path.relative_to(ROOT))
        for path in source_files()
        if '# SPDX-License-Identifier: Apache-2.0\n' not in path.open().readlines()[:2]
    ]
    assert not without


@pytest.mark.parametrize('script', [*SHELL, ROOT / '.ci' / 'run'], ids=lambda path: path.name)
def test_shell_scripts_stop_at_the_first_failure(script):
    assert os.access(script, os.X_OK)
    code = [line for line in script.read_text().splitlines() if not line.startswith('#')]
    assert code[0] == 'set -euo pipefail'


@pytest.mark.parametrize('script', [*SHELL, *PYTHON], ids=lambda path: path.name)
def test_help_from_another_folder_with_a_space(script, tmp_path):
    """Help comes without any set-up: the copy of the repository has no environment."""
    root = tmp_path / 'a repository'
    root.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith('.'):
            (root / path.name).symlink_to(path)
    (root / 'scripts').unlink()
    (root / 'scripts').mkdir()
    for path in (ROOT / 'scripts').iterdir():
        if path.is_file():
            (root / 'scripts' / path.name).write_bytes(path.read_bytes())
    copy = root / 'scripts' / script.name
    interpreter = 'bash' if script.suffix == '.sh' else sys.executable
    result = subprocess.run(
        [interpreter, copy, '--help'], cwd='/', capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert script.name in result.stdout
    assert 'SPDX' not in result.stdout
    assert not (root / '.venv').exists()


@pytest.mark.parametrize('name', ['setup_env.sh', 'lock_requirements.sh', 'test_container.sh'])
def test_unknown_arguments_are_refused(name):
    result = subprocess.run(
        ['bash', ROOT / 'scripts' / name, '--nonsense'], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith('error: unknown argument --nonsense')
    assert result.stdout == ''
