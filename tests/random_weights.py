# SPDX-License-Identifier: Apache-2.0
"""Weights of every model with random values, for the tests that move them between forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from models.resnet import network
from workloads.resnet import torchvision


def random_variables(model: str, num_classes: int = 10, seed: int = 0) -> dict:
    """Random values for every variable of a model, statistics included; variances above 0."""
    rng = np.random.default_rng(seed)
    net = network.create(model, num_classes=num_classes, bn_span=1)
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    drawn = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    return drawn | {'batch_stats': jax.tree.map(np.abs, drawn['batch_stats'])}


def safetensors_file(path: Path, **metadata: str) -> Path:
    """A good file, but for the metadata."""
    state = torchvision.to_state_dict(random_variables('resnet_digits'), step=3)
    safetensors.numpy.save_file(state, path, {'input': 'reference'} | metadata)
    return path
