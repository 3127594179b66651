# SPDX-License-Identifier: Apache-2.0
"""The random numbers of the input, each a pure function of (seed, purpose, counter)."""

import functools

import numpy as np

# Purposes; no (seed, purpose, counter) is used twice.
ORDER, AUGMENTATION = 0, 1


def generator(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Philox with (seed, purpose) as its key: streams of different counters never meet."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


def first_three(seed: int, purpose: int, counters: np.ndarray) -> np.ndarray:
    """The first three numbers of each counter's generator, float64 [n, 3], without making it."""
    stream = generator(seed, purpose, 0)
    state = stream.bit_generator.state
    numbers = np.empty((len(counters), 3))
    for counter, row in zip(counters, numbers, strict=True):
        state['state']['counter'][3] = counter
        stream.bit_generator.state = state
        stream.random(out=row)
    return numbers


@functools.lru_cache(maxsize=3)
def example_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Epoch `epoch`'s permutation of the training set (epochs from 0 here), int [num_examples]."""
    return generator(seed, ORDER, epoch).permutation(num_examples)
