# SPDX-License-Identifier: Apache-2.0
"""The sizes of the networks, by name; a further one is a line. Imports no JAX."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """What sets one Llama apart from another.

    Attributes:
      layers: one after the other.
      width: of the activations between layers.
      feed_forward: width inside of a layer's second half.
      heads: of queries.
      key_value_heads: of keys and values; each serves heads / key_value_heads heads of queries.
      head_size: width of one head; even.
      vocabulary: number of tokens.
      rotary_base: θ, the inverse of the last rotary frequency but for the scaling.
      original_length: in tokens, to which the scaling of the rotary frequencies refers.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    rotary_base: float = 500_000.0
    original_length: int = 8192

    def operations(self, length: int) -> int:
        """That a token needs, forward and backward, in floating point.

        6 for every weight of a matrix, and 12 · layers · heads · head_size · length for the full
        square of attention, as PaLM counts them (Chowdhery et al. 2022, arXiv:2204.02311, appendix
        B); what is recomputed does not count.

        Args:
          length: of a sequence.
        """
        of_heads = self.head_size * 2 * (self.heads + self.key_value_heads)
        matrices = self.layers * self.width * (of_heads + 3 * self.feed_forward)
        attention = 12 * self.layers * self.heads * self.head_size * length
        return 6 * (matrices + self.width * self.vocabulary) + attention


ARCHITECTURES = {
    'llama31_8b': Architecture(
        layers=32,
        width=4096,
        feed_forward=14336,
        heads=32,
        key_value_heads=8,
        head_size=128,
        vocabulary=128_256,
    ),
    # As large as Llama 3.2 1B, for measurements on one GPU.
    'llama_1b': Architecture(
        layers=16,
        width=2048,
        feed_forward=8192,
        heads=32,
        key_value_heads=8,
        head_size=64,
        vocabulary=128_256,
    ),
    # For text as bytes; token 256 ends a document.
    'llama_bytes': Architecture(
        layers=4,
        width=96,
        feed_forward=256,
        heads=4,
        key_value_heads=2,
        head_size=24,
        vocabulary=257,
    ),
}
