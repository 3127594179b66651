# SPDX-License-Identifier: Apache-2.0
"""The task of language modelling: its loss, and the held-out loss that it is judged by.

It is one of `train_lib.Task`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import exact_sums
from exact_sums import FixedPoint
from models.llama import network
from models.llama.architectures import Architecture
from models.llama.layer import Layer
from train_lib import AXIS, Variables

# All matrices, and which of their dimensions is the network's width.
SPLIT = {
    'params/embedding': 1,
    'params/head': 0,
    **{f'params/layers/{name}/kernel': 1 for name in ('query', 'key', 'value', 'gate', 'up')},
    **{f'params/layers/{name}/kernel': 2 for name in ('output', 'down')},
}


def _dimension(name: str, path: Any) -> int | None:
    """Along which dimension a weight is split; of 'layers' one layer's, without their axis."""
    full = '/'.join(['params', name, *(key.key for key in path)])
    dimension = SPLIT.get(full)
    return dimension if dimension is None or name != 'layers' else dimension - 1


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """The task, for sequences of one length.

    Batches are {'tokens': int32 [N, length + 1], 'is_real': bool [N]}: of every sequence the first
    `length` tokens are read, and the last `length` predicted. One that is not real fills up a batch
    of an evaluation, and counts for nothing.

    Attributes:
      architecture: of the network.
      length: of a sequence, in tokens.
      dtype: of activations.
      fused: whether cuDNN computes attention.
    """

    architecture: Architecture
    length: int
    dtype: str
    fused: bool = False

    @property
    def _layer(self) -> Layer:
        return Layer(self.architecture, jnp.dtype(self.dtype), self.fused)

    def abstract_batch(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return {
            'tokens': jax.ShapeDtypeStruct((examples, self.length + 1), np.int32),
            'is_real': jax.ShapeDtypeStruct((examples,), np.bool_),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The model's variables {'params'}, drawn from `key`."""
        return {'params': network.init(key, self.architecture)}

    @property
    def split(self) -> Mapping[str, int]:
        """Every matrix along the width of the network, whichever of its sides that is."""
        return SPLIT

    def _whole(self, name: str, weights: Any) -> Any:
        """Whole weights from parts, if they are parts; matrices in the dtype of activations.

        They would be rounded to it later; so devices send each other no more than they have to.
        """
        width, dtype = self.architecture.width, jnp.dtype(self.dtype)

        def gather(path, part):
            dimension = _dimension(name, path)
            if dimension is None:
                return part
            part = part.astype(dtype)
            if part.shape[dimension] == width:
                return part
            return lax.all_gather(part, AXIS, axis=dimension, tiled=True)

        return jax.tree_util.tree_map_with_path(gather, weights)

    def gradient(self, variables: Variables, batch: Any, scale: jax.Array, form: FixedPoint):
        """As `train_lib.Task`, of the mean loss over the batch's tokens, in nats."""

        def summed(name, gradient):
            def add_up(path, g):
                dimension = _dimension(name, path)
                if dimension is None:
                    return g
                wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
                return exact_sums.psum_scatter(wide / scale, form, AXIS, dimension)

            return jax.tree_util.tree_map_with_path(add_up, gradient)

        loss, gradient = network.gradient(
            variables['params'],
            batch['tokens'],
            self._layer,
            scale,
            self._whole,
            summed,
        )
        return {'params': gradient}, {'loss': loss}

    def evaluate(self, variables: dict[str, Any], batch: dict[str, jax.Array]):
        """Every sequence's share in the sums over an evaluation set.

        Returns:
          {'loss': fp32, 'examples': bool}, [N]; nothing of one that only fills up the batch.
        """
        params, tokens = variables['params'], batch['tokens']
        x = network.activations(params, tokens[:, :-1], self._layer, self._whole)
        losses = network.sequence_losses(x, self._whole('head', params['head']), tokens[:, 1:])
        return {
            'loss': jnp.where(batch['is_real'], losses, 0.0),
            'examples': batch['is_real'],
        }

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The mean loss over the whole set, in nats a token."""
        return {'eval_loss': sums['loss'] / sums['examples']}
