# SPDX-License-Identifier: Apache-2.0
"""Meta's own files of weights: what is computed with them is what Meta's network computes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import network
from models.llama.architectures import ARCHITECTURES
from models.llama.layer import Layer
from scripts import convert_llama
from tests.harness import is_same
from training import checkpointing
from workloads.llama31_8b import meta

torch = pytest.importorskip('torch')

ARCHITECTURE = ARCHITECTURES['llama_bytes']
PARAMS = {
    'dim': 96, 'n_layers': 4, 'n_heads': 4, 'n_kv_heads': 2, 'vocab_size': 257, 'multiple_of': 64,
    'ffn_dim_multiplier': 1.0, 'norm_eps': 1e-5, 'rope_theta': 500000.0, 'use_scaled_rope': True,
}  # fmt: skip
# As its publisher has it.
PARAMS_8B = {
    'dim': 4096, 'n_layers': 32, 'n_heads': 32, 'n_kv_heads': 8, 'vocab_size': 128256,
    'multiple_of': 1024, 'ffn_dim_multiplier': 1.3, 'norm_eps': 1e-5, 'rope_theta': 500000.0,
    'use_scaled_rope': True,
}  # fmt: skip


def weights(dtype=torch.bfloat16):
    """Noise by Meta's names, in its layout."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    found = {'tok_embeddings.weight': noise(257, 96)}
    for i in range(4):
        found |= {
            f'layers.{i}.attention.wq.weight': noise(96, 96),
            f'layers.{i}.attention.wk.weight': noise(48, 96),
            f'layers.{i}.attention.wv.weight': noise(48, 96),
            f'layers.{i}.attention.wo.weight': noise(96, 96),
            f'layers.{i}.feed_forward.w1.weight': noise(256, 96),
            f'layers.{i}.feed_forward.w3.weight': noise(256, 96),
            f'layers.{i}.feed_forward.w2.weight': noise(96, 256),
            f'layers.{i}.attention_norm.weight': noise(96) + 1,
            f'layers.{i}.ffn_norm.weight': noise(96) + 1,
        }
    return found | {
        'norm.weight': noise(96) + 1,
        'output.weight': noise(257, 96),
        'rope.freqs': noise(12),  # In some files; it is left out.
    }


def write(folder, state, params=PARAMS):
    folder.mkdir()
    (folder / 'params.json').write_text(json.dumps(params))
    torch.save(state, folder / 'consolidated.00.pth')
    return folder


@pytest.fixture
def theirs(tmp_path):
    return write(tmp_path / 'meta', weights())


def status(folder, out='out'):
    return convert_llama.main(['from-meta', str(folder), str(folder.with_name(out))])


def rotations(length):
    """Meta's `precompute_freqs_cis`: the pairs' turns as complex numbers [length, 12]."""
    turns = []
    for i in range(12):
        frequency = 500000.0 ** (-2 * i / 24)
        wave = 2 * math.pi / frequency
        if wave > 8192:
            frequency /= 8
        elif wave > 8192 / 4:
            smooth = (8192 / wave - 1) / 3
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        turns.append(frequency)
    angles = torch.outer(torch.arange(length).double(), torch.tensor(turns, dtype=torch.double))
    return torch.polar(torch.ones_like(angles), angles)


def meta_logits(state, tokens):
    """Meta's network, `llama_models` llama3/reference_impl/model.py, in fp64 for one sequence."""
    w = {name: value.double() for name, value in state.items()}
    turns = rotations(len(tokens))

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def rotated(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 12, 2))  # (2i, 2i + 1)
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = w['tok_embeddings.weight'][tokens]
    for i in range(4):
        of = {n.removeprefix(f'layers.{i}.')[:-7]: v for n, v in w.items() if f's.{i}.' in n}
        h = norm(x, of['attention_norm'])
        q = rotated((h @ of['attention.wq'].T).view(-1, 4, 24))
        k = rotated((h @ of['attention.wk'].T).view(-1, 2, 24)).repeat_interleave(2, dim=1)
        v = (h @ of['attention.wv'].T).view(-1, 2, 24).repeat_interleave(2, dim=1)
        scores = torch.einsum('qhd,khd->hqk', q, k) / math.sqrt(24)
        scores += torch.full_like(scores[0], -math.inf).triu(1)
        mixed = torch.einsum('hqk,khd->qhd', scores.softmax(-1), v).flatten(1)
        x = x + mixed @ of['attention.wo'].T
        h = norm(x, of['ffn_norm'])
        gate, up = h @ of['feed_forward.w1'].T, h @ of['feed_forward.w3'].T
        x = x + (torch.nn.functional.silu(gate) * up) @ of['feed_forward.w2'].T
    return (norm(x, w['norm.weight']) @ w['output.weight'].T).numpy()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_logits_are_those_of_metas_network(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(checkpointing, 'PIECE', 10_000)  # So that matrices have many pieces.
    state = weights(getattr(torch, dtype))
    assert status(write(tmp_path / 'meta', state)) == 0
    params = checkpointing.read(tmp_path / 'out')[0]['variables']['params']
    tokens = np.random.default_rng(1).integers(0, 257, 60)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
        x = network.activations(params, tokens[None], Layer(ARCHITECTURE, jnp.dtype('float64')))
        found = np.asarray(network.logits(x, params['head']))[0]
    assert np.abs(found).max() > 1
    np.testing.assert_allclose(found, meta_logits(state, tokens), rtol=0, atol=1e-11)


def test_every_value_is_in_hugging_faces_folder_as_it_was(theirs, tmp_path):
    """Through our checkpoint, and back by the inverse of the permutation."""
    import safetensors.torch

    assert status(theirs) == 0
    arguments = ['to-hugging-face', str(tmp_path / 'out'), str(tmp_path / 'hf')]
    assert convert_llama.main([*arguments, '--dtype=bfloat16']) == 0
    found = safetensors.torch.load_file(tmp_path / 'hf' / 'model-00001-of-00001.safetensors')
    expected = weights()
    del expected['rope.freqs']
    for name, value in found.items():
        if 'q_proj' in name or 'k_proj' in name:
            value = value.view(-1, 2, 12, 96).transpose(1, 2).reshape(-1, 96)
        assert torch.equal(value, expected.pop(meta.name_of(name))), name
    assert not expected


def test_hugging_faces_folder_of_the_same_weights_gives_the_same_checkpoint(theirs, tmp_path):
    assert status(theirs) == 0
    arguments = ['to-hugging-face', str(tmp_path / 'out'), str(tmp_path / 'hf')]
    assert convert_llama.main(arguments) == 0
    arguments = ['from-hugging-face', str(tmp_path / 'hf'), str(tmp_path / 'again')]
    assert convert_llama.main(arguments) == 0
    (first, record), (second, _) = map(checkpointing.read, (tmp_path / 'out', tmp_path / 'again'))
    assert is_same(first, second)
    assert record['config'] is None
    assert record['source'] == {'folder': 'meta'}


def test_the_published_description_is_of_the_benchmark():
    assert meta.architecture_of(PARAMS_8B) == ARCHITECTURES['llama31_8b']
    assert meta.architecture_of({**PARAMS, 'multiple_of': 256}) == ARCHITECTURE


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'rope_theta': 10000.0}, 'rope_theta is 10000.0, and of llama_bytes 500000.0'),
        ({'use_scaled_rope': False}, 'use_scaled_rope is False, and of llama_bytes True'),
        ({'multiple_of': 100}, 'width of the feed-forward part is 300, and of llama_bytes 256'),
        ({'n_kv_heads': 4}, 'n_kv_heads is 4, and of llama_bytes 2'),
        ({'lora_args': {}}, 'lora_args is {}, and of llama_bytes None'),
        ({'dim': '96'}, 'is damaged'),
        ({'multiple_of': 0}, 'is damaged'),
        ({'n_layers': 5}, 'n_layers is 5, and of llama_bytes 4'),
    ],
)
def test_a_description_of_another_network_is_an_error(theirs, change, said, capsys):
    (theirs / 'params.json').write_text(json.dumps(PARAMS | change))
    assert status(theirs) == 2
    assert said in capsys.readouterr().err
    assert not theirs.with_name('out').exists()


def test_parameters_are_weights_too(tmp_path):
    state = {name: torch.nn.Parameter(x) for name, x in weights().items()}
    assert status(write(tmp_path / 'meta', state)) == 0


def lacking(name):
    return {n: x for n, x in weights().items() if n != name}


WK, OUT = 'layers.1.attention.wk.weight', 'output.weight'


@pytest.mark.parametrize(
    ('state', 'said'),
    [
        (lambda: lacking(WK), f"lacks '{WK}'"),
        (lambda: lacking('layers.3.ffn_norm.weight'), "lacks 'layers.3.ffn_norm.weight'"),
        (lambda: weights() | {WK: torch.zeros(96, 96)}, f'{WK} has shape [96, 96], not [48, 96]'),
        (lambda: weights() | {OUT: torch.zeros(256, 96)}, 'output.weight has shape [256, 96]'),
        (lambda: weights() | {WK: torch.full((48, 96), math.nan)}, f'{WK} is not finite'),
        (lambda: weights() | {'layers.4.ffn_norm.weight': torch.ones(96)}, 'more than the 4'),
        (lambda: weights() | {OUT: torch.zeros(257, 96).int()}, 'output.weight torch.int32'),
        (lambda: weights() | {OUT: torch.zeros(1, 96).expand(257, 96)}, 'not all values'),
        (lambda: {'model': weights()}, 'no plain dictionary'),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, state, said, capsys):
    assert status(write(tmp_path / 'meta', state())) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def cut(folder):
    path = folder / 'consolidated.00.pth'
    path.write_bytes(path.read_bytes()[:-5000])


def flip_a_bit(folder):
    content = bytearray((folder / 'consolidated.00.pth').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'consolidated.00.pth').write_bytes(content)


def in_parts(folder):
    (folder / 'consolidated.01.pth').touch()


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (cut, 'consolidated.00.pth is damaged'),
        (flip_a_bit, 'consolidated.00.pth is damaged: the checksum of'),
        (in_parts, 'there are 2 of such a name; several hold parts'),
        (lambda folder: (folder / 'consolidated.00.pth').unlink(), 'there are 0 of such a name'),
        (lambda folder: (folder / 'params.json').unlink(), 'params.json'),
        (lambda folder: (folder / 'params.json').write_text('['), 'is damaged'),
        (lambda folder: (folder / 'params.json').write_text('[]'), 'is damaged'),
        (lambda folder: (folder / 'params.json').write_text('{}'), "lacks 'n_heads'"),
    ],
)
def test_damage_is_named(theirs, damage, said, capsys):
    damage(theirs)
    assert status(theirs) == 2
    assert said in capsys.readouterr().err
    assert not theirs.with_name('out').exists()
