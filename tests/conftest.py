# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of all tests: eight CPU devices, the digits, folders of real data.

Tests that need real images skip where the folder is absent.
"""

import os
from pathlib import Path

import pytest

import backend

# Before JAX is imported.
backend.set_xla_flags('--xla_force_host_platform_device_count=8')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'

SHARED = Path(__file__).parents[2] / 'shared'


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.skip(f'{variable} names no real images')
    return path


@pytest.fixture(scope='session')
def imagenet_sample() -> Path:
    """A folder of real ImageNet JPEGs named SYNSET_name.JPEG."""
    return _folder('IMAGENET_SAMPLE', SHARED / 'data' / 'imagenet-sample')


@pytest.fixture(scope='session')
def cifar10_jpeg() -> Path:
    """A tar of CIFAR-10 as train|test/CLASS/NNNN.jpg."""
    return _folder('CIFAR10_JPEG', SHARED / 'data' / 'cifar10-jpeg.tar.xz')


@pytest.fixture(scope='session')
def official_outputs() -> Path:
    """The folder of outputs of the official implementation that are too large to be committed."""
    return _folder('GOLDEN', SHARED / 'golden')


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> Path:
    """A data_dir with the digits prepared."""
    from data_preparation import digits

    data_dir = tmp_path_factory.mktemp('data')
    digits.prepare(data_dir)
    return data_dir
