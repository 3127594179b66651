# SPDX-License-Identifier: Apache-2.0
"""Sums whose bits depend on no order: of fixed-point numbers, as 64-bit integers.

Floating-point addition is not associative, so a sum over devices or micro-steps depends on how many
there are, and training amplifies the difference. Integer addition is associative.

JAX's types have 32 bits outside of these functions; none uses float64.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """A format of 64-bit integers: the finest in which a sum cannot overflow.

    Attributes:
      limit: no addend is larger in magnitude; a power of two.
      addends: so many are added up in all.
    """

    limit: float
    addends: int

    @property
    def bits(self) -> int:
        """Behind the binary point."""
        return 62 - round(math.log2(self.limit)) - (self.addends - 1).bit_length()

    @jax.enable_x64(True)
    def encode(self, x: jax.Array) -> jax.Array:
        """x · 2^bits, rounded, as int64. Meaningless if one is `rejected`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.round(wide * 2.0**self.bits).astype(jnp.int64)

    def rejected(self, x: jax.Array) -> jax.Array:
        """The place, from 1, of the last element that is NaN or beyond the limit; 0 if none is.

        A sum of such elements does not show it.
        """
        places = jnp.arange(1, x.size + 1, dtype=jnp.int32).reshape(x.shape)
        return jnp.where(jnp.abs(x) <= self.limit, 0, places).max()

    def mean(self, total: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The average of all addends, from their sum."""
        return total.astype(dtype) * 2.0**-self.bits / self.addends

    def value(self, total: int, count: int = 1) -> float:
        """A sum as a number, divided by `count`, on the host; rounded once."""
        return total / (count << self.bits)


def psum(tree: Any, formats: Any, axis: str) -> tuple[Any, jax.Array]:
    """Adds up a tree of floating-point arrays over a mesh's axis.

    Args:
      tree: each device's addends.
      formats: a `FixedPoint` for every array, or for every subtree.
      axis: of the mesh.

    Returns:
      (sums, rejected): int64 arrays in the shapes of `tree`, replicated; int32 [arrays], in the
      tree's order `FixedPoint.rejected` of every array, the largest of all devices. Where one is
      not 0, the sums mean nothing.
    """
    forms = jax.tree.map(lambda form, part: jax.tree.map(lambda _: form, part), formats, tree)
    sums = jax.tree.map(lambda form, x: form.encode(x), forms, tree)
    rejected = jax.tree.leaves(jax.tree.map(lambda form, x: form.rejected(x), forms, tree))
    return lax.psum(sums, axis), lax.pmax(jnp.stack(rejected), axis)


def psum_scatter(
    x: jax.Array, form: FixedPoint, axis: str, dimension: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Adds up an array over a mesh's axis; every device receives its part along `dimension`.

    Returns:
      (sums, rejected): as `psum`; `rejected` is a scalar, the same on all devices.
    """
    sums = lax.psum_scatter(form.encode(x), axis, scatter_dimension=dimension, tiled=True)
    return sums, lax.pmax(form.rejected(x), axis)


@jax.enable_x64(True)
def total(x: jax.Array) -> jax.Array:
    """The sum of all elements, integers or truth values, as int64."""
    return jnp.sum(x, dtype=jnp.int64)


@jax.enable_x64(True)
def norm(tree: Any, axis: str | None = None) -> jax.Array:
    """The Euclidean norm of all arrays together, whatever the order of their elements.

    Elements are divided by a power of two no smaller than the largest, so that squares are at most
    1, and squares are added up as integers of 58 bits behind the point, in two halves. The relative
    error is that of fp32, for up to 2^33 elements of which none that counts is below 2^-17 of the
    largest.

    Args:
      tree: fp32 arrays, with an element at least.
      axis: of the mesh over which every array is split, if any.

    Returns:
      fp32 scalar; NaN if an element is, infinite if one is not below 2^126 in magnitude.
    """
    leaves = jax.tree.leaves(tree)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
    if axis:
        largest = lax.pmax(largest, axis)
    # Powers of two by their bits, for `jnp.ldexp` computes them in floating point.
    exponent = jnp.clip(lax.bitcast_convert_type(largest, jnp.int32) >> 23, 1, 252)
    scale = lax.bitcast_convert_type((exponent + 1) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((253 - exponent) << 23, jnp.float32)
    upper, lower = jnp.int64(0), jnp.int64(0)
    for x in leaves:
        fixed = jnp.round(jnp.square(x * inverse) * 2.0**58).astype(jnp.int64)
        upper += jnp.sum(fixed >> 29, dtype=jnp.int64)
        lower += jnp.sum(fixed & (2**29 - 1), dtype=jnp.int64)
    if axis:
        upper, lower = lax.psum((upper, lower), axis)
    upper, lower = upper + (lower >> 29), lower & (2**29 - 1)
    total = upper.astype(jnp.float32) * 2.0**-29 + lower.astype(jnp.float32) * 2.0**-58
    return jnp.where(largest < 2.0**126, jnp.sqrt(total) * scale, largest + jnp.inf)


def _mixed(x: Any) -> Any:
    """A bijection of 64-bit words that changes half of the bits for a change of one.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(xp: Any, name: str, array: Any) -> Any:
    """A 64-bit word for every element of an array: of its name, its place and its bits."""
    unsigned = np.dtype(f'uint{8 * array.dtype.itemsize}')
    bits = lax.bitcast_convert_type(array, unsigned) if xp is jnp else array.view(unsigned)
    described = f'{name} {array.dtype} {array.shape}'.encode()
    start = int.from_bytes(hashlib.blake2b(described, digest_size=8).digest(), 'little')
    place = xp.arange(array.size, dtype=np.uint64) + np.uint64(start)
    return _mixed(_mixed(place) ^ bits.ravel().astype(np.uint64))


def named(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of nested dicts, in the order of a flattened tree, with the path as their name."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [('/'.join(str(key.key) for key in path), leaf) for path, leaf in pairs]


@jax.enable_x64(True)
def fingerprint(tree: Mapping[str, Any]) -> jax.Array:
    """64 bits that tell a tree of arrays from another, as a uint64; see `fingerprint_on_host`.

    A sum modulo 2^64 over all elements, so it does not depend on how arrays are split.
    """
    return sum((jnp.sum(_words(jnp, name, array)) for name, array in named(tree)), jnp.uint64(0))


def fingerprint_on_host(tree: Mapping[str, Any]) -> int:
    """The same of nested dicts of NumPy arrays."""
    with np.errstate(over='ignore'):
        sums = [
            int(np.sum(_words(np, name, np.asarray(array)), dtype=np.uint64))
            for name, array in named(tree)
        ]
    return sum(sums) % 2**64
