# SPDX-License-Identifier: Apache-2.0
"""Max-pooling whose gradient needs no scatter.

XLA differentiates a max-pool into select-and-scatter, which on a GPU becomes atomic additions; the
deterministic replacement can be a sequential loop. Here the forward pass keeps which of the
window's taps held the maximum (one byte per output), and in the backward pass every input looks at
the at most four windows that it lies in: the same additions in the same order on every machine.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_WINDOW, _STRIDE = 3, 2


def _taps(padded_nhwc: jax.Array, out_hw: tuple[int, int]) -> list[jax.Array]:
    """The nine strided views of a padded image, in row-major order of the window."""
    n, _, _, c = padded_nhwc.shape
    reach = [_STRIDE * (size - 1) + 1 for size in out_hw]
    return [
        lax.slice(padded_nhwc, (0, i, j, 0), (n, i + reach[0], j + reach[1], c), (1, 2, 2, 1))
        for i in range(_WINDOW)
        for j in range(_WINDOW)
    ]


def _forward(x: jax.Array, padding) -> tuple[jax.Array, jax.Array]:
    out_hw = tuple(
        (size + sum(pad) - _WINDOW) // _STRIDE + 1
        for size, pad in zip(x.shape[1:3], padding, strict=True)
    )
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, lowest, [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)])
    first, *others = _taps(padded, out_hw)
    best, winner = first, jnp.zeros(first.shape, jnp.uint8)
    for tap, candidate in enumerate(others, start=1):
        # Strictly greater: the first of equal maxima wins, as in PyTorch and TensorFlow. A NaN
        # wins too, so that a broken input is not pooled away; asked of `best`, because XLA would
        # write down the answer for all of x.
        better = ~(candidate <= best) & ~jnp.isnan(best)
        best = jnp.where(better, candidate, best)
        winner = jnp.where(better, jnp.uint8(tap), winner)
    return best, winner


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool_3x3_stride_2(x: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """Maximum over 3×3 windows with stride 2.

    Args:
      x: [N, H, W, C], any floating dtype.
      padding: ((above, below), (left, right)); padded positions never win.

    Returns:
      [N, H', W', C] in x's dtype, H' = (H + above + below - 3) // 2 + 1, W' likewise.
    """
    return _forward(x, padding)[0]


def _pool_fwd(x, padding):
    best, winner = _forward(x, padding)
    return best, (winner, x.shape)


def _pool_bwd(padding, residuals, grad):
    winner, (n, height, width, channels) = residuals
    # Pixels of the padded input in pairs: output i has taps 0 and 1 in pair i, tap 2 in the next.
    rows, columns = (size + 1 for size in grad.shape[1:3])
    parity_h, parity_w = (
        lax.broadcasted_iota(jnp.uint8, (1, 1, _STRIDE, 1, _STRIDE, 1), axis) for axis in (2, 4)
    )

    def of_pixels(outputs: jax.Array, late_h: int, late_w: int) -> jax.Array:
        """For every pixel [N, rows, 2, columns, 2, C], the output so many pairs before its own."""
        config = [(0, 0, 0), (late_h, 1 - late_h, 0), (late_w, 1 - late_w, 0), (0, 0, 0)]
        moved = lax.pad(outputs, jnp.zeros((), outputs.dtype), config)
        shape = (n, rows, _STRIDE, columns, _STRIDE, channels)
        return lax.broadcast_in_dim(moved, shape, (0, 1, 3, 5))

    def share(late_h: int, late_w: int) -> jax.Array:
        tap_h, tap_w = parity_h + _STRIDE * late_h, parity_w + _STRIDE * late_w
        is_tap = (tap_h < _WINDOW) & (tap_w < _WINDOW)
        won = is_tap & (of_pixels(winner, late_h, late_w) == tap_h * _WINDOW + tap_w)
        return jnp.where(won, of_pixels(grad, late_h, late_w), 0)

    (above, _), (left, _) = padding
    total = share(0, 0) + share(0, 1) + share(1, 0) + share(1, 1)
    padded = total.reshape(n, rows * _STRIDE, columns * _STRIDE, channels)
    return (padded[:, above : above + height, left : left + width],)


max_pool_3x3_stride_2.defvjp(_pool_fwd, _pool_bwd)
