# SPDX-License-Identifier: Apache-2.0
"""Files of weights that are damaged or hostile are rejected in words."""

import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from settings.errors import CheckpointError
from tests import harness
from tests.random_weights import random_variables, safetensors_file
from workloads import weight_files
from workloads.resnet import torchvision

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'convert_checkpoint.py'


def test_files_of_parameters_are_read(tmp_path):
    """Old files hold `nn.Parameter`s, whose values ask for a gradient."""
    torch = pytest.importorskip('torch')
    torch.save({'fc.bias': torch.nn.Parameter(torch.ones(3))}, tmp_path / 'in.pth')
    assert weight_files.read(tmp_path / 'in.pth')[0]['fc.bias'].tolist() == [1, 1, 1]


def test_bfloat16_is_rejected(tmp_path):
    """NumPy could not even read it."""
    import ml_dtypes

    state = {'fc.bias': np.zeros(3, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(state, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=r'only float32.*fc\.bias BF16'):
        weight_files.read(tmp_path / 'in.safetensors')


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
        weight_files.read(tmp_path / 'in.pth')


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_truncated_files_are_named(tmp_path, suffix):
    """At every one of a few lengths."""
    if suffix == 'pth':
        pytest.importorskip('torch')
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=0)
    whole = tmp_path / f'whole.{suffix}'
    weight_files.write(whole, state, {})
    content = whole.read_bytes()
    for length in (0, 4, 1000, len(content) // 2, len(content) - 1):
        file = tmp_path / f'in.{suffix}'
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f'in.{suffix}.*damaged'):
            weight_files.read(file)


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
            state, metadata = weight_files.read(file)
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
        weight_files.read(tmp_path / 'in.safetensors')


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
        weight_files.read(tmp_path / 'in.safetensors')


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
        weight_files.read(bomb)
    # The directory says that a member is larger than the file.
    content = (tmp_path / 'good.pth').read_bytes()
    lying = content.replace((4000).to_bytes(4, 'little'), (2**31 - 1).to_bytes(4, 'little'))
    assert lying != content
    (tmp_path / 'lying.pth').write_bytes(lying)
    with pytest.raises(CheckpointError, match=r'lying.pth is damaged'):
        weight_files.read(tmp_path / 'lying.pth')
    # One value, shown a billion times.
    torch.save({'fc.bias': torch.ones(1).expand(2**30)}, tmp_path / 'wide.pth')
    with pytest.raises(CheckpointError, match='not all values .*: fc.bias'):
        weight_files.read(tmp_path / 'wide.pth')


def test_damaged_weights_in_pth_files_are_noticed(tmp_path):
    """PyTorch itself does not look at the archive's checksums."""
    torch = pytest.importorskip('torch')
    torch.save({'fc.bias': torch.ones(1000)}, tmp_path / 'in.pth')
    content = bytearray((tmp_path / 'in.pth').read_bytes())
    content[content.index(np.ones(100, np.float32).tobytes()) + 200] ^= 1
    (tmp_path / 'in.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='the checksum of .*/data/0 '):
        weight_files.read(tmp_path / 'in.pth')


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
            weight_files.read(file)


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
        weight_files.read(tmp_path / 'in.pth')


def test_missing_pytorch_is_advised_an_environment_of_its_own(tmp_path, monkeypatch):
    """Beside the CUDA wheels it would overwrite their libraries."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), 'in.pth'])
    (tmp_path / 'in.pth').write_bytes(b'x')
    with pytest.raises(CheckpointError) as error:
        weight_files.read(tmp_path / 'in.pth')
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
