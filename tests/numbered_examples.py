# SPDX-License-Identifier: Apache-2.0
"""A source of examples that are numbers, and a program that makes batches of them without end.

    python -m tests.numbered_examples

prints the ids of its two decoding processes, and waits.
"""

import multiprocessing
import time

import numpy as np

from input_pipeline import AUGMENTATION, Pipeline, Share, generator, shuffled
from settings.errors import DataError

PADDING = -1


class Numbers:
    """Example i is the number i; `drawn` is what is random about it.

    Args:
      count: of examples.
      broken: an example that cannot be used.
    """

    def __init__(self, count: int, broken: int | None = None):
        self.count, self.broken = count, broken
        self.has_been_read = False

    def __len__(self) -> int:
        return self.count

    def train(self, positions, seed):
        self.has_been_read = True
        indices = shuffled(positions, len(self), seed)
        if self.broken in indices:
            raise DataError(f'example {self.broken} cannot be used')
        drawn = [generator(seed, AUGMENTATION, position).random() for position in positions]
        return {'example': indices.copy(), 'position': positions.copy(), 'drawn': np.array(drawn)}

    def evaluation(self, indices, size):
        self.has_been_read = True
        return {'example': np.pad(indices, (0, size - len(indices)), constant_values=PADDING)}


def pipeline(source=None, *, share=Share(0, 64, 64), seed=5, processes=0, num_eval=360) -> Pipeline:  # noqa: B008
    """The batches of 1437 numbers."""
    train = Numbers(1437) if source is None else source
    return Pipeline(train, Numbers(num_eval), seed=seed, share=share, processes=processes)


if __name__ == '__main__':
    batches = pipeline(processes=2).train(0, 10**9)
    for _ in range(4):
        next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(60)
