# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face's network and PyTorch computed, in tests/golden/llama31_8b/model."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np

from models.llama import network
from models.llama.architectures import Architecture
from models.llama.layer import Layer
from workloads.llama31_8b import hugging_face

FOLDER = Path(__file__).parents[2] / 'golden' / 'llama31_8b' / 'model'
NAMES = sorted(path.stem for path in FOLDER.glob('*.json'))


class Case:
    """A golden case: its architecture, weights and tokens, and the official values."""

    def __init__(self, name):
        self.name = name
        self.values = json.loads((FOLDER / f'{name}.json').read_text())
        c = self.config = self.values['config']
        self.architecture = Architecture(
            layers=c['layers'], width=c['hidden'], feed_forward=c['ffn'], heads=c['heads'],
            key_value_heads=c['kv'], head_size=c.get('head_dim', c['hidden'] // c['heads']),
            vocabulary=c['vocab'], rotary_base=c['theta'],
            original_length=self.values['rope_scaling']['original_max_position_embeddings'],
        )  # fmt: skip

    def logits(self, precision, elsewhere):
        """Official ones, and their positions; `elsewhere`: the folder of what is not committed."""
        file = f'{self.name}.npz'
        folder = FOLDER if (FOLDER / file).exists() else elsewhere / 'llama31_8b' / 'model'
        positions = self.config.get('positions', slice(None))
        return np.load(folder / file)[f'logits_{precision}'], positions

    def params(self, dtype):
        weights = {name: self.weight(name) for name in self.values['parameters']}
        params = hugging_face.imported(weights, self.architecture)
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def weight(self, name):
        """The rule of tests/golden/README.md."""
        c, shape = self.config, self.values['parameters'][name]['shape']
        z = np.random.default_rng([c['salt'], zlib.crc32(name.encode())]).standard_normal(shape)
        if name.endswith('norm.weight'):
            return (1 + 0.1 * z).astype(np.float32)
        narrow = name.endswith(('o_proj.weight', 'down_proj.weight'))
        return (c['std'] / (np.sqrt(2 * c['layers']) if narrow else 1) * z).astype(np.float32)

    def tokens(self, step):
        c = self.config
        rng = np.random.default_rng([c['salt'], 7000 + step])
        return rng.integers(0, c['vocab'], (c['batch'], c['length'] + 1))


def loss(params, tokens, architecture, dtype):
    x = network.activations(params, tokens[:, :-1], Layer(architecture, dtype))
    flat = x.reshape(-1, x.shape[-1])
    return network.losses(flat, params['head'], tokens[:, 1:].ravel()).mean()
