# SPDX-License-Identifier: Apache-2.0
"""Sequences of tokens as an `input_pipeline.Source`."""

import numpy as np

from input_pipeline import Batch
from settings.errors import DataError
from workloads.llama31_8b.samples import Samples


class Sequences:
    """The samples of a split, {'tokens': int32 [n, length + 1], 'is_real': bool [n]}.

    Args:
      samples: in the order in which they are used; a run's seed has shaped it already.
      vocabulary: number of tokens that the network knows.
    """

    def __init__(self, samples: Samples, vocabulary: int):
        self._samples, self._vocabulary = samples, vocabulary

    def __len__(self) -> int:
        return len(self._samples)

    def train(self, positions: np.ndarray, seed: int) -> Batch:
        """The samples at some positions."""
        del seed
        return self._batch(positions, len(positions))

    def evaluation(self, indices: np.ndarray, size: int) -> Batch:
        """Samples, then some that are not real."""
        return self._batch(indices, size)

    def _batch(self, numbers: np.ndarray, size: int) -> Batch:
        tokens = np.zeros((size, self._samples.length + 1), np.int32)
        for row, number in enumerate(numbers):
            tokens[row] = self._samples[int(number)]
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise DataError(
                f'{self._samples.file.prefix}.bin has a token that is not in '
                f'0..{self._vocabulary - 1}: it was made for another tokenizer, or is damaged'
            )
        return {'tokens': tokens, 'is_real': np.arange(size) < len(numbers)}
