# SPDX-License-Identifier: Apache-2.0
"""Sums whose bits depend on no order: of fixed-point numbers, as 64-bit integers.

Floating-point addition is not associative, so a sum over devices or micro-steps depends on how many
there are, and training amplifies the difference. Integer addition is associative.

JAX's types have 32 bits outside of these functions; none uses float64.
"""

import dataclasses
import hashlib
import itertools
import math
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NOT_SPLIT: Mapping[str, int] = types.MappingProxyType({})
_BLOCK = 2**20  # Elements of a split array whose words are in memory at once, if rows allow.
_ROW = 1024  # Elements of an array whose words are added up at once.
_NOWHERE = np.uint64(2**64 - 1)  # The place of what fills up the last row.


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
    # In one vector, for every collective is a wait.
    parts = [form.encode(x).ravel() for form, x in zip(forms, arrays, strict=True)]
    vector = lax.psum(jnp.concatenate(parts), axis)
    words = lax.pmax(jnp.stack([_word(x) for x in arrays]), axis)
    stops = itertools.accumulate(x.size for x in arrays)
    sums = [
        lax.slice(vector, [stop - x.size], [stop]).reshape(x.shape)
        for stop, x in zip(stops, arrays, strict=True)
    ]
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


def _mixed(x: Any) -> Any:
    """A bijection of 64-bit words that changes half of the bits for a change of one.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_places(tree: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[np.uint64]:
    """The place of every array's first element in nested dicts, in the order of `named`.

    It begins with a hash of all names, dtypes and shapes.

    Args:
      tree: arrays, or what has their names and dtypes.
      shapes: of the whole arrays, by name.
    """
    described = [f'{name} {x.dtype} {list(shapes[name])}' for name, x in named(tree)]
    digest = hashlib.blake2b('\n'.join(described).encode(), digest_size=8).digest()
    first, found = int.from_bytes(digest, 'little'), []
    for name, _ in named(tree):
        found.append(np.uint64(first % 2**64))
        first += math.prod(shapes[name])
    return found


def _unsigned(array: Any) -> np.dtype:
    return np.dtype(f'uint{8 * array.dtype.itemsize}')


def _whole_shape(part: Any, dimension: int | None, parts: int) -> list[int]:
    """The shape of an array that is split into so many parts along a dimension, if it is."""
    return [n * parts if d == dimension else n for d, n in enumerate(part.shape)]


def _words(bits: Any, places: Any) -> Any:
    """A word for every element, of its bits and its place."""
    return _mixed(_mixed(places) ^ bits.astype(np.uint64))


def _places(part: Sequence[int], whole: Sequence[int], starts: Sequence[jax.Array]) -> jax.Array:
    """Where a part is in the whole array, element by element, uint64; it starts at `starts`."""
    places = jnp.zeros(part, np.uint64)
    for d, start in enumerate(starts):
        stride = np.uint64(math.prod(whole[d + 1 :]))
        places += (lax.broadcasted_iota(np.uint64, part, d) + start) * stride
    return places


def _fingerprint_of_part(
    bits: jax.Array, whole: Sequence[int], dimension: int, index: jax.Array, first: np.uint64
) -> jax.Array:
    """The sum of the words of the part of this index, uint64.

    In blocks, one after the other: on a CPU, the words are in memory.
    """
    even = [n for n in range(1, len(bits) + 1) if len(bits) % n == 0]
    blocks = next((n for n in even if bits.size // n <= _BLOCK), len(bits))
    rows = len(bits) // blocks

    def add(total, block):
        number, these = block
        starts = [jnp.uint64(0)] * bits.ndim
        starts[dimension] += index.astype(np.uint64) * np.uint64(bits.shape[dimension])
        starts[0] += number * np.uint64(rows)
        places = _places(these.shape, whole, starts) + first
        return total + jnp.sum(_words(these, places), dtype=np.uint64), None

    parts = (jnp.arange(blocks, dtype=np.uint64), bits.reshape(blocks, rows, *bits.shape[1:]))
    return lax.scan(add, jnp.uint64(0), parts)[0]


@jax.enable_x64(True)
def fingerprints(
    tree: Mapping[str, Any], axis: str | None = None, split: Mapping[str, int] = NOT_SPLIT
) -> jax.Array:
    """64 bits for every array of nested dicts, uint64 [arrays], in the order of `named`.

    They are the sum, modulo 2^64, of a word for every element, of its place in the tree and its
    bits. So they do not depend on how arrays are split. Their own sum is the tree's fingerprint,
    which tells it from others (see `shown`).

    Args:
      tree: arrays whose elements have at most 32 bits.
      axis: of the mesh over which some arrays are split, if any are.
      split: their names, as `named` gives them, and along which dimension each is.
    """
    parts, index = (lax.axis_size(axis), lax.axis_index(axis)) if axis else (1, jnp.uint32(0))
    shapes = {name: _whole_shape(x, split.get(name), parts) for name, x in named(tree)}
    found: list[jax.Array | None] = []  # None: it is one of those that are added up in rows.
    bits, places, rows = [], [], []
    for (name, x), first in zip(named(tree), first_places(tree, shapes), strict=True):
        mine, dimension = lax.bitcast_convert_type(x, _unsigned(x)), split.get(name)
        if dimension is None:
            rows.append(-(-x.size // _ROW))
            fill = (0, rows[-1] * _ROW - x.size)
            bits.append(jnp.pad(mine.ravel().astype(np.uint32), fill))
            place = jnp.arange(x.size, dtype=np.uint64) + first
            places.append(jnp.pad(place, fill, constant_values=_NOWHERE))
            found.append(None)
        else:
            of_part = _fingerprint_of_part(mine, shapes[name], dimension, index, first)
            found.append(lax.psum(of_part, axis))
    # One vector, for a program of hundreds of sums takes many seconds to compile.
    place = jnp.concatenate(places)
    words = jnp.where(place == _NOWHERE, 0, _words(jnp.concatenate(bits), place))
    sums = jnp.cumsum(jnp.sum(words.reshape(-1, _ROW), axis=1, dtype=np.uint64))
    whole = iter(jnp.diff(sums[np.cumsum(rows) - 1], prepend=np.uint64(0)))
    return jnp.stack([next(whole) if x is None else x for x in found])


def words_on_host(x: np.ndarray, first: np.uint64) -> int:
    """The sum, modulo 2^64, of the words of elements in a row; `first`: the first one's place."""
    with np.errstate(over='ignore'):
        places = np.arange(x.size, dtype=np.uint64) + first
        return int(np.sum(_words(x.view(_unsigned(x)).ravel(), places), dtype=np.uint64))


def fingerprints_on_host(tree: Mapping[str, Any]) -> list[int]:
    """`fingerprints` of NumPy arrays."""
    arrays = {name: np.asarray(x) for name, x in named(tree)}
    firsts = first_places(tree, {name: x.shape for name, x in arrays.items()})
    return [words_on_host(x, first) for x, first in zip(arrays.values(), firsts, strict=True)]


def shown(fingerprints: Any) -> str:
    """The fingerprint of what these are of, as people see it: 16 hex digits."""
    return f'{sum(map(int, np.ravel(np.asarray(fingerprints, np.uint64)))) % 2**64:016x}'
