# SPDX-License-Identifier: Apache-2.0
"""The models by name: `create(name, …)` builds one; `NAMES` lists them.

A further model is a line in `_MODELS`; it must take the attributes that `create` passes.
"""

import functools

import jax.numpy as jnp

from models.resnet.network import Padding, ResNet

_MODELS = {
    'resnet50': functools.partial(
        ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True, width=64, large_stem=True
    ),
    'resnet18_cifar': functools.partial(
        ResNet, stage_sizes=(2, 2, 2, 2), bottleneck=False, width=64, large_stem=False
    ),
    'resnet8_cifar': functools.partial(
        ResNet, stage_sizes=(1, 1, 1), bottleneck=False, width=8, large_stem=False
    ),
    'resnet_digits': functools.partial(
        ResNet, stage_sizes=(1, 1, 1), bottleneck=True, width=16, large_stem=False
    ),
}
NAMES = tuple(_MODELS)


def create(
    name: str,
    *,
    num_classes: int,
    bn_span: int,
    padding: Padding = 'symmetric',
    dtype: jnp.dtype = jnp.float32,
    truncated_init: bool = True,
) -> ResNet:
    """Builds a model; see `ResNet` for the attributes.

    Raises:
      KeyError: for a name that is not in `NAMES`.
    """
    return _MODELS[name](
        num_classes=num_classes,
        bn_span=bn_span,
        padding=padding,
        dtype=dtype,
        truncated_init=truncated_init,
    )
