# SPDX-License-Identifier: Apache-2.0
"""Checkpoints cross to PyTorch's form and back without loss, and bad input leaves no trace."""

import collections
import hashlib
import http.server
import importlib.util
import io
import json
import pickle
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import resnet as models
from tests import harness
from tests.range_server import RangeServer
from training import checkpointing
from workloads.resnet import torchvision
from workloads.resnet.torchvision import CheckpointError

ROOT = Path(__file__).parents[3]
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
    """Random values for every variable of a model, statistics included; variances above 0."""
    rng = np.random.default_rng(seed)
    net = models.create(model, num_classes=num_classes, bn_span=1)
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    drawn = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    return drawn | {'batch_stats': jax.tree.map(np.abs, drawn['batch_stats'])}


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
    _, metadata = torchvision.read(file)
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
    assert torchvision.read(tmp_path / 'in.pth')[0]['fc.bias'].tolist() == [1, 1, 1]


def test_torchvision_input_is_folded(convert, checkpoint, tmp_path):
    """For inputs scaled as torchvision's, with our means, the network is the same."""
    torch = pytest.importorskip('torch')
    from tests import torchvision_models

    variables = checkpointing.read(checkpoint)[0]['variables']
    other = checkpoint.parent / '124'
    checkpointing.write(other, {'variables': variables, 'step': np.int32(124)}, {'config': CONFIG})
    text = convert('to-pytorch', other, tmp_path / 'out.safetensors', '--input=torchvision')
    assert '-0.005, -0.500, -0.410' in text
    state, metadata = torchvision.read(tmp_path / 'out.safetensors')
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
    assert 'made for input=torchvision' in error
    assert not (tmp_path / 'no').exists()


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
        'counters .*: bn1.num_batches_tracked int64[3]'
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
        torchvision.from_state_dict(torchvision.read(tmp_path / 'in.safetensors')[0])


def test_wrong_architecture_is_named():
    """The nearest model, and the keys that differ from it."""
    state = torchvision.to_state_dict(random_variables('resnet50', 1000), step=0)
    del state['layer3.5.conv1.weight'], state['layer3.5.conv2.weight']
    with pytest.raises(CheckpointError, match=r'resnet50, the nearest.*\n.*layer3.5.conv1.weight'):
        torchvision.from_state_dict(state)
    with pytest.raises(CheckpointError, match=r'not those of resnet_digits:\n.*missing|not known'):
        torchvision.from_state_dict(state, 'resnet_digits')


def test_bfloat16_is_rejected(tmp_path):
    """NumPy could not even read it."""
    import ml_dtypes

    state = {'fc.bias': np.zeros(3, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=r'only float32.*fc\.bias BF16'):
        torchvision.read(tmp_path / 'in.safetensors')


class Code:
    """Something a pickle would run when it is read."""

    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ({'fc.bias': Code()}, 'could run code'),
        (Code(), 'could run code'),
        ({'state_dict': {}}, 'names and tensors: state_dict'),
        ([1, 2], 'holds no state dictionary'),
    ],
)
def test_pickles_of_anything_but_tensors_are_rejected(tmp_path, content, expected):
    torch = pytest.importorskip('torch')
    torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=expected):
        torchvision.read(tmp_path / 'in.pth')


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_truncated_files_are_named(tmp_path, suffix):
    """At every one of a few lengths."""
    if suffix == 'pth':
        pytest.importorskip('torch')
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    whole = tmp_path / f'whole.{suffix}'
    torchvision.write(whole, state, {})
    content = whole.read_bytes()
    for length in (0, 4, 1000, len(content) // 2, len(content) - 1):
        file = tmp_path / f'in.{suffix}'
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f'in.{suffix}.*damaged'):
            torchvision.read(file)


def safetensors_file(path: Path, **metadata: str) -> Path:
    """A good file, but for the metadata."""
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=3)
    safetensors.numpy.save_file(state, path, {'input': 'reference'} | metadata)
    return path


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


def mutants(good: bytes, hot: range, count: int, seed: int):
    """Copies of a file with bits turned, bytes set, left out, inserted, or cut off at the end.

    Four out of five changes are in the range `hot`, where the structure of the file is.
    """
    rng = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.choice(hot) if rng.random() < 0.8 else rng.randrange(len(good))
            at = min(at, len(mutant) - 1)
            change = rng.randrange(5)
            if change == 0:
                mutant[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                mutant[at] = rng.randrange(256)
            elif change == 2 and len(mutant) > 100:
                del mutant[at : at + rng.randrange(1, 40)]
            elif change == 3:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 10))
            elif rng.random() < 0.1:
                del mutant[max(at, 1) :]
        yield bytes(mutant)


def assert_read_or_named(file: Path, contents) -> list[dict]:
    """Every content is rejected in words, or is read; what was read."""
    taken = []
    for content in contents:
        file.write_bytes(content)
        try:
            state, metadata = torchvision.read(file)
            torchvision.from_state_dict(state)
        except CheckpointError:
            continue
        assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
        taken.append(state)
    return taken


def test_mutated_safetensors_are_rejected_in_words(tmp_path):
    good = safetensors_file(tmp_path / 'good.safetensors').read_bytes()
    header = range(8 + int.from_bytes(good[:8], 'little'))
    taken = assert_read_or_named(tmp_path / 'in.safetensors', mutants(good, header, 300, seed=1))
    assert len(taken) < 100
    for state in taken:  # The format has no checksum, so other finite weights cannot be noticed.
        assert all(np.isfinite(array).all() for array in state.values())


@pytest.mark.parametrize('zipped', [True, False])
def test_mutated_pth_files_are_rejected_in_words(tmp_path, zipped):
    torch = pytest.importorskip('torch')
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    buffer = io.BytesIO()
    torch.save(
        {name: torch.from_numpy(a) for name, a in state.items()}, buffer,
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    good = buffer.getvalue()
    ends = [*range(9000), *range(len(good) - 9000, len(good))] if zipped else range(9000)
    taken = assert_read_or_named(tmp_path / 'in.pth', mutants(good, ends, 200, seed=2))
    if zipped:  # By its checksums, what is read is what was written.
        assert all(harness.is_same(other, state) for other in taken if len(other) == len(state))


@pytest.mark.parametrize(
    'change',
    [
        {'dtype': 'F16'}, {'dtype': 'F32X'}, {'dtype': 3}, {'shape': [2**40]},
        {'shape': [2**62, 4]}, {'shape': [-1]}, {'shape': [10.5]}, {'shape': []},
        {'shape': [1] * 70 + [10]}, {'data_offsets': [0, 2**40]}, {'data_offsets': [-1, 39]},
        {'data_offsets': [40, 0]}, {'data_offsets': [0]},
    ],
)  # fmt: skip
def test_safetensors_that_lie_about_sizes_are_rejected(tmp_path, change):
    good = safetensors_file(tmp_path / 'in.safetensors').read_bytes()
    size = int.from_bytes(good[:8], 'little')
    header = json.loads(good[8 : 8 + size])
    header['fc.bias'] |= change
    text = json.dumps(header).encode()
    (tmp_path / 'in.safetensors').write_bytes(
        len(text).to_bytes(8, 'little') + text + good[8 + size :]
    )
    with pytest.raises(CheckpointError, match='in.safetensors'):
        torchvision.read(tmp_path / 'in.safetensors')


def test_safetensors_with_a_name_twice_are_rejected(tmp_path):
    """The library takes the last one."""
    good = safetensors_file(tmp_path / 'in.safetensors').read_bytes()
    size = int.from_bytes(good[:8], 'little')
    text = good[8 : 8 + size].rstrip()
    twice = text[:-1] + b',"fc.bias":' + json.dumps(json.loads(text)['fc.bias']).encode() + b'}'
    (tmp_path / 'in.safetensors').write_bytes(
        len(twice).to_bytes(8, 'little') + twice + good[8 + size :]
    )
    with pytest.raises(CheckpointError, match='a name twice'):
        torchvision.read(tmp_path / 'in.safetensors')


def repacked(path: Path, to: Path, compression: int, **contents: bytes) -> Path:
    """A .pth file with the same members, but for those whose names end in a key of `contents`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, 'w', compression) as new:
        for member in old.infolist():
            new.writestr(
                member.filename, contents.get(member.filename.split('/')[-1], old.read(member))
            )
    return to


def test_pth_files_are_given_no_more_memory_than_they_have_bytes(tmp_path):
    torch = pytest.importorskip('torch')
    state = {'fc.bias': torch.arange(1000.0)}
    torch.save(state, tmp_path / 'good.pth')
    bomb = repacked(
        tmp_path / 'good.pth', tmp_path / 'bomb.pth', zipfile.ZIP_DEFLATED, **{'0': bytes(2**28)}
    )
    assert bomb.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match='is compressed'):
        torchvision.read(bomb)
    # The directory says that a member is larger than the file.
    content = (tmp_path / 'good.pth').read_bytes()
    lying = content.replace((4000).to_bytes(4, 'little'), (2**31 - 1).to_bytes(4, 'little'))
    assert lying != content
    (tmp_path / 'lying.pth').write_bytes(lying)
    with pytest.raises(CheckpointError, match=r'lying.pth is damaged'):
        torchvision.read(tmp_path / 'lying.pth')
    # One value, shown a billion times.
    torch.save({'fc.bias': torch.ones(1).expand(2**30)}, tmp_path / 'wide.pth')
    with pytest.raises(CheckpointError, match='not all values .*: fc.bias'):
        torchvision.read(tmp_path / 'wide.pth')


def test_damaged_weights_in_pth_files_are_noticed(tmp_path):
    """PyTorch itself does not look at the archive's checksums."""
    torch = pytest.importorskip('torch')
    torch.save({'fc.bias': torch.ones(1000)}, tmp_path / 'in.pth')
    content = bytearray((tmp_path / 'in.pth').read_bytes())
    content[content.index(np.ones(100, np.float32).tobytes()) + 200] ^= 1
    (tmp_path / 'in.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='the checksum of .*/data/0 '):
        torchvision.read(tmp_path / 'in.pth')


@pytest.mark.parametrize(
    'pickled',
    [
        b'', b'.', b'\x80\x02\xff.', b'\x80\x02h\x05.', b'\x80\x02}]]s.', b'\x80\x02cos\nsystem\n.',
        b'\x80\x02(X\x07\0\0\0storageX\1\0\0\0aX\1\0\0\0bX\3\0\0\0cpuK\5tQ.',
        b'\x80\x02X\xff\xff\xff\x7fa.',
        b'\x80\x02' + b']' * 10**5 + b'a' * (10**5 - 1) + b'.',
        b'\x80\x02}' + b'(' * 10**6 + b't' * 10**6 + b'K\1s.',
        pickle.dumps({'fc.bias': [1.0]}, 2),
    ],
    ids=range(11),
)  # fmt: skip
def test_malformed_pickles_are_rejected_in_words(tmp_path, pickled):
    """Whether they are in an archive or not; deeply nested ones would end the interpreter."""
    torch = pytest.importorskip('torch')
    torch.save({'fc.bias': torch.ones(3)}, tmp_path / 'good.pth')
    for file in (
        repacked(
            tmp_path / 'good.pth', tmp_path / 'a.pth', zipfile.ZIP_STORED, **{'data.pkl': pickled}
        ),
        tmp_path / 'b.pth',
    ):
        if not file.exists():
            file.write_bytes(pickled)
        with pytest.raises(CheckpointError, match=file.name):
            torchvision.read(file)


@pytest.mark.parametrize(
    'kind', ['sparse', 'meta', 'complex', 'quantised', 'number as key', 'tuple as key']
)
def test_tensors_of_other_kinds_are_named(tmp_path, kind):
    torch = pytest.importorskip('torch')
    ones = torch.ones(10)
    content = {
        'sparse': lambda: {'fc.bias': ones.to_sparse()},
        'meta': lambda: {'fc.bias': torch.ones(10, device='meta')},
        'complex': lambda: {'fc.bias': ones.to(torch.complex64).conj()},
        'quantised': lambda: {'fc.bias': ones.to(torch.float8_e4m3fn)},
        'number as key': lambda: {1: ones},
        'tuple as key': lambda: {('fc', 'bias'): ones},
    }[kind]()
    torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=r"in.pth.*(fc.bias|1|\('fc', 'bias'\))"):
        torchvision.read(tmp_path / 'in.pth')


def test_missing_pytorch_is_advised_an_environment_of_its_own(tmp_path, monkeypatch):
    """Beside the CUDA wheels it would overwrite their libraries."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    (tmp_path / 'in.pth').write_bytes(b'x')
    with pytest.raises(CheckpointError) as error:
        torchvision.read(tmp_path / 'in.pth')
    text = str(error.value)
    assert 'pip install' not in text
    setup, convert = (line.split() for line in text.splitlines()[-2:])
    venv = setup[0].removeprefix('VENV=')
    assert convert[0] == f'{venv}/bin/python'
    assert convert[1] == str(SCRIPT)
    assert Path(venv).name == '.venv-cpu'
    # The flags are known, and the first is the CPU's.
    assert setup[2:] == ['--cpu', '--test']
    done = subprocess.run([setup[1], '--help'], capture_output=True, text=True, check=True)
    assert all(flag in done.stdout for flag in setup[2:])


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


class Answers:
    """A server that answers every request with the same bytes."""

    def __init__(self, answer: bytes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self._server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize(
    ('answer', 'words'),
    [
        (b'HTTP/1.0 200 OK\r\n\r\nabc', "Content-Length ''"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: x\r\n\r\nabc', "Content-Length 'x'"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: -1\r\n\r\nabc', "Content-Length '-1'"),
        (b'HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc', '1073741824 bytes'),
        (b'HTTP/1.0 404 Gone\r\nContent-Length: 0\r\n\r\n', '404'),
        (b'nonsense\r\n\r\n', 'cannot be fetched'),
        (b'HTTP/1.0 x OK\r\n\r\n', 'cannot be fetched'),
        (b'', 'cannot be fetched'),
    ],
)
def test_download_of_a_strange_answer_says_so(convert, tmp_path, answer, words):
    with Answers(answer) as server:
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
