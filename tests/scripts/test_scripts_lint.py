# SPDX-License-Identifier: Apache-2.0
"""Every script is strict and explains itself from anywhere; every file names its licence.

shellcheck, hadolint, ruff and mypy are run by scripts/run_tests.sh.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL = sorted(path for path in (ROOT / 'scripts').glob('*.sh') if path.name != 'lib.sh')
PYTHON = sorted((ROOT / 'scripts').glob('*.py'))


# Documents and data; LICENSE at the root speaks for these.
WITHOUT_COMMENT = {'.md', '.html', '.json', '.npz', '.png', '.svg', '.xz'}


def test_every_file_that_can_carry_a_comment_names_the_licence():
    if not (ROOT / '.git').exists():
        pytest.skip('needs the git repository')
    listing = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in names.split('\0') if name and name != 'LICENSE']
    without = [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix not in WITHOUT_COMMENT
        and 'golden' not in path.parts  # Others wrote them.
        and path.is_file()  # Git lists a removed file until the removal is committed.
        and '# SPDX-License-Identifier: Apache-2.0' not in path.read_text().splitlines()[:2]
    ]
    assert len(files) > 100
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


@pytest.mark.parametrize(
    'name', ['setup_env.sh', 'dev/lock_requirements.sh', 'dev/test_container.sh']
)
def test_unknown_arguments_are_rejected(name):
    result = subprocess.run(
        ['bash', ROOT / 'scripts' / name, '--nonsense'], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith('error: unknown argument --nonsense')
    assert result.stdout == ''
