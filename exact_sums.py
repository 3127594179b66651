# SPDX-License-Identifier: Apache-2.0
"""Sums whose bits depend on no order: of fixed-point numbers, as 64-bit integers.

Floating-point addition is not associative, so a sum over devices or micro-steps depends on how many
there are, and training amplifies the difference. Integer addition is associative.

JAX's types have 32 bits outside of these functions; none uses float64.
"""

import dataclasses
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NOT_SPLIT: Mapping[str, int] = types.MappingProxyType({})


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
        """Number of fractional bits."""
        return 62 - round(math.log2(self.limit)) - (self.addends - 1).bit_length()

    @jax.enable_x64(True)
    def encode(self, x: jax.Array) -> jax.Array:
        """x · 2^bits, rounded, as int64. Meaningless if one is `rejected`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.round(wide * 2.0**self.bits).astype(jnp.int64)

    def rejected(self, largest: 'Largest') -> jax.Array:
        """The place, from 1, of an element that is NaN or beyond the limit; 0 if none is.

        A sum of such elements does not show it.
        """
        return jnp.where(largest.value <= self.limit, 0, largest.place)

    def mean(self, total: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The average of all addends, from their sum."""
        return total.astype(dtype) * 2.0**-self.bits / self.addends

    def value(self, total: int, count: int = 1) -> float:
        """A sum as a number, divided by `count`, on the host; rounded once."""
        return total / (count << self.bits)


class Largest(NamedTuple):
    """The largest of an array's elements in magnitude, a NaN if there is one.

    Attributes:
      value: its magnitude, fp32.
      place: where it is, from 1, int32.
    """

    value: jax.Array
    place: jax.Array


@jax.enable_x64(True)
def _word(x: jax.Array) -> jax.Array:
    """An int64 that is larger, the larger an array's largest element is; see `_largest`.

    By its bits, of which those of a NaN are larger than those of any number.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)).ravel(), jnp.int32)
    return jnp.max((bits.astype(jnp.int64) << 32) + jnp.arange(1, x.size + 1))


@jax.enable_x64(True)
def _largest(word: jax.Array) -> Largest:
    value = lax.bitcast_convert_type((word >> 32).astype(jnp.int32), jnp.float32)
    return Largest(value, (word & 0xFFFFFFFF).astype(jnp.int32))


def psum(tree: Any, formats: Any, axis: str) -> tuple[Any, jax.Array, jax.Array]:
    """Adds up a tree of floating-point arrays over a mesh's axis.

    Args:
      tree: each device's addends.
      formats: a `FixedPoint` for every array, or for every subtree.
      axis: of the mesh.

    Returns:
      (sums, rejected, largest): int64 arrays in the shapes of `tree`, replicated; in its order, for
      every array `FixedPoint.rejected`, int32 [arrays], and the magnitude of its largest element,
      fp32 [arrays], over all devices. Where one is rejected, the sums mean nothing.
    """
    broadcast = jax.tree.map(lambda form, part: jax.tree.map(lambda _: form, part), formats, tree)
    arrays, structure = jax.tree.flatten(tree)
    forms = jax.tree.leaves(broadcast)
    # One call: XLA combines what is small into one collective, for each is a synchronization.
    sums = lax.psum([form.encode(x) for form, x in zip(forms, arrays, strict=True)], axis)
    words = lax.pmax(jnp.stack([_word(x) for x in arrays]), axis)
    found = [_largest(word) for word in words]
    rejected = [form.rejected(each) for form, each in zip(forms, found, strict=True)]
    return (
        jax.tree.unflatten(structure, sums),
        jnp.stack(rejected),
        jnp.stack([each.value for each in found]),
    )


class Sum(NamedTuple):
    """A sum over a mesh's axis, of which a device holds a part.

    Attributes:
      total: int64, along one axis a part.
      word: a `_word` of this device's addend, int64; an array of them for sums that were stacked.
    """

    total: jax.Array
    word: jax.Array


def psum_scatter(x: jax.Array, form: FixedPoint, axis: str, dimension: int = 0) -> Sum:
    """Adds up an array over a mesh's axis; every device receives its part along `dimension`."""
    parts = lax.psum_scatter(form.encode(x), axis, scatter_dimension=dimension, tiled=True)
    return Sum(parts, _word(x))


@jax.enable_x64(True)
def largest_addends(tree: Any, axis: str) -> Any:
    """Of nested dicts of `Sum`, the largest addend of each on all devices."""
    sums, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Sum))
    if not sums:
        return tree
    words = lax.pmax(jnp.stack([jnp.max(x.word) for x in sums]), axis)
    return jax.tree.unflatten(structure, [_largest(word) for word in words])


@jax.enable_x64(True)
def are_finite(tree: Any) -> jax.Array:
    """Whether all arrays are, and this device's addends of every `Sum`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Sum))
    found = [_largest(jnp.max(x.word)).value if isinstance(x, Sum) else x for x in leaves]
    return jnp.stack([jnp.isfinite(x).all() for x in found]).all()


@jax.enable_x64(True)
def total(x: jax.Array) -> jax.Array:
    """The sum of all elements, integers or truth values, as int64."""
    return jnp.sum(x, dtype=jnp.int64)


def largest(x: jax.Array) -> Largest:
    """The largest element of an array."""
    return _largest(_word(x))


@jax.enable_x64(True)
def norm(tree: Any, axis: str | None = None, split: Collection[str] = ()) -> jax.Array:
    """The Euclidean norm of all arrays together, whatever the order of their elements.

    Elements are divided by a power of two no smaller than the largest, so that squares are at most
    1, and squares are added up as integers of 58 bits behind the point, in two halves. The relative
    error is that of fp32, for up to 2^33 elements of which none that counts is below 2^-17 of the
    largest.

    Args:
      tree: fp32 arrays, with an element at least.
      axis: of the mesh over which some arrays are split, if any are.
      split: their names, as `named` gives them.

    Returns:
      fp32 scalar; NaN if an element is, infinite if one is not below 2^126 in magnitude.
    """
    leaves = named(tree)
    most = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for _, x in leaves]))
    if axis:
        most = lax.pmax(most, axis)
    # Powers of two by their bits, for `jnp.ldexp` computes them in floating point.
    exponent = jnp.clip(lax.bitcast_convert_type(most, jnp.int32) >> 23, 1, 252)
    scale = lax.bitcast_convert_type((exponent + 1) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((253 - exponent) << 23, jnp.float32)
    halves = {False: jnp.zeros(2, jnp.int64), True: jnp.zeros(2, jnp.int64)}
    for name, x in leaves:
        fixed = jnp.round(jnp.square(x * inverse) * 2.0**58).astype(jnp.int64)
        halves[name in split] += jnp.stack([total(fixed >> 29), total(fixed & (2**29 - 1))])
    of_parts = lax.psum(halves[True], axis) if axis else halves[True]
    upper, lower = halves[False] + of_parts
    upper, lower = upper + (lower >> 29), lower & (2**29 - 1)
    squares = upper.astype(jnp.float32) * 2.0**-29 + lower.astype(jnp.float32) * 2.0**-58
    return jnp.where(most < 2.0**126, jnp.sqrt(squares) * scale, most + jnp.inf)


def named(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of nested dicts, in the order of a flattened tree, with the path as their name."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Sum))[0]
    return [(jax.tree_util.keystr(p, simple=True, separator='/'), leaf) for p, leaf in pairs]
