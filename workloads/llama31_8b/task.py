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

from models.llama import network
from models.llama.architectures import Architecture

# Tokens whose logits are in memory at the same time: 0.5 GiB of the benchmark's vocabulary.
TOKENS_AT_A_TIME = 1024


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
    """

    architecture: Architecture
    length: int
    dtype: str

    def abstract_batch(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return {
            'tokens': jax.ShapeDtypeStruct((examples, self.length + 1), np.int32),
            'is_real': jax.ShapeDtypeStruct((examples,), np.bool_),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The model's variables {'params'}, drawn from `key`."""
        return {'params': network.init(key, self.architecture)}

    def _losses(self, params: Any, tokens: jax.Array) -> jax.Array:
        """The mean over each sequence's tokens, fp32 at least, [N]."""
        dtype = jnp.dtype(self.dtype)
        x = network.activations(params, tokens[:, :-1], self.architecture, dtype)
        at_a_time = np.gcd(tokens.shape[0] * self.length, TOKENS_AT_A_TIME)
        labels = tokens[:, 1:].ravel()
        by_token = network.losses(x.reshape(labels.size, -1), params['head'], labels, at_a_time)
        return by_token.reshape(-1, self.length).mean(1)

    def train_loss(self, variables: dict[str, Any], batch: dict[str, jax.Array]):
        """Mean loss over the tokens of a training batch, in nats.

        Returns:
          (loss, (metrics, {})): there are no statistics.
        """
        loss = self._losses(variables['params'], batch['tokens']).mean()
        return loss, ({'loss': loss}, {})

    def evaluate(self, variables: dict[str, Any], batch: dict[str, jax.Array]):
        """Every sequence's share in the sums over an evaluation set.

        Returns:
          {'loss': fp32, 'examples': bool}, [N]; nothing of one that only fills up the batch.
        """
        losses = self._losses(variables['params'], batch['tokens'])
        return {
            'loss': jnp.where(batch['is_real'], losses, 0.0),
            'examples': batch['is_real'],
        }

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The mean loss over the whole set, in nats a token."""
        return {'eval_loss': sums['loss'] / sums['examples']}
