# SPDX-License-Identifier: Apache-2.0
"""The loss scale of float16: as large as it can be, and a function of the steps alone."""

import jax.numpy as jnp
import pytest

import loss_scaling
from loss_scaling import LARGEST_LOSS_SCALE, STEPS_TO_DOUBLE_LOSS_SCALE, LossScale


@pytest.mark.parametrize(
    ('first', 'overflows_above', 'last'),
    [(1024, 2048, 1024), (1024, 1023, 512), (1024, 100, 64), (1024, 0.5, 1)],
)
def test_the_scale_is_halved_until_nothing_overflows(first, overflows_above, last):
    """Down to 1, at which what is still not finite is given back."""

    def attempt(scale):
        return {'gradient': jnp.where(scale > overflows_above, jnp.inf, scale)}

    scale, found = loss_scaling.until_finite(attempt, jnp.float32(first))
    assert float(scale) == last
    assert float(found['gradient']) == (last if last <= overflows_above else jnp.inf)


def following(value, lowest, good_steps, used, is_whole):
    old = LossScale(jnp.float32(value), jnp.float32(lowest), jnp.int32(good_steps))
    new = loss_scaling.following(old, jnp.float32(used), jnp.bool_(is_whole))
    assert [x.dtype for x in new] == [jnp.float32, jnp.float32, jnp.int32]
    return tuple(x.item() for x in new)


@pytest.mark.parametrize(
    ('old', 'used', 'is_whole', 'new'),
    [
        # Within a step the smallest is kept, and the scale stays.
        ((1024, 1024, 5), 1024, False, (1024, 1024, 5)),
        ((1024, 1024, 5), 256, False, (1024, 256, 5)),
        ((1024, 256, 5), 512, False, (1024, 256, 5)),
        # Its end counts it, or starts anew from the smallest.
        ((1024, 1024, 5), 1024, True, (1024, 1024, 6)),
        ((1024, 256, 5), 1024, True, (256, 256, 0)),
        ((1024, 1024, 5), 512, True, (512, 512, 0)),
        # Enough good steps in a row double it, up to a limit.
        ((1024, 1024, STEPS_TO_DOUBLE_LOSS_SCALE - 1), 1024, True, (2048, 2048, 0)),
        ((1024, 1024, STEPS_TO_DOUBLE_LOSS_SCALE - 1), 512, True, (512, 512, 0)),
        (
            (LARGEST_LOSS_SCALE, LARGEST_LOSS_SCALE, STEPS_TO_DOUBLE_LOSS_SCALE - 1),
            LARGEST_LOSS_SCALE,
            True,
            (LARGEST_LOSS_SCALE, LARGEST_LOSS_SCALE, 0),
        ),
    ],
)
def test_the_next_scale_follows_from_the_smallest(old, used, is_whole, new):
    assert following(*old, used, is_whole) == new


@pytest.mark.parametrize(('dtype', 'scaled'), [('float16', True), ('bfloat16', False)])
def test_float16_alone_is_scaled(dtype, scaled):
    value, lowest, good_steps = loss_scaling.initial(dtype)
    assert (float(value) > 1) == scaled
    assert float(lowest) == float(value)
    assert int(good_steps) == 0
