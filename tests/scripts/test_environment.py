# SPDX-License-Identifier: Apache-2.0
"""The locks hold what they should, for a V100 too; set-up installs them and mends what broke."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_PYTHON = Path(__file__).parent / 'fake_python.sh'

# A set of CUDA 12 wheels that resolves and has code for Volta (sm_70), as read in the wheels. cuDNN
# 9.11 dropped it; JAX 0.10.2 refuses cuDNN below 9.8 and 9.10.0.
VOLTA = {
    'jax': '0.10.2',
    'jaxlib': '0.10.2',
    'jax-cuda12-plugin': '0.10.2',
    'jax-cuda12-pjrt': '0.10.2',
    'nvidia-cudnn-cu12': '9.10.2.21',
    'nvidia-nccl-cu12': '2.29.7',
    'nvidia-cublas-cu12': '12.9.3.13',
    'nvidia-cufft-cu12': '11.4.1.4',
    'nvidia-cusolver-cu12': '11.7.5.82',
    'nvidia-cusparse-cu12': '12.5.10.65',
    'nvidia-cuda-nvcc-cu12': '12.9.86',
    'nvidia-cuda-nvrtc-cu12': '12.9.86',
    'nvidia-cuda-runtime-cu12': '12.9.79',
    'nvidia-cuda-cupti-cu12': '12.9.79',
    'nvidia-cuda-cccl-cu12': '12.9.27',
    'nvidia-nvjitlink-cu12': '12.9.86',
    'nvidia-nvshmem-cu12': '3.8.0',
}


def read_lock(name: str) -> dict[str, str]:
    """Package -> version of a lock; fails unless every entry has an exact version and hashes."""
    text = re.sub(r'^#.*\n', '', (ROOT / name).read_text(), flags=re.MULTILINE)
    entries = [entry.split() for entry in text.replace('\\\n', ' ').splitlines()]
    locked = {}
    for requirement, *hashes in entries:
        assert re.fullmatch(r'[a-z0-9-]+==[\w.]+', requirement), requirement
        assert hashes, f'{requirement} has no hash'
        assert all(re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', h) for h in hashes), requirement
        package, locked[package] = requirement.split('==')
    return locked


@pytest.mark.parametrize('name', ['build', 'cpu', 'cuda13', 'tools', 'test'])
def test_every_version_is_exact_and_hashed(name):
    assert read_lock(f'requirements-{name}.txt')


def test_gpu_lock_works_on_a_v100():
    locked = read_lock('requirements.txt')
    assert {package: locked.get(package) for package in VOLTA} == VOLTA


@pytest.mark.parametrize(('name', 'other'), [('', set()), ('-cuda13', {'jax', 'jaxlib'})])
def test_gpu_locks_are_the_cpu_lock_and_cuda(name, other):
    gpu, cpu = read_lock(f'requirements{name}.txt'), read_lock('requirements-cpu.txt')
    assert {p for p in cpu if gpu[p] != cpu[p]} == other
    cuda = gpu.keys() - cpu.keys()
    assert cuda == {p for p in gpu if p.startswith('nvidia-') or 'cuda' in p}


def test_training_needs_no_other_framework():
    others = {'tensorflow', 'tensorflow-cpu', 'tf-nightly', 'torch', 'torchvision', 'keras'}
    assert not others & read_lock('requirements.txt').keys()


@pytest.mark.parametrize(('lock', 'base'), [('tools', 'cpu'), ('test', 'cpu'), ('test', 'tools')])
def test_locks_agree_on_what_they_share(lock, base):
    ours, theirs = read_lock(f'requirements-{lock}.txt'), read_lock(f'requirements-{base}.txt')
    shared = ours.keys() & theirs.keys()
    assert {p: ours[p] for p in shared} == {p: theirs[p] for p in shared}


def test_training_locks_hold_no_tool():
    lines = (ROOT / 'requirements-tools.in').read_text().splitlines()
    tools = {re.split('[ =]', line)[0].lower() for line in lines if not line.startswith(('#', '-'))}
    assert tools <= read_lock('requirements-tools.txt').keys()
    assert not tools & read_lock('requirements.txt').keys()


@pytest.mark.parametrize('name', ['cpu', 'tools', 'test'])
def test_this_environment_is_the_locked_one(name):
    if name == 'cpu' and sys.version_info[:2] == (3, 12):
        name = 'cuda13'
    locked = read_lock(f'requirements-{name}.txt')
    assert {package: version(package) for package in locked} == locked


def handles_absence(node: ast.Try) -> bool:
    """Whether it continues where a module is not installed."""
    return any(
        getattr(handler.type, 'id', '') in ('ImportError', 'ModuleNotFoundError')
        for handler in node.handlers
    )


def imported_by(node: ast.AST) -> Iterator[str]:
    """The modules, and perhaps names in them, that a file cannot do without."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (f'{node.module}.{name.name}' for name in node.names)
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Try) and handles_absence(node) and child in node.body):
            yield from imported_by(child)


def our_file(module: str) -> Path | None:
    """The file of a module of this repository; of a package if `module` is a name in it."""
    path = ROOT.joinpath(*module.split('.'))
    found = (path.with_suffix('.py'), path / '__init__.py', path.parent.with_suffix('.py'))
    return next((file for file in found if file.is_file()), None)


def packages_of(files: Iterable[Path]) -> dict[str, set[str]]:
    """Each package that these files import, themselves or through others of ours, and by which."""
    names = packages_distributions()
    waiting, seen = list(files), set()
    packages: dict[str, set[str]] = {}
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in imported_by(ast.parse(file.read_text())):
            top = module.partition('.')[0]
            if ours := our_file(module):
                waiting.append(ours)
            elif top not in sys.stdlib_module_names and not (ROOT / top).is_dir():
                for package in names.get(top, [top]):
                    name = re.sub(r'[-_.]+', '-', package).lower()
                    packages.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return packages


def test_training_imports_only_what_its_lock_holds():
    locked = read_lock('requirements-cpu.txt')
    # main.py says what to do where the first is absent, and finds the workloads by their names.
    files = [ROOT / 'main.py', ROOT / 'workloads/by_name.py', *ROOT.glob('workloads/*/workload.py')]
    assert {p: by for p, by in packages_of(files).items() if p not in locked} == {}


def test_every_program_imports_only_what_the_locks_hold():
    """But for PyTorch, without which the converter reads and writes .safetensors alone."""
    locked = {**read_lock('requirements-cpu.txt'), **read_lock('requirements-tools.txt')}
    apart = ('tests', 'speed', 'experiments')  # They have requirements of their own.
    names = subprocess.run(
        ['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = [ROOT / name for name in names if not name.startswith(apart)]
    assert len(files) > 60
    missing = {p: by for p, by in packages_of(files).items() if p not in locked}
    assert missing in ({}, {'torch': {'workloads/weight_files.py'}})


@pytest.mark.slow
def test_gpu_lock_installs_on_python_3_11():
    """Pip finds every package with a hash of the lock, and none asks for one that is not there."""
    assert sys.version_info[:2] == (3, 11)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--dry-run', '--ignore-installed']
    lock = ['--require-hashes', '--no-build-isolation', '-r', str(ROOT / 'requirements.txt')]
    subprocess.run([*pip, *lock], check=True)


@pytest.fixture
def small_repository(tmp_path):
    """The set-up script with locks of two small packages, in a folder with a space in its name."""
    root = tmp_path / 'a repository'
    shutil.copytree(ROOT / 'scripts', root / 'scripts')
    lock = (ROOT / 'requirements-cpu.txt').read_text()
    for name in ('cpu', 'tools', 'test', 'build', 'torch'):
        (root / f'requirements-{name}.txt').write_text('')
    packages = ['absl-py', 'six']
    entries = [re.findall(rf'^{p}==(?:.*\\\n)*.*\n', lock, re.MULTILINE) for p in packages]
    (root / 'requirements-cpu.txt').write_text(''.join(entry for (entry,) in entries))
    return root


def set_up(root: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs set-up of `root` from another folder, as on a machine without a GPU."""
    return subprocess.run(
        [root / 'scripts' / 'setup_env.sh', '--cpu'],
        cwd='/',
        env={'PATH': '/usr/bin:/bin', 'PYTHON': sys.executable, **pip_settings(), **environment},
        capture_output=True,
        text=True,
    )


def pip_settings() -> dict[str, str]:
    """How this machine reaches its package index."""
    return {k: v for k, v in os.environ.items() if k.startswith('PIP_') or k == 'HOME'}


@pytest.mark.slow
def test_set_up_makes_an_environment_once_and_mends_it(small_repository):
    root = small_repository
    packages = root / '.venv' / 'lib' / 'python3.11' / 'site-packages'
    first = set_up(root)
    assert first.returncode == 0, first.stderr
    assert (packages / 'six.py').exists()
    assert set_up(root).stdout == ''

    # A changed lock.
    lock = root / 'requirements-cpu.txt'
    lock.write_text(lock.read_text() + '# another\n')
    assert 'ready' in set_up(root).stdout
    # An interrupted set-up: no stamp yet, and not everything in it.
    (root / '.venv' / 'main.stamp').unlink()
    (packages / 'six.py').unlink()
    assert 'ready' in set_up(root).stdout
    assert (packages / 'six.py').exists()
    # A Python that is gone.
    (root / '.venv' / 'bin' / 'python').unlink()
    assert 'ready' in set_up(root).stdout
    assert (root / '.venv' / 'bin' / 'python').exists()


def test_set_up_refuses_what_is_no_environment(small_repository):
    (small_repository / '.venv').mkdir()
    (small_repository / '.venv' / 'work.txt').write_text('mine')
    result = set_up(small_repository)
    assert result.returncode == 2
    assert 'is no virtual environment' in result.stderr
    assert (small_repository / '.venv' / 'work.txt').read_text() == 'mine'


def test_set_up_names_the_python_it_needs(small_repository, tmp_path):
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('python3.11', 'python', 'python3'):
        shutil.copy(FAKE_PYTHON, programs / name)
    result = set_up(small_repository, PATH=f'{programs}:/usr/bin:/bin', PYTHON='')
    assert result.returncode == 2
    assert result.stderr.startswith('error: Python 3.11 was not found')
    assert f'{programs}/python3 is Python 3.12.1' in result.stderr
    assert not (small_repository / '.venv').exists()
