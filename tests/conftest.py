# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: folders of real data, which the tests that need them skip without."""

import os
from pathlib import Path

import pytest

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
