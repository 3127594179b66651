# SPDX-License-Identifier: Apache-2.0
"""Sums and norms have the same bits in any order and any grouping, and are accurate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import exact_sums
from exact_sums import FixedPoint

ADDENDS, SIZE, AXIS = 48, 96, 'data'
FORM = FixedPoint(2.0**12, ADDENDS)


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


@pytest.fixture(scope='module')
def addends():
    """fp32 [ADDENDS, SIZE], of magnitudes from 1e-9 to the limit."""
    rng = np.random.default_rng(0)
    magnitudes = 10.0 ** rng.uniform(-9, math.log10(FORM.limit), (ADDENDS, SIZE))
    return (magnitudes * rng.choice([-1, 1], (ADDENDS, SIZE))).astype(np.float32)


@pytest.mark.parametrize('form', [FORM, FixedPoint(2.0**24, 1), FixedPoint(1.0, 4096)])
def test_the_largest_sum_fits(form):
    encoded = int(jax.jit(form.encode)(jnp.float32(form.limit)))
    assert encoded == int(form.limit) << form.bits
    assert form.addends * encoded <= 2**62 < 2 * 2 ** math.ceil(math.log2(form.addends)) * encoded


def test_a_sum_is_the_same_in_any_order_and_grouping(addends):
    rng, encode = np.random.default_rng(1), jax.jit(FORM.encode)
    whole = np.asarray(encode(addends)).sum(axis=0)
    for _ in range(20):
        mixed = rng.permutation(addends)
        groups = np.split(mixed, np.sort(rng.choice(np.arange(1, ADDENDS), 5, replace=False)))
        parts = [np.asarray(encode(group)).sum(axis=0) for group in groups]
        assert np.array_equal(sum(parts), whole)
    # Which is not so of floating-point numbers.
    assert not np.array_equal(rng.permutation(addends).sum(axis=0), addends.sum(axis=0))


def test_a_mean_is_accurate(addends):
    total = np.asarray(jax.jit(FORM.encode)(addends)).sum(axis=0)
    exact = [math.fsum(column) / ADDENDS for column in addends.T]
    with jax.enable_x64(True):
        means = np.asarray(FORM.mean(jnp.asarray(total), np.float32), np.float64)
    on_host = [FORM.value(int(t), ADDENDS) for t in total]
    np.testing.assert_allclose(on_host, exact, rtol=2.0**-52, atol=2.0 ** -(FORM.bits + 1))
    # Rounded to fp32 twice: as an integer, and by the division.
    np.testing.assert_allclose(means, on_host, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_sums_over_devices_are_those_of_one(addends, devices):
    """Replicated and scattered, with the rest added up before, as by accumulation."""

    def add(x):
        sums, rejected, _ = exact_sums.psum({'x': x}, {'x': FORM}, AXIS)
        scattered = exact_sums.psum_scatter(x, FORM, AXIS, dimension=1)
        largest = exact_sums.largest_addends({'x': scattered}, AXIS)['x']
        also = FORM.rejected(largest)
        return exact_sums.total(sums['x'][:, 0]), sums['x'], scattered.total, rejected, also

    spread = PartitionSpec(AXIS)
    program = jax.shard_map(
        add,
        mesh=mesh_of(devices),
        in_specs=spread,
        out_specs=(PartitionSpec(),) * 2 + (PartitionSpec(None, AXIS),) + (PartitionSpec(),) * 2,
        check_vma=False,
    )
    first, sums, scattered, rejected, also = jax.device_get(jax.jit(program)(addends))
    whole = np.asarray(jax.jit(FORM.encode)(addends)).sum(axis=0)
    assert sums.dtype == scattered.dtype == np.int64
    assert np.array_equal(sums, scattered)
    assert np.array_equal(sums.sum(axis=0), whole)
    assert first == whole[0]
    assert rejected.tolist() == [0]
    assert also == 0


@pytest.mark.parametrize('wrong', [math.nan, math.inf, -math.inf, 4096.001, -1e30])
def test_an_element_that_cannot_be_added_up_is_found_on_whatever_device(addends, wrong):
    spoilt = addends.copy()
    spoilt[29, 7] = wrong
    program = jax.shard_map(
        lambda x: exact_sums.psum([jnp.ones(3), x], FORM, AXIS)[1:],
        mesh=mesh_of(8),
        in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    # Row 29 is the last of the fifth device's six.
    rejected, largest = jax.device_get(jax.jit(program)(spoilt))
    assert rejected.tolist() == [0, 5 * SIZE + 8]
    np.testing.assert_array_equal(largest, np.array([1, abs(wrong)], np.float32))
    rejected, largest = jax.device_get(jax.jit(program)(addends))
    assert rejected.tolist() == [0, 0]
    assert largest.tolist() == [1, np.abs(addends).max()]


def test_the_limit_itself_is_valid():
    found = exact_sums.largest(jnp.array([0.0, -FORM.limit, 1.0]))
    assert (float(found.value), int(found.place)) == (FORM.limit, 2)
    assert int(FORM.rejected(found)) == 0


@pytest.fixture(scope='module')
def vector():
    """fp32 [80000], of magnitudes over twelve decades."""
    rng = np.random.default_rng(2)
    return (rng.standard_normal(80_000) * 10.0 ** rng.uniform(-12, 0, 80_000)).astype(np.float32)


def test_a_norm_is_the_same_in_any_order_and_on_any_devices(vector):
    norm = jax.jit(lambda x: exact_sums.norm([x[:300], x[300:]]))
    expected = norm(vector).item()
    assert abs(expected / np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6
    rng = np.random.default_rng(3)
    assert {norm(rng.permutation(vector)).item() for _ in range(5)} == {expected}
    for devices in (1, 2, 4, 8):
        program = jax.shard_map(
            lambda x, whole: exact_sums.norm({'a': x.reshape(-1, 100), 'b': whole}, AXIS, {'a'}),
            mesh=mesh_of(devices),
            in_specs=(PartitionSpec(AXIS), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        shuffled = rng.permutation(vector)
        assert jax.jit(program)(shuffled[:72_000], shuffled[72_000:]).item() == expected


@pytest.mark.parametrize('scale', [1e-35, 1e-20, 1.0, 1e20, 1e35])
def test_a_norm_neither_overflows_nor_vanishes(vector, scale):
    # Elements below fp32's smallest normal number, of which no norm is, may count as 0.
    x = (np.sign(vector) * scale).astype(np.float32)
    expected = np.linalg.norm(x.astype(np.float64))
    assert abs(float(exact_sums.norm([x])) / expected - 1) < 1e-6


@pytest.mark.parametrize(
    ('elements', 'expected'),
    [([0.0, 0.0], 0.0), ([3.0, -4.0], 5.0), ([1.0, math.inf], math.inf), ([1.0, 3e38], math.inf)],
)
def test_norms_at_the_edges(elements, expected):
    assert float(exact_sums.norm([jnp.array(elements)])) == expected


def test_a_norm_with_a_nan_is_one():
    assert math.isnan(float(exact_sums.norm([jnp.array([1.0, math.nan]), jnp.array([2.0])])))


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_an_addend_that_cannot_be_added_up_is_found_where_sums_are_scattered(addends, devices):
    spoilt = addends.copy()
    spoilt[29, 7] = math.nan

    def found(x):
        sums = {'bad': exact_sums.psum_scatter(x, FORM, AXIS, 1)}
        sums['good'] = exact_sums.psum_scatter(jnp.ones_like(x), FORM, AXIS, 1)
        return exact_sums.largest_addends(sums, AXIS)

    program = jax.shard_map(
        found, mesh=mesh_of(devices), in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    largest = jax.device_get(jax.jit(program)(spoilt))
    assert int(FORM.rejected(largest['bad'])) > 0
    assert int(FORM.rejected(largest['good'])) == 0
    assert largest['good'].value == 1
