# SPDX-License-Identifier: Apache-2.0
"""The loss scale of float16: as large as it can be, and a function of the steps alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import exact_sums
import loss_scaling
from exact_sums import FixedPoint
from loss_scaling import LARGEST_LOSS_SCALE, STEPS_TO_DOUBLE_LOSS_SCALE, LossScale

AXIS, FORM = 'data', FixedPoint(2.0**12, 4)


def until_finite(first, overflows_above, is_told=True):
    """(scale, device's own result, sum) of every device, each with a limit of its own.

    Not told, only the sum shows that a device's own overflowed.
    """

    def on_device(limit):
        def attempt(scale):
            own = jnp.where(scale > limit[0], jnp.inf, scale)
            total = exact_sums.psum_scatter(own[None].repeat(4), FORM, AXIS)
            return {'own': own, 'sum': total} if is_told else {'own': scale, 'sum': total}

        scale, found = loss_scaling.until_finite(attempt, jnp.float32(first), AXIS)
        return scale[None], found['own'][None], found['sum'].total

    mesh = Mesh(np.array(jax.devices()[:4]), (AXIS,))
    spec = PartitionSpec(AXIS)
    program = jax.shard_map(on_device, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    limits = jnp.array(overflows_above, jnp.float32)
    with jax.enable_x64(True):  # Without it an array of 64 bits cannot come out.
        program = jax.jit(jax.enable_x64(False)(program))
        return [x.tolist() for x in jax.device_get(program(limits))]


@pytest.mark.parametrize(
    ('first', 'overflows_above', 'last'),
    [
        (1024, [2048, 1025, 1e9, 1024], [1024, 1024, 1024, 1024]),
        (1024, [1023, 2048, 100, 2048], [512, 1024, 64, 1024]),
    ],
)
@pytest.mark.parametrize('is_told', [True, False])
def test_every_device_halves_its_scale_until_nothing_overflows(
    first, overflows_above, last, is_told
):
    scale, own, total = until_finite(first, overflows_above, is_told)
    assert scale == own == last
    assert total == [FORM.encode(jnp.float32(sum(last))).item()] * 4


def test_at_a_scale_of_1_what_is_not_finite_is_given_back():
    scale, own, _ = until_finite(1024, [0.5, 2048, 2048, 2048])
    assert scale == [1, 1024, 1024, 1024]
    assert own == [np.inf, 1024, 1024, 1024]


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
