# SPDX-License-Identifier: Apache-2.0
"""Sums over an optimizer step: over the devices, and by `optax.MultiSteps` over its micro-steps."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import exact_sums
from exact_sums import FixedPoint

# What an element of a micro-batch's gradient, and of its statistics and metrics, may be in
# magnitude. The smaller, the finer the sums: see `FixedPoint`.
LARGEST_GRADIENT, LARGEST_VALUE = 2.0**12, 2.0**24


def formats(variables: Mapping[str, Any], micro_batches: int) -> dict[str, FixedPoint]:
    """Of the sums over an optimizer step, by collection of the variables."""
    return {
        name: FixedPoint(LARGEST_GRADIENT if name == 'params' else LARGEST_VALUE, micro_batches)
        for name in variables
    }


def metric_format(micro_batches: int) -> FixedPoint:
    """Of the sums of the task's metrics over an optimizer step."""
    return FixedPoint(LARGEST_VALUE, micro_batches)


def packed(kind: str, collection: Any, split: Mapping[str, int]) -> dict[str, Any]:
    """A collection's arrays: the split ones by name, and the others as one vector, named ''.

    Hundreds of small arrays would be as many kernels, several times.
    """
    arrays = exact_sums.named(collection)
    whole = [x.ravel() for name, x in arrays if f'{kind}/{name}' not in split]
    return {'': jnp.concatenate(whole)} | {n: x for n, x in arrays if f'{kind}/{n}' in split}


def unpacked(kind: str, packed: Mapping[str, Any], like: Any, split: Mapping[str, int]) -> Any:
    """The inverse of `packed`, for a collection of such shapes."""
    arrays, start = [], 0
    for name, x in exact_sums.named(like):
        if f'{kind}/{name}' in split:
            arrays.append(packed[name])
        else:
            arrays.append(packed[''][start : start + x.size].reshape(x.shape))
            start += x.size
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def accumulated(
    transformation: optax.GradientTransformation,
    steps: int,
    micro_batches: int,
    split: Mapping[str, int] = exact_sums.NOT_SPLIT,
) -> optax.GradientTransformation:
    """An optimizer that is fed sums over the devices, and moves the variables every `steps` times.

    Args:
      transformation: is fed averages over the whole batch.
      steps: micro-steps in an optimizer step.
      micro_batches: in an optimizer step, over all devices and micro-steps.
      split: as `train_lib.Task.split`.

    Returns:
      `optax.MultiSteps` with an int64 accumulator: every collection of variables, `packed`.
    """
    # The accumulator needs 64-bit types; the wrapped optimizer must run without them.
    wide, default = jax.enable_x64(True), jax.enable_x64(jax.enable_x64.value)

    @default
    def update(sums, state, variables):
        forms, means = formats(variables, micro_batches), {}
        for kind, collection in variables.items():
            dtype = jnp.result_type(*jax.tree.leaves(collection))
            mean = functools.partial(forms[kind].mean, dtype=dtype)
            means[kind] = unpacked(kind, jax.tree.map(mean, sums[kind]), collection, split)
        return transformation.update(means, state, variables)

    with wide:
        multi_steps = optax.MultiSteps(
            optax.GradientTransformation(default(transformation.init), update),
            steps,
            use_grad_mean=False,
            accumulator_dtype=jnp.int64,
        )

    @wide
    def init(variables):
        zeros = {
            kind: jax.tree.map(
                lambda x: jnp.zeros(x.shape, jnp.int64), packed(kind, collection, split)
            )
            for kind, collection in variables.items()
        }
        return multi_steps.init(variables)._replace(acc_grads=zeros)

    return optax.GradientTransformation(init, wide(multi_steps.update))


def added_up(
    addends: Mapping[str, dict[str, Any]],
    metrics: dict[str, jax.Array],
    variables: Mapping[str, Any],
    micro_batches: int,
    axis: str,
) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array, jax.Array]:
    """Sums over the devices.

    Args:
      addends: every collection of `variables`, `packed`: what this device adds, and each `Sum`.
      metrics: what this device adds to each.
      variables: what is learnt.
      micro_batches: in an optimizer step, over all devices and micro-steps.
      axis: of the mesh.

    Returns:
      (totals, metrics, rejected, largest): int64 in the structures of `addends` and `metrics`;
      `TrainState.rejected` of these alone; the largest element of a gradient in magnitude.
    """
    forms, kinds = formats(addends, micro_batches), sorted(addends)
    vectors = {kind: addends[kind][''] for kind in kinds}
    sums = {kind: {n: x for n, x in addends[kind].items() if n} for kind in kinds}
    (totals, metrics), places, magnitudes = exact_sums.psum(
        (vectors, metrics), (forms, metric_format(micro_batches)), axis
    )
    of_sums = exact_sums.largest_addends(sums, axis)
    rejected, largest = [], jnp.float32(0)
    # Behind the collections come the metrics.
    for place, magnitude, kind in zip(places, magnitudes, kinds, strict=False):
        arrays = exact_sums.named(variables[kind])
        sizes = [0 if name in sums[kind] else x.size for name, x in arrays]
        found = jnp.where(place > 0, 1 + (np.cumsum(sizes) < place).sum(dtype=jnp.int32), 0)
        for number, (name, _) in enumerate(arrays, start=1):
            if addend := of_sums[kind].get(name):
                found = jnp.where(forms[kind].rejected(addend) > 0, number, found)
                magnitude = jnp.maximum(magnitude, addend.value)
        rejected.append(found)
        largest = magnitude if kind == 'params' else largest
    rejected.append(places[len(kinds) :].max())
    totals = {
        kind: {'': totals[kind]} | {name: x.total for name, x in sums[kind].items()}
        for kind in kinds
    }
    return totals, metrics, jnp.stack(rejected), largest
