# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of all tests: eight CPU devices, the digits, folders of real data.

Tests that need real images are skipped where no environment variable names them.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from settings import backend

# Before JAX is imported.
backend.configure('--xla_force_host_platform_device_count=8')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Programs that several tests and several processes compile are compiled once.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(Path(__file__).parents[1] / '.cache' / 'jax')
)
# A shell's background jobs ignore SIGINT, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module')
def compiled_quickly() -> Iterator[None]:
    """Compiles the programs of the modules that use it with hardly any optimisation.

    For tests of what is computed up to rounding. No other module must meet these programs.
    """
    import jax

    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)
    jax.clear_caches()


def _path_named_by(variable: str, content: str) -> Path:
    """The path that an environment variable holds; skips the test where it is not set.

    A path that does not exist is an error: a mistyped one must not hide tests.
    """
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f'set {variable} to {content} to run this test')
    path = Path(value)
    if not path.exists():
        pytest.fail(f'{variable}={value} does not exist; it must name {content}')
    return path


@pytest.fixture(scope='session')
def imagenet_sample() -> Path:
    """A folder of real ImageNet JPEGs named SYNSET_name.JPEG."""
    return _path_named_by('IMAGENET_SAMPLE', 'a folder of ImageNet files SYNSET_*.JPEG')


@pytest.fixture(scope='session')
def cifar10_jpeg() -> Path:
    """A tar of CIFAR-10 as train|test/CLASS/NNNN.jpg."""
    return _path_named_by('CIFAR10_JPEG', 'a tar of CIFAR-10 files train|test/CLASS/*.jpg')


@pytest.fixture(scope='session')
def official_outputs() -> Path:
    """The folder of outputs of the official implementation that are too large to be committed."""
    return _path_named_by('GOLDEN', 'the folder of official outputs (tests/golden/README.md)')


@pytest.fixture(scope='session')
def own_environment() -> dict[str, str]:
    """Variables with which scripts run in this environment, if scripts/setup_env.sh has made it.

    Any other, and one of locks that have changed since, would be made anew by them, and lost.
    """
    root, stamp = Path(__file__).parents[1], Path(sys.prefix, 'main.stamp')
    locks = (root / f'requirements-{name}.txt' for name in ('build', 'cpu', 'tools'))
    digest = hashlib.sha256(b''.join(lock.read_bytes() for lock in locks)).hexdigest()
    if not stamp.exists() or digest not in stamp.read_text().split():
        pytest.skip('needs the environment that scripts/setup_env.sh makes')
    return {'VENV': sys.prefix, 'LOCK': 'cpu'}


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> Path:
    """A data_dir with the digits prepared."""
    from data_preparation import digits

    data_dir = tmp_path_factory.mktemp('data')
    digits.prepare(data_dir)
    return data_dir
