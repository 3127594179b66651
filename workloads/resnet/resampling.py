# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling of images on any regular grid, compiled for the processor at hand.

No library resizes on the official grid (see `image_preprocessing`), and warping, which can, costs
twice this. The arithmetic is on integers, so every processor gives the same pixels; before they are
rounded they differ from exact arithmetic by 0.02 grey levels at most.
"""

import os

import numba
import numpy as np

# Of a weight, and of the fraction of a grey level after sampling along x; a sum of products along y
# has 8 bits more than both, which 31 bits hold.
WEIGHT_BITS, FRACTION_BITS = 14, 8
# Compiled once for all runs where the folder can be written to, else once a process.
CACHE = os.access(os.path.dirname(os.path.abspath(__file__)), os.W_OK)

SIGNATURE = numba.void(
    numba.types.Array(numba.uint8, 1, 'C', readonly=True),
    numba.int64,
    numba.types.UniTuple(numba.int64, 4),
    numba.types.UniTuple(numba.float64, 2),
    numba.types.UniTuple(numba.float64, 2),
    numba.boolean,
    numba.uint8[:, :, ::1],
)


def sample(
    image: np.ndarray,
    box: tuple[int, int, int, int],
    first: tuple[float, float],
    step: tuple[float, float],
    *,
    size: int,
    flip: bool,
) -> np.ndarray:
    """Samples a box of an image at first + i·step, i < size, along y and x.

    Beyond the box its last row or column is repeated. Halves are rounded to even. The interpreter's
    lock is released.

    Args:
        image: uint8[H,W,3].
        box: (y, x, height, width) of the part that is sampled, in pixels, inside the image.
        first: where the first sample lies in the box, (y, x), not negative.
        step: from one sample to the next, (y, x), positive.
        size: samples along each axis.
        flip: whether the box is flipped left and right before it is sampled, so that its column c
            is column width - 1 - c of the image's.

    Returns:
        uint8[size,size,3].
    """
    out = np.empty((size, size, 3), np.uint8)
    _sample(image.ravel(), image.shape[1], box, first, step, flip, out)
    return out


@numba.njit(SIGNATURE, nogil=True, cache=CACHE)
def _sample(pixels, width, box, first, step, mirror, out):
    """Writes `sample` of an image uint8[H·W·3] of this width to `out`, uint8[h,w,3]."""
    one = np.int32(1 << WEIGHT_BITS)
    excess, final = np.int32(WEIGHT_BITS - FRACTION_BITS), np.int32(WEIGHT_BITS + FRACTION_BITS)
    half, final_half = np.int32(1 << (excess - 1)), np.int32(1 << (final - 1))
    top, left, box_height, box_width = box
    rows, columns, last = out.shape[0], out.shape[1], box_width - 1
    # Each column's two neighbours, as unsigned offsets in a row (or every access would be checked
    # for a negative index), and the far one's weight.
    near, far = np.empty(columns, np.uintp), np.empty(columns, np.uintp)
    weights = np.empty(columns, np.int32)
    for j in range(columns):
        coordinate = first[1] + j * step[1]
        low = int(coordinate)
        weights[j] = np.int32((coordinate - low) * one + 0.5)
        low, high = min(low, last), min(low + 1, last)
        if mirror:
            low, high = last - low, last - high
        near[j], far[j] = 3 * low, 3 * high
    # The last even and the last odd row that were needed, sampled along x.
    sampled = np.empty((2, 3 * columns), np.int32)
    held = np.full(2, -1)
    green, blue = np.uintp(1), np.uintp(2)
    for i in range(rows):
        coordinate = first[0] + i * step[0]
        low = int(coordinate)
        upper, lower = min(low, box_height - 1), min(low + 1, box_height - 1)
        for row in (upper, lower):
            if held[row & 1] == row:
                continue
            held[row & 1] = row
            start = 3 * ((top + row) * width + left)
            line, target = pixels[start : start + 3 * box_width], sampled[row & 1]
            for j in range(columns):
                a, b, w, o = near[j], far[j], weights[j], np.uintp(3 * j)
                r = np.int32(line[a])
                g = np.int32(line[a + green])
                v = np.int32(line[a + blue])
                target[o] = np.int32(r * one + (np.int32(line[b]) - r) * w + half) >> excess
                target[o + green] = (
                    np.int32(g * one + (np.int32(line[b + green]) - g) * w + half) >> excess
                )
                target[o + blue] = (
                    np.int32(v * one + (np.int32(line[b + blue]) - v) * w + half) >> excess
                )
        above, below, result = sampled[upper & 1], sampled[lower & 1], out[i].reshape(-1)
        w = np.int32((coordinate - low) * one + 0.5)
        u = one - w
        for k in range(3 * columns):
            total = np.int32(np.int32(above[k] * u) + np.int32(below[k] * w))
            to_even = final_half - np.int32(1) + ((total >> final) & np.int32(1))
            result[k] = np.uint8(np.int32(total + to_even) >> final)
