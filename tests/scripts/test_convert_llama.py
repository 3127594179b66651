# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of Llama as Hugging Face's folder and back; and a text that is continued."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from models.llama import network
from models.llama.architectures import ARCHITECTURES
from models.llama.layer import Layer
from scripts import convert_llama, generate
from tests.harness import is_same
from training import checkpointing

ARCHITECTURE = ARCHITECTURES['llama_bytes']
CONFIG = {'model': 'llama_bytes', 'sequence_length': 128}


@functools.cache
def random_weights():
    return jax.jit(network.init, static_argnums=1)(jax.random.key(3), ARCHITECTURE)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoints') / '7'
    params = jax.device_get(random_weights())
    tree = {'variables': {'params': params}, 'step': np.int32(7)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, 'CHUNK', 20_000)  # So that arrays have many chunks.
        checkpointing.write(path, tree, {'step': 7, 'config': CONFIG})
    return path


@pytest.fixture(params=[4 * 10**9, 300_000], ids=['one file', 'several'])
def exported(request, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_llama, 'FILE_BYTES', request.param)
    monkeypatch.setattr(checkpointing, 'PIECE', request.param // 10)
    assert convert_llama.main(['to-hugging-face', str(checkpoint), str(tmp_path / 'hf')]) == 0
    return tmp_path / 'hf'


def imported(folder):
    out = folder.with_name('back')
    assert convert_llama.main(['from-hugging-face', str(folder), str(out)]) == 0
    return checkpointing.read(out)


def test_there_and_back_is_the_same_to_the_last_bit(exported, checkpoint):
    tree, record = imported(exported)
    assert is_same(tree, checkpointing.read(checkpoint)[0])
    assert record['config'] == CONFIG
    assert record['source'] == {'folder': 'hf'}


def test_shards_are_named_by_the_index(exported):
    index = json.loads((exported / convert_llama.INDEX).read_text())
    files = sorted(path.name for path in exported.glob('*.safetensors'))
    assert sorted(set(index['weight_map'].values())) == files
    assert files[0].endswith(f'-of-{len(files):05}.safetensors')
    assert (len(files) > 1) == (convert_llama.FILE_BYTES < 10**6)
    assert index['metadata']['total_size'] == 4 * 455_712


def test_hugging_face_loads_it_and_computes_the_same(exported, checkpoint):
    torch = pytest.importorskip('torch')
    pytest.importorskip('tests.torchvision_models')  # Makes torchvision, imported next, load.
    transformers = pytest.importorskip('transformers')
    model = transformers.LlamaForCausalLM.from_pretrained(exported)
    tokens = np.random.default_rng(1).integers(0, 257, (2, 40)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    params = checkpointing.read(checkpoint)[0]['variables']['params']
    x = network.activations(params, tokens, Layer(ARCHITECTURE, np.dtype('float32')))
    np.testing.assert_allclose(network.logits(x, params['head']), theirs, atol=2e-6)
    # What it writes itself is read, too.
    model.save_pretrained(exported.with_name('theirs'))
    tree, _ = imported(exported.with_name('theirs'))
    assert is_same(tree['variables']['params'], params)


def test_bfloat16_is_rounded_to_the_nearest(checkpoint, tmp_path):
    arguments = ['to-hugging-face', str(checkpoint), str(tmp_path / 'hf'), '--dtype=bfloat16']
    assert convert_llama.main(arguments) == 0
    found = imported(tmp_path / 'hf')[0]['variables']['params']
    exact = checkpointing.read(checkpoint)[0]['variables']['params']
    for ours, theirs in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
        assert np.abs(ours - theirs).max() <= 2**-8 * np.abs(ours).max()
        assert not (theirs.view(np.uint32) & 0xFFFF).any()


def other_width(folder):
    path = folder / 'config.json'
    path.write_text(path.read_text().replace('"hidden_size": 96', '"hidden_size": 97'))


def other_shape(folder):
    *_, path = sorted(folder.glob('*.safetensors'))
    weights = safetensors.numpy.load_file(path)
    weights['lm_head.weight'] = weights['lm_head.weight'][:-1]
    safetensors.numpy.save_file(weights, path)


def not_finite(folder):
    *_, path = sorted(folder.glob('*.safetensors'))
    weights = safetensors.numpy.load_file(path)
    weights['lm_head.weight'] = weights['lm_head.weight'].copy()
    weights['lm_head.weight'][200, 5] = np.inf
    safetensors.numpy.save_file(weights, path)


def no_step(folder):
    path = folder / 'config.json'
    path.write_text(path.read_text().replace('"step": 7', '"step": "seven"'))


def remove_a_file(folder):
    next(folder.glob('*.safetensors')).unlink()


def cut_a_file(folder):
    path = next(folder.glob('*.safetensors'))
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (other_width, 'describes none of the networks'),
        (other_shape, 'lm_head.weight has shape'),
        (not_finite, 'lm_head.weight is not finite'),
        (no_step, 'is damaged'),
        (remove_a_file, 'safetensors'),
        (cut_a_file, 'is damaged'),
        (lambda folder: (folder / 'config.json').write_text('{'), 'is damaged'),
        (lambda folder: (folder / 'config.json').write_text('{}'), "lacks 'hidden_size'"),
    ],
)
def test_what_cannot_be_used_is_named(exported, damage, said, capsys):
    damage(exported)
    out = exported.with_name('back')
    assert convert_llama.main(['from-hugging-face', str(exported), str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_of_another_benchmark_is_rejected(tmp_path, capsys):
    tree = {'variables': {'params': {'x': np.zeros(2, np.float32)}}, 'step': np.int32(1)}
    checkpointing.write(tmp_path / '1', tree, {'step': 1, 'config': {'model': 'resnet50'}})
    assert convert_llama.main(['to-hugging-face', str(tmp_path / '1'), str(tmp_path / 'hf')]) == 2
    assert 'none of the networks llama31_8b' in capsys.readouterr().err
    assert generate.main([str(tmp_path / '1'), 'x']) == 2


def test_weights_of_others_are_exported_and_continued_too(exported, tmp_path, capsys):
    path = exported / 'config.json'
    described = json.loads(path.read_text())
    del described['trained_by']
    path.write_text(json.dumps(described))
    assert imported(exported)[1]['config'] is None
    back = str(tmp_path / 'back')
    assert convert_llama.main(['to-hugging-face', back, str(tmp_path / 'again')]) == 0
    assert generate.main([back, 'x', '--tokens=1']) == 0


def test_a_text_is_continued(checkpoint, capsys):
    def said(*arguments):
        assert generate.main([str(checkpoint), 'Fellow', '--tokens=20', *arguments]) == 0
        return capsys.readouterr().out

    assert said('--seed=1') == said('--seed=1')
    assert said('--seed=1').startswith('Fellow')
    assert said('--seed=1') != said('--seed=2')
    assert said('--temperature=0', '--seed=1') == said('--temperature=0', '--seed=2')


def test_a_token_depends_on_those_of_its_window_alone():
    params = random_weights()
    how = {'count': 6, 'length': 8, 'temperature': 0.5, 'seed': 1}
    one = generate.continuation(params, ARCHITECTURE, [1] * 5 + [2] * 8, **how)
    other = generate.continuation(params, ARCHITECTURE, [3] * 5 + [2] * 8, **how)
    assert one == other


@pytest.mark.parametrize('content', [b'{}', b'\xff'])
def test_what_is_no_tokenizer_is_named(checkpoint, tmp_path, capsys, content):
    pytest.importorskip('tokenizers')
    (tmp_path / 'tokenizer.model').write_bytes(content)
    assert generate.main([str(checkpoint), 'a', f'--tokenizer={tmp_path}/tokenizer.model']) == 2
    assert 'tokenizer.model is not a tokenizer.json: ' in capsys.readouterr().err


def test_a_text_that_cannot_be_continued_is_named(checkpoint, capsys):
    assert generate.main([str(checkpoint), '']) == 2
    assert 'the text must have a token' in capsys.readouterr().err
