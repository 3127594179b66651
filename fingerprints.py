# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: 64 bits that tell arrays from others, however they are spread over devices."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exact_sums import NOT_SPLIT, named

_BLOCK = 2**20  # Elements of a split array whose words are in memory at once, if rows allow.
_ROW = 1024  # Elements of an array whose words are added up at once.
_NOWHERE = np.uint64(2**64 - 1)  # The place of what fills up the last row.


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


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, _unsigned(x))


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
    part: jax.Array, whole: Sequence[int], dimension: int, index: jax.Array, first: np.uint64
) -> jax.Array:
    """The sum of the words of the part of this index, uint64.

    In blocks, one after the other: on a CPU, the words are in memory.
    """
    even = [n for n in range(1, len(part) + 1) if len(part) % n == 0]
    blocks = next((n for n in even if part.size // n <= _BLOCK), len(part))
    rows = len(part) // blocks

    def add(total, block):
        number, these = block
        starts = [jnp.uint64(0)] * part.ndim
        starts[dimension] += index.astype(np.uint64) * np.uint64(part.shape[dimension])
        starts[0] += number * np.uint64(rows)
        places = _places(these.shape, whole, starts) + first
        return total + jnp.sum(_words(_bits(these), places), dtype=np.uint64), None

    parts = (jnp.arange(blocks, dtype=np.uint64), part.reshape(blocks, rows, *part.shape[1:]))
    return lax.scan(add, jnp.uint64(0), parts)[0]


@jax.enable_x64(True)
def of(
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
        dimension = split.get(name)
        if dimension is None:
            rows.append(-(-x.size // _ROW))
            fill = [(0, rows[-1] * _ROW - x.size, 0)]  # lax's own, for jnp.pad takes long to trace.
            words = lax.reshape(_bits(x), (x.size,)).astype(np.uint32)
            bits.append(lax.pad(words, np.uint32(0), fill))
            place = lax.iota(np.uint64, x.size) + first
            places.append(lax.pad(place, _NOWHERE, fill))
            found.append(None)
        else:
            of_part = _fingerprint_of_part(x, shapes[name], dimension, index, first)
            found.append(lax.psum(of_part, axis))
    # One vector, for a program of hundreds of sums takes many seconds to compile.
    place = jnp.concatenate(places)
    words = jnp.where(place == _NOWHERE, 0, _words(jnp.concatenate(bits), place))
    sums = jnp.cumsum(jnp.sum(words.reshape(-1, _ROW), axis=1, dtype=np.uint64))
    whole = iter(jnp.diff(sums[np.cumsum(rows) - 1], prepend=np.uint64(0)))
    return jnp.stack([next(whole) if x is None else x for x in found])


def words_on_host(
    block: np.ndarray, starts: Sequence[int], whole: Sequence[int], first: np.uint64
) -> int:
    """The sum, modulo 2^64, of the words of a block of an array.

    Args:
      block: it.
      starts: where it begins in the array.
      whole: the array's shape.
      first: the place of the array's first element.
    """
    places = np.full(block.shape, first)
    with np.errstate(over='ignore'):
        for d, (start, count) in enumerate(zip(starts, block.shape, strict=True)):
            along = np.arange(start, start + count, dtype=np.uint64)
            along *= np.uint64(math.prod(whole[d + 1 :]))
            places += along.reshape(-1, *[1] * (block.ndim - d - 1))
        return int(np.sum(_words(block.view(_unsigned(block)), places), dtype=np.uint64))


def _of_host_array(x: np.ndarray, first: np.uint64) -> int:
    row = x.ravel()
    blocks = ((start, row[start : start + _BLOCK]) for start in range(0, x.size, _BLOCK))
    return sum(words_on_host(block, (start,), row.shape, first) for start, block in blocks) % 2**64


def of_host_arrays(tree: Mapping[str, Any]) -> list[int]:
    """The same of NumPy arrays, as Python's integers."""
    arrays = {name: np.asarray(x) for name, x in named(tree)}
    firsts = first_places(tree, {name: x.shape for name, x in arrays.items()})
    return [_of_host_array(x, first) for x, first in zip(arrays.values(), firsts, strict=True)]


def shown(found: Any) -> str:
    """The fingerprint of what these are of, as people see it: 16 hex digits."""
    return f'{sum(map(int, np.ravel(np.asarray(found, np.uint64)))) % 2**64:016x}'
