# SPDX-License-Identifier: Apache-2.0
"""The task of image classification: what it feeds the model, its loss and its quality metric.

It is one of `train_lib.Task`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from exact_sums import NOT_SPLIT, FixedPoint
from models.resnet import network
from train_lib import Variables, gradient_of
from workloads.resnet.fields import ResNetConfig
from workloads.resnet.images import PADDING_LABEL

# Subtracted from RGB in 0..255 on the device; there is no division by a standard deviation.
CHANNEL_MEANS = (123.68, 116.78, 103.94)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Softmax cross-entropy against (1 - s)·onehot + s/classes.

    Args:
      logits: [N, classes], fp32.
      labels: [N], int32.
      label_smoothing: s.

    Returns:
      [N], fp32.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """The task, for one configuration.

    Batches are {'image': uint8 [N, H, W, 3], 'label': int32 [N]}; in evaluation a label of -1
    marks padding, which counts for nothing.
    """

    config: ResNetConfig
    num_classes: int

    @property
    def dtype(self) -> str:
        """Of activations."""
        return self.config.dtype

    @property
    def split(self) -> Mapping[str, int]:
        """No variable is split over the devices."""
        return NOT_SPLIT

    @property
    def model(self):
        """The network, a Flax module."""
        return network.create(
            self.config.model,
            num_classes=self.num_classes,
            bn_span=self.config.bn_span,
            padding=cast(network.Padding, self.config.padding),
            dtype=jnp.dtype(self.config.dtype),
            truncated_init=self.config.truncated_init,
        )

    def abstract_batch(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        size = self.config.image_size
        return {
            'image': jax.ShapeDtypeStruct((examples, size, size, 3), np.uint8),
            'label': jax.ShapeDtypeStruct((examples,), np.int32),
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The model's variables {'params', 'batch_stats'}, drawn from `key`."""
        size = self.config.image_size
        images = jnp.zeros((1, size, size, 3), jnp.float32)
        return self.model.init(key, images, train=False)

    def _inputs(self, image: jax.Array) -> jax.Array:
        return image.astype(jnp.float32) - jnp.array(CHANNEL_MEANS)[None, None, None]

    def train_loss(self, variables: dict[str, Any], batch: dict[str, jax.Array]):
        """Mean loss over a training batch.

        Returns:
          (loss, (metrics, {'batch_stats': …})): metrics are means over the batch; batch_stats are
          the batch's own (see models/resnet/batch_norm.py).
        """
        logits, updated = self.model.apply(
            variables, self._inputs(batch['image']), train=True, mutable=['batch_stats']
        )
        losses = cross_entropy(logits, batch['label'], self.config.label_smoothing)
        top1 = (logits.argmax(-1) == batch['label']).astype(jnp.float32)
        loss = losses.mean()
        return loss, ({'loss': loss, 'top1': top1.mean()}, updated)

    def gradient(self, variables: Variables, batch: Any, scale: jax.Array, form: FixedPoint):
        """As `train_lib.Task`: of `train_loss`."""
        del form
        return gradient_of(self.train_loss, variables, batch, scale)

    def evaluate(self, variables: dict[str, Any], batch: dict[str, jax.Array]):
        """Every example's share in the sums over an evaluation set; no label smoothing.

        Returns:
          {'loss': fp32, 'correct': bool, 'examples': bool}, [N]; nothing of one that is padding.
        """
        logits = self.model.apply(variables, self._inputs(batch['image']), train=False)
        real = batch['label'] != PADDING_LABEL
        losses = cross_entropy(logits, jnp.where(real, batch['label'], 0), 0.0)
        return {
            'loss': jnp.where(real, losses, 0.0),
            'correct': real & (logits.argmax(-1) == batch['label']),
            'examples': real,
        }

    def quality(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The evaluation's result from the sums over the whole set: top-1 accuracy and loss."""
        examples = sums['examples']
        return {
            'eval_top1': sums['correct'] / examples,
            'eval_loss': sums['loss'] / examples,
        }
