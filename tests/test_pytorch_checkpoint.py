# SPDX-License-Identifier: Apache-2.0
"""Checkpoints cross to PyTorch's form and back without loss, and bad input leaves no trace."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import checkpointing
import models
import pytorch_checkpoint
from pytorch_checkpoint import CheckpointError
from tests import harness
from tests.range_server import RangeServer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'scripts' / 'convert_checkpoint.py'
CONFIG = {
    'model': 'resnet_digits',
    'padding': 'symmetric',
    'image_size': 8,
    'augmentation': 'pad_crop',
    'seed': 2**62 + 1,
    'weight_decay': 0.0002,
}


def random_variables(model: str, num_classes: int = 10, seed: int = 0) -> dict:
    """Random values for every variable of a model, statistics included."""
    rng = np.random.default_rng(seed)
    net = models.create(model, num_classes=num_classes, bn_span=1)
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of the digits' model after 123 steps."""
    path = tmp_path / 'run' / '123'
    path.parent.mkdir()
    tree = {'variables': random_variables('resnet_digits'), 'step': np.int32(123)}
    checkpointing.write(path, tree, {'step': 123, 'config': CONFIG})
    return path


@pytest.fixture
def convert(capsys):
    """Runs the script in this process; its output, or its error where it is refused."""
    spec = importlib.util.spec_from_file_location('convert_checkpoint', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments, status: int = 0) -> str:
        returned, printed = script.main([str(a) for a in arguments]), capsys.readouterr()
        assert returned == status, printed.err
        return printed.err if status else printed.out

    return run


def test_script_runs_by_itself(checkpoint, tmp_path):
    """From any folder; the exit status and the error are a user's, not a programmer's."""
    command = [sys.executable, SCRIPT, 'to-pytorch', checkpoint, tmp_path / 'none' / 'out.pth']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('error: there is no folder')


@pytest.mark.parametrize('model', models.NAMES)
def test_mapping_is_its_own_inverse(model):
    """Every model, bit for bit; names are unique; counters hold the step."""
    variables = random_variables(model, num_classes=7)
    state = pytorch_checkpoint.to_state_dict(variables, step=5)
    counters = [name for name in state if name.endswith('num_batches_tracked')]
    assert len(state) - len(counters) == len(jax.tree.leaves(variables))
    assert all(state[name] == 5 for name in counters)
    assert pytorch_checkpoint.identify(state) == model
    assert harness.is_same(pytorch_checkpoint.from_state_dict(state), variables)


def test_names_are_torchvisions():
    state = pytorch_checkpoint.to_state_dict(random_variables('resnet50', 1000), step=0)
    assert len(state) == 320  # As torchvision.models.resnet50().state_dict().
    assert state['conv1.weight'].shape == (64, 3, 7, 7)
    assert state['layer1.0.conv1.weight'].shape == (64, 64, 1, 1)
    assert state['layer1.0.downsample.0.weight'].shape == (256, 64, 1, 1)
    assert state['layer4.2.bn3.running_mean'].shape == (2048,)
    assert state['bn1.num_batches_tracked'].dtype == np.int64
    assert state['fc.weight'].shape == (1000, 2048)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_round_trip_through_a_file(convert, checkpoint, tmp_path, suffix):
    """Ours to PyTorch to ours: weights, statistics, step and configuration, bit for bit."""
    if suffix == 'pth':
        pytest.importorskip('torch')
    file, back = tmp_path / f'out.{suffix}', tmp_path / 'back'
    convert('to-pytorch', checkpoint, file)
    convert('from-pytorch', file, back)
    (ours, record), (theirs, record_back) = checkpointing.read(checkpoint), checkpointing.read(back)
    assert harness.is_same(ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert record_back['config'] == record['config']
    assert record_back['step'] == record['step'] == 123
    _, metadata = pytorch_checkpoint.read(file)
    facts = json.loads(metadata['preprocessing'])
    assert facts['mean'] == [123.68, 116.78, 103.94]
    assert facts['image_size'] == 8


def test_pth_file_loads_without_code(convert, checkpoint, tmp_path):
    """`torch.load(weights_only=True)` gives what a PyTorch module's `load_state_dict` takes."""
    torch = pytest.importorskip('torch')
    from tests import torchvision_models

    convert('to-pytorch', checkpoint, tmp_path / 'out.pth')
    state = torch.load(tmp_path / 'out.pth', weights_only=True)
    torchvision_models.create('resnet_digits', 10).load_state_dict(state, strict=True)


def test_files_of_parameters_are_read(tmp_path):
    """Old files hold `nn.Parameter`s, whose values ask for a gradient."""
    torch = pytest.importorskip('torch')
    torch.save({'fc.bias': torch.nn.Parameter(torch.ones(3))}, tmp_path / 'in.pth')
    assert pytorch_checkpoint.read(tmp_path / 'in.pth')[0]['fc.bias'].tolist() == [1, 1, 1]


def test_torchvision_input_is_folded(convert, checkpoint, tmp_path):
    """For inputs scaled as torchvision's, with our means, the network is the same."""
    torch = pytest.importorskip('torch')
    from tests import torchvision_models

    variables = checkpointing.read(checkpoint)[0]['variables']
    variables['batch_stats'] = jax.tree.map(np.abs, variables['batch_stats'])
    other = checkpoint.parent / '124'
    checkpointing.write(other, {'variables': variables, 'step': np.int32(124)}, {'config': CONFIG})
    text = convert('to-pytorch', other, tmp_path / 'out.safetensors', '--input=torchvision')
    assert '-0.005, -0.500, -0.410' in text
    state, metadata = pytorch_checkpoint.read(tmp_path / 'out.safetensors')
    facts = json.loads(metadata['preprocessing'])

    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3))
    images = (pixels - np.array([123.68, 116.78, 103.94])).astype(np.float32)
    net = models.create('resnet_digits', num_classes=10, bn_span=1)
    expected = jax.jit(net.apply, static_argnums=2)(variables, images, False)
    peer = torchvision_models.create('resnet_digits', 10).eval()
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    images = (pixels / facts['divide_by'] - facts['mean']) / facts['std']
    with torch.no_grad():
        logits = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))).numpy()
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()

    convert('from-pytorch', tmp_path / 'out.safetensors', tmp_path / 'back')  # From the metadata.
    back = checkpointing.read(tmp_path / 'back')[0]['variables']
    harness.assert_close(variables, back, 1e-6)
    error = convert('from-pytorch', tmp_path / 'out.safetensors', tmp_path / 'no',
                    '--input=reference', status=2)  # fmt: skip
    assert 'input=torchvision' in error


# What is done to a good file, and what the error must name.
FAULTS = {
    'missing': (lambda s: s.pop('layer2.0.bn1.running_var'), 'missing: layer2.0.bn1.running_var'),
    'extra': (lambda s: s.update(extra=s['fc.bias']), 'not known: extra'),
    'shape': (lambda s: s.update({'bn1.bias': s['fc.bias']}), 'bn1.bias [10] instead of [16]'),
    'half': (
        lambda s: s.update({'fc.bias': s['fc.bias'].astype(np.float16)}), 'precision.*fc.bias F16'
    ),
    'double': (
        lambda s: s.update({'fc.bias': s['fc.bias'].astype(np.float64)}), 'fc.bias float64'
    ),
    'head': (lambda s: s.pop('fc.weight'), 'missing: fc.weight'),
    'empty': (lambda s: s.clear(), 'missing: '),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_wrong_keys_are_named(tmp_path, fault):
    """Missing, extra, wrong shape, wrong precision."""
    spoil, expected = FAULTS[fault]
    state = pytorch_checkpoint.to_state_dict(random_variables('resnet_digits'), step=0)
    spoil(state)
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=expected.replace('[', r'\[')):
        pytorch_checkpoint.from_state_dict(pytorch_checkpoint.read(tmp_path / 'in.safetensors')[0])


def test_wrong_architecture_is_named():
    """The nearest model, and the keys that differ from it."""
    state = pytorch_checkpoint.to_state_dict(random_variables('resnet50', 1000), step=0)
    del state['layer3.5.conv1.weight'], state['layer3.5.conv2.weight']
    with pytest.raises(CheckpointError, match=r'resnet50, the nearest.*\n.*layer3.5.conv1.weight'):
        pytorch_checkpoint.from_state_dict(state)
    with pytest.raises(CheckpointError, match=r'not those of resnet_digits:\n.*missing|not known'):
        pytorch_checkpoint.from_state_dict(state, 'resnet_digits')


def test_bfloat16_is_refused(tmp_path):
    """NumPy could not even read it."""
    import ml_dtypes

    state = {'fc.bias': np.zeros(3, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=r'half precision.*fc\.bias BF16'):
        pytorch_checkpoint.read(tmp_path / 'in.safetensors')


class Code:
    """Something a pickle would run when it is read."""

    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ({'fc.bias': Code()}, 'could run code'),
        (Code(), 'could run code'),
        ({'state_dict': {}}, 'no tensors: state_dict'),
        ([1, 2], 'holds no state dictionary'),
    ],
)
def test_pickles_of_anything_but_tensors_are_refused(tmp_path, content, expected):
    torch = pytest.importorskip('torch')
    torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=expected):
        pytorch_checkpoint.read(tmp_path / 'in.pth')


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_truncated_files_are_named(tmp_path, suffix):
    """At every one of a few lengths."""
    if suffix == 'pth':
        pytest.importorskip('torch')
    state = pytorch_checkpoint.to_state_dict(random_variables('resnet_digits'), step=0)
    whole = tmp_path / f'whole.{suffix}'
    pytorch_checkpoint.write(whole, state, {})
    content = whole.read_bytes()
    for length in (0, 4, 1000, len(content) // 2, len(content) - 1):
        file = tmp_path / f'in.{suffix}'
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f'in.{suffix}.*damaged'):
            pytorch_checkpoint.read(file)


def test_script_leaves_outputs_untouched(convert, checkpoint, tmp_path):
    """Existing outputs stay as they are; failed conversions leave nothing behind."""
    file, folder = tmp_path / 'out.safetensors', tmp_path / 'folder'
    file.write_text('precious')
    folder.mkdir()
    (folder / 'precious').write_text('precious')
    assert f'{file} exists' in convert('to-pytorch', checkpoint, file, status=2)
    good = tmp_path / 'good.safetensors'
    convert('to-pytorch', checkpoint, good)
    assert f'{folder} exists' in convert('from-pytorch', good, folder, status=2)
    assert file.read_text() == (folder / 'precious').read_text() == 'precious'

    before = sorted(path.name for path in tmp_path.iterdir())
    assert 'damaged' in convert('from-pytorch', file, tmp_path / 'new', status=2)
    assert 'no checkpoint' in convert('to-pytorch', folder, tmp_path / 'n.safetensors', status=2)
    assert '.safetensors or .pth' in convert('to-pytorch', checkpoint, tmp_path / 'n.bin', status=2)
    assert 'there is no file' in convert(
        'from-pytorch', tmp_path / 'none.pth', folder / 'n', status=2
    )
    assert 'no folder' in convert('to-pytorch', checkpoint, tmp_path / 'no' / 'n.pth', status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_same_padding_is_not_exported(convert, tmp_path):
    """No PyTorch model pads as the official TensorFlow graph does."""
    tree = {'variables': random_variables('resnet_digits'), 'step': np.int32(1)}
    checkpointing.write(tmp_path / '1', tree, {'config': CONFIG | {'padding': 'same'}})
    error = convert('to-pytorch', tmp_path / '1', tmp_path / 'out.safetensors', status=2)
    assert "padding='same'" in error
    assert not (tmp_path / 'out.safetensors').exists()


@pytest.fixture(scope='module')
def published() -> tuple[str, bytes]:
    """Weights as somebody might publish them: the file's name and its bytes."""
    state = pytorch_checkpoint.to_state_dict(random_variables('resnet_digits'), step=0)
    content = safetensors.numpy.save(state)
    return f'small-{hashlib.sha256(content).hexdigest()[:8]}.safetensors', content


def test_download_goes_on_after_interruptions(convert, tmp_path, published):
    """What an earlier attempt left is kept, and a broken connection is taken up again."""
    name, content = published
    (tmp_path / f'{name}.part').write_bytes(content[:1000])
    with RangeServer(content, breaks=[10, 2000]) as server:
        convert('download', f'{server.url}/{name}', tmp_path / 'out')
        asked = [requested for requested, _ in server.requests]
    assert asked == ['bytes=0-', 'bytes=1000-', 'bytes=3000-']  # The first asks for the size.
    assert (tmp_path / name).read_bytes() == content
    tree, record = checkpointing.read(tmp_path / 'out')
    assert record['source'] == {'file': name, 'input': 'torchvision'}
    ours = random_variables('resnet_digits')['params']
    theirs = tree['variables']['params']
    scale = 255 * np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        theirs['conv1']['kernel'] * scale[None, None, :, None], ours['conv1']['kernel'], rtol=1e-6
    )
    assert harness.is_same(ours['fc'], theirs['fc'])


def test_download_checks_the_digits_of_the_name(convert, tmp_path, published):
    """Another file of that name is removed, and nothing is converted."""
    name, content = published
    with RangeServer(content[:-1] + b'x', breaks=[]) as server:
        error = convert('download', f'{server.url}/{name}', tmp_path / 'out', status=2)
        assert 'SHA-256' in error
        nameless = convert('download', f'{server.url}/small.pth', tmp_path / 'out', status=2)
        assert 'could not be checked' in nameless
    assert list(tmp_path.iterdir()) == []


def test_download_leaves_an_existing_output_alone(convert, tmp_path, published):
    """Not a byte is asked for."""
    (tmp_path / 'out').mkdir()
    with RangeServer(published[1], breaks=[]) as server:
        error = convert('download', f'{server.url}/{published[0]}', tmp_path / 'out', status=2)
        assert not server.requests
    assert 'out exists' in error
    assert list((tmp_path / 'out').iterdir()) == []


def test_download_without_a_server_says_so(convert, tmp_path, published):
    error = convert('download', f'http://127.0.0.1:9/{published[0]}', tmp_path / 'out', status=2)
    assert '127.0.0.1' in error
