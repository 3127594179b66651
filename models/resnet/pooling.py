# SPDX-License-Identifier: Apache-2.0
"""Max-pooling whose gradient needs no scatter.

XLA differentiates a max-pool into select-and-scatter, which on a GPU becomes atomic additions; the
deterministic replacement can be a sequential loop. Here the forward pass keeps which of the
window's taps held the maximum (one byte per output), and the backward pass is a sum of dilated
pads, one per tap: the same additions in the same order on every machine.
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
    winner, (_, height, width, _) = residuals
    zero = jnp.zeros((), grad.dtype)
    total = None
    for tap in range(_WINDOW * _WINDOW):
        routed = jnp.where(winner == tap, grad, zero)
        config = [(0, 0, 0)]
        for size, out, offset, (before, _) in zip(
            (height, width), grad.shape[1:3], divmod(tap, _WINDOW), padding, strict=True
        ):
            # Output i came from input row 2·i + offset - before; negative pads crop the border.
            low = offset - before
            config.append((low, size - low - (_STRIDE * (out - 1) + 1), _STRIDE - 1))
        spread = lax.pad(routed, zero, [*config, (0, 0, 0)])
        total = spread if total is None else total + spread
    return (total,)


max_pool_3x3_stride_2.defvjp(_pool_fwd, _pool_bwd)
