# SPDX-License-Identifier: Apache-2.0
"""Checkpoints cross to PyTorch's form and back without loss, and bad input leaves no trace."""

import collections
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from data_preparation import archives
from models.resnet import network
from scripts import convert_checkpoint
from tests import harness
from tests.random_weights import random_variables, safetensors_file
from tests.range_server import RangeServer, RawServer
from training import checkpointing
from workloads import weight_files
from workloads.resnet import torchvision

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'convert_checkpoint.py'

CONFIG = {
    'model': 'resnet_digits',
    'padding': 'symmetric',
    'image_size': 8,
    'augmentation': 'pad_crop',
    'seed': 2**62 + 1,
    'weight_decay': 0.0002,
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of the digits' model after 123 steps."""
    path = tmp_path / 'run' / '123'
    path.parent.mkdir()
    tree = {'variables': random_variables('resnet_digits'), 'step': np.int32(123)}
    checkpointing.write(path, tree, {'step': 123, 'config': CONFIG})
    return path


@pytest.fixture
def convert(capsys, monkeypatch):
    """Runs the script in this process; its output, or its error where it is rejected."""
    monkeypatch.setattr(archives.time, 'sleep', lambda _: None)

    def run(*arguments, status: int = 0) -> str:
        returned, printed = (
            convert_checkpoint.main([str(a) for a in arguments]),
            capsys.readouterr(),
        )
        assert returned == status, printed.err
        return printed.err if status else printed.out

    return run


def test_script_runs_by_itself(checkpoint, tmp_path):
    """From any folder; the exit status and the error are a user's, not a programmer's."""
    command = [sys.executable, SCRIPT, 'to-pytorch', checkpoint, tmp_path / 'none' / 'out.pth']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('error: there is no folder')


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
    _, metadata = weight_files.read(file)
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


def test_torchvision_input_is_folded(convert, checkpoint, tmp_path):
    """For inputs scaled as torchvision's, with our means, the network is the same."""
    torch = pytest.importorskip('torch')
    from tests import torchvision_models

    variables = checkpointing.read(checkpoint)[0]['variables']
    other = checkpoint.parent / '124'
    checkpointing.write(other, {'variables': variables, 'step': np.int32(124)}, {'config': CONFIG})
    text = convert('to-pytorch', other, tmp_path / 'out.safetensors', '--input=torchvision')
    assert '-0.005, -0.500, -0.410' in text
    state, metadata = weight_files.read(tmp_path / 'out.safetensors')
    facts = json.loads(metadata['preprocessing'])

    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3))
    images = (pixels - np.array([123.68, 116.78, 103.94])).astype(np.float32)
    net = network.create('resnet_digits', num_classes=10, bn_span=1)
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
    assert 'made for input=torchvision' in error
    assert not (tmp_path / 'no').exists()


def test_input_is_not_guessed(convert, tmp_path):
    """Weights scaled for another input would be accepted and evaluate to nonsense."""
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    error = convert('from-pytorch', tmp_path / 'in.safetensors', tmp_path / 'out', status=2)
    assert '--input=reference: RGB in 0..255' in error
    assert "--input=torchvision: (RGB / 255 - mean) / std, as torchvision's published" in error
    assert not (tmp_path / 'out').exists()
    for name in ('reference', 'torchvision'):
        convert('from-pytorch', tmp_path / 'in.safetensors', tmp_path / name, f'--input={name}')
        assert checkpointing.read(tmp_path / name)[1]['source']['input'] == name


GOOD_CONFIG = json.dumps(CONFIG)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(('step', text) for text in (
            '2147483648', '1e20', '9' * 5000, '-5', '1.5', '', 'x', 'True', 'NaN', ' 3', '1_0',
            '٣')),
        *(('input', text) for text in ('evil', '', 'Reference', 'torchvision ')),
        *(('model', text) for text in ('resnet50', 'evil', '')),
        *(('config', text) for text in (
            '', '{', '1', '[1]', '"x"', 'true', '{}', '{"a": NaN}', '[' * 10**5,
            '{"a":' * 10**4 + '1' + '}' * 10**4,
            GOOD_CONFIG.replace('"symmetric"', '"same"'), GOOD_CONFIG.replace('_digits', '50'),
            GOOD_CONFIG.replace('"image_size": 8', '"image_size": "8"'),
            GOOD_CONFIG.replace('"image_size": 8', '"image_size": true'),
            GOOD_CONFIG.replace('"image_size": 8', '"image_size": -8'),
            GOOD_CONFIG.replace('"pad_crop"', '["pad_crop"]'))),
    ],
)  # fmt: skip
def test_metadata_of_a_wrong_type_or_range_are_named(convert, tmp_path, name, value):
    file = safetensors_file(tmp_path / 'in.safetensors', **{name: value})
    error = convert('from-pytorch', file, tmp_path / 'out', status=2)
    assert f'in.safetensors: its {name} ' in error
    assert len(error) < 700
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'metadata',
    [3, None, [], {'': 3}, {'': {'source': 3}}, {'': {'source': ['input']}},
     {'': {'source': {'step': 2**80}}}, {'': {'source': {1: 'x'}}}],
)  # fmt: skip
def test_metadata_of_pth_files_of_a_wrong_type_are_named(convert, tmp_path, metadata):
    torch = pytest.importorskip('torch')
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    tensors = collections.OrderedDict((name, torch.from_numpy(a)) for name, a in state.items())
    tensors._metadata = metadata
    torch.save(tensors, tmp_path / 'in.pth')
    error = convert(
        'from-pytorch', tmp_path / 'in.pth', tmp_path / 'out', '--input=reference', status=2
    )
    assert 'in.pth is damaged' in error


def test_weights_that_are_not_finite_are_not_exported(convert, tmp_path):
    variables = random_variables('resnet_digits')
    variables['params']['fc']['bias'][0] = np.inf
    tree = {'variables': variables, 'step': np.int32(1)}
    checkpointing.write(tmp_path / '1', tree, {'config': CONFIG})
    error = convert('to-pytorch', tmp_path / '1', tmp_path / 'out.safetensors', status=2)
    assert 'NaN or infinite: fc.bias' in error
    assert not (tmp_path / 'out.safetensors').exists()


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
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    content = safetensors.numpy.save(state)
    return f'small-{hashlib.sha256(content).hexdigest()[:8]}.safetensors', content


def test_download_resumes_after_interruptions(convert, tmp_path, published):
    """What an earlier attempt left is kept, and a broken connection is opened again."""
    name, content = published
    (tmp_path / f'{name}.part').write_bytes(content[:1000])
    with RangeServer(content, breaks=[10, 2000]) as server:
        convert('download', f'{server.url}/{name}', tmp_path / 'out')
        asked = [requested for requested, _ in server.requests]
    assert asked == ['bytes=1000-', 'bytes=1010-', 'bytes=3010-']
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


@pytest.mark.parametrize(
    ('answer', 'words'),
    [
        (b'HTTP/1.0 200 OK\r\n\r\nabc', "Content-Length ''"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: x\r\n\r\nabc', "Content-Length 'x'"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: -1\r\n\r\nabc', "Content-Length '-1'"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc', '1,073,741,824 bytes'),
        (b'HTTP/1.0 404 Gone\r\nContent-Length: 0\r\n\r\n', '404'),
        (b'nonsense\r\n\r\n', 'BadStatusLine'),
        (b'HTTP/1.0 x OK\r\n\r\n', 'BadStatusLine'),
        (b'', 'RemoteDisconnected'),
    ],
)
def test_download_of_a_strange_answer_says_so(convert, tmp_path, answer, words):
    with RawServer([answer]) as server:
        url = f'{server.url}/small-0123abcd.pth'
        assert words in convert('download', url, tmp_path / 'out', status=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'url',
    [
        'http://127.0.0.1:9/a b-0123abcd.pth', 'http://127.0.0.1:9/small.pth', 'small-0123abcd.pth',
        'http://127.0.0.1:9/small-0123abcd.pth\n', 'http://127.0.0.1:9/small-0123abcd.bin',
        'http://127.0.0.1:99999/small-0123abcd.pth', 'http:///small-0123abcd.pth', '',
        'ftp://127.0.0.1/small-0123abcd.pth', 'file:///etc/small-0123abcd.pth', 'http://[/s-0123abcd.pth',
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_fetched_are_named(convert, tmp_path, url):
    assert convert('download', url, tmp_path / 'out', status=2).count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_passwords_in_addresses_are_not_printed(convert, tmp_path):
    url = 'http://me:secret@127.0.0.1:9/small-0123abcd.pth'
    assert 'secret' not in convert('download', url, tmp_path / 'out', status=2)
