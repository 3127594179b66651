# SPDX-License-Identifier: Apache-2.0
"""Variables have torchvision's names and layouts, bit for bit; what is not a model's is named."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from models.resnet.architectures import ARCHITECTURES
from settings.errors import CheckpointError
from tests import harness
from tests.random_weights import random_variables
from workloads import weight_files
from workloads.resnet import torchvision


@pytest.mark.parametrize('model', ARCHITECTURES)
def test_mapping_is_its_own_inverse(model):
    """Every model, bit for bit; names are unique; counters hold the step."""
    variables = random_variables(model, num_classes=7)
    state = torchvision.to_state_dict(variables, step=5)
    counters = [name for name in state if name.endswith('num_batches_tracked')]
    assert len(state) - len(counters) == len(jax.tree.leaves(variables))
    assert all(state[name] == 5 for name in counters)
    assert torchvision.identify(state) == model
    assert harness.is_same(torchvision.from_state_dict(state), variables)


def test_names_are_torchvisions():
    state = torchvision.to_state_dict(random_variables('resnet50', 1000), step=0)
    assert len(state) == 320  # As torchvision.models.resnet50().state_dict().
    assert state['conv1.weight'].shape == (64, 3, 7, 7)
    assert state['layer1.0.conv1.weight'].shape == (64, 64, 1, 1)
    assert state['layer1.0.downsample.0.weight'].shape == (256, 64, 1, 1)
    assert state['layer4.2.bn3.running_mean'].shape == (2048,)
    assert state['bn1.num_batches_tracked'].dtype == np.int64
    assert state['fc.weight'].shape == (1000, 2048)


# What is done to a good file, and what the error must name.
PROBLEMS = {
    'missing': (lambda s: s.pop('layer2.0.bn1.running_var'), 'missing: layer2.0.bn1.running_var'),
    'extra': (lambda s: s.update(extra=s['fc.bias']), 'not known: extra'),
    'shape': (lambda s: s.update({'bn1.bias': s['fc.bias']}), 'bn1.bias [10] instead of [16]'),
    'half': (
        lambda s: s.update({'fc.bias': s['fc.bias'].astype(np.float16)}), 'float32.*fc.bias F16'
    ),
    'double': (
        lambda s: s.update({'fc.bias': s['fc.bias'].astype(np.float64)}), 'float32.*fc.bias F64'
    ),
    'integers': (
        lambda s: s.update({'fc.bias': s['fc.bias'].astype(np.int64)}), 'fc.bias int64'
    ),
    'counter': (
        lambda s: s.update({'bn1.num_batches_tracked': np.zeros(3, np.int64)}),
        'bn1.num_batches_tracked [3] instead of []'
    ),
    'stray counter': (
        lambda s: s.update({'x.num_batches_tracked': np.array(1)}), 'not known: x.num_batches'
    ),
    'no classes': (
        lambda s: s.update({'fc.weight': np.zeros((0, 64), np.float32)}), 'fc.weight [0, 64]'
    ),
    'NaN': (lambda s: s['fc.bias'].__setitem__(3, np.nan), 'NaN or infinite: fc.bias'),
    'infinite': (
        lambda s: s['layer1.0.conv1.weight'].__setitem__((0, 0, 0, 0), -np.inf),
        'NaN or infinite: layer1.0.conv1.weight'
    ),
    'variance': (
        lambda s: s['bn1.running_var'].__setitem__(0, -1e-30), 'variances below 0: bn1.running_var'
    ),
    'head': (lambda s: s.pop('fc.weight'), 'missing: fc.weight'),
    'empty': (lambda s: s.clear(), 'missing: '),
}  # fmt: skip


@pytest.mark.parametrize('problem', PROBLEMS)
def test_wrong_keys_are_named(tmp_path, problem):
    """Missing, extra, wrong shape, wrong precision."""
    spoil, expected = PROBLEMS[problem]
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    spoil(state)
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=expected.replace('[', r'\[')):
        torchvision.from_state_dict(weight_files.read(tmp_path / 'in.safetensors')[0])


def test_wrong_architecture_is_named():
    """The nearest model, and the keys that differ from it."""
    state = torchvision.to_state_dict(random_variables('resnet50', 1000), step=0)
    del state['layer3.5.conv1.weight'], state['layer3.5.conv2.weight']
    with pytest.raises(CheckpointError, match=r'resnet50, the nearest.*\n.*layer3.5.conv1.weight'):
        torchvision.from_state_dict(state)
    with pytest.raises(CheckpointError, match=r'not those of resnet_digits:\n.*missing|not known'):
        torchvision.from_state_dict(state, 'resnet_digits')
