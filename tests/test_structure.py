# SPDX-License-Identifier: Apache-2.0
"""Imports point down, the core knows no workload, and no code plays tricks.

`python -m tests.structure` prints what breaks these rules.
"""

import pytest

from tests import structure


@pytest.mark.parametrize('rule', structure.RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule):
    sources = structure.read_sources()
    assert len(sources) > 60
    assert not [str(violation) for violation in rule(sources)]


FILES = (
    'settings/rules.py', 'exact_sums.py', 'input_pipeline.py', 'train_lib.py',
    'models/llama/__init__.py', 'run_files/log.py', 'training/loop.py', 'workloads/by_name.py',
    'workloads/resnet/task.py', 'workloads/llama/task.py', 'configs/common.py', 'main.py',
)  # fmt: skip


def with_source(path, text):
    return dict.fromkeys(FILES, '') | {path: text}


@pytest.mark.parametrize(
    ('path', 'text', 'imported'),
    [
        ('settings/rules.py', 'import train_lib', 'train_lib'),
        ('settings/rules.py', 'def f():\n    from jax import numpy', 'jax.numpy'),
        ('exact_sums.py', 'from train_lib import Step', 'train_lib'),
        ('input_pipeline.py', 'from workloads.resnet import task', 'workloads.resnet.task'),
        ('models/llama/__init__.py', 'from settings import rules', 'settings.rules'),
        ('run_files/log.py', 'import training.loop', 'training.loop'),
        ('training/loop.py', 'from workloads import by_name', 'workloads.by_name'),
        ('workloads/resnet/task.py', 'from ..llama import task', 'workloads.llama.task'),
        ('configs/common.py', 'from main import main', 'main'),
    ],
)
def test_an_import_against_the_arrows_is_found(path, text, imported):
    (found,) = structure.wrong_imports(with_source(path, text))
    assert found == (path, len(text.splitlines()), f'imports {imported}')


@pytest.mark.parametrize(
    ('path', 'text'),
    [
        ('training/loop.py', 'import jax, train_lib, exact_sums\nfrom run_files import log'),
        ('workloads/by_name.py', 'from workloads.resnet import task\nimport workloads.llama.task'),
        ('workloads/llama/task.py', 'from models import llama\nfrom training.loop import Run'),
        ('main.py', 'from workloads import by_name\nfrom training import loop'),
    ],
)
def test_an_import_along_the_arrows_is_allowed(path, text):
    assert structure.wrong_imports(with_source(path, text)) == []


def test_a_circle_is_found_through_functions_and_packages():
    sources = {
        'a/__init__.py': 'from a.b import f',
        'a/b.py': 'import json\ndef f():\n    from c import g',
        'c.py': 'import a',
    }
    (found,) = structure.circles(sources)
    assert sorted(found.text.partition(': ')[2].split(' → ')[1:]) == ['a', 'a.b', 'c']
    assert structure.circles(sources | {'c.py': ''}) == []


@pytest.mark.parametrize(
    ('path', 'text', 'trick'),
    [
        ('a.py', 'from jax._src import cache_key', 'jax._src.cache_key'),
        ('a.py', 'import jax\njax._src.config.x', 'jax._src'),
        ('a.py', 'import os\ndef f():\n    os._exit(1)', 'os._exit'),
        ('a.py', 'from sys import modules', 'sys.modules'),
        ('a.py', "import sys\nsys.path.insert(0, '.')", 'sys.path'),
        ('a.sh', 'python -c "import sys; sys.path.append(1)"', 'sys.path'),
    ],
)
def test_a_trick_is_found(path, text, trick):
    (found,) = structure.tricks({path: text})
    assert found == (path, len(text.splitlines()), f'uses {trick}')


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('batch["image"]', ['image']),
        ('images_per_second = 3', ['images']),
        ('# Top1 and ResNet-50 alike', ['Top1', 'ResNet']),
        ('class ImageCache:', ['Image']),
        ("'resnet18_cifar'", ['resnet18']),
        ('bn_span', ['bn_span']),
        ('self.batch_stats_now', ['batch_stats']),
        ('fc1 = llama31_8b', ['fc1', 'llama31']),
        ('imagery, stopping, fcntl', []),
    ],
)
def test_a_word_of_a_workload_is_found(line, words):
    assert list(structure.words_in(line)) == words
    found = structure.workload_words({'training/loop.py': f'\n{line}'})
    assert [violation.line for violation in found] == [2] * bool(words)
    assert structure.workload_words({'workloads/resnet/task.py': line}) == []
