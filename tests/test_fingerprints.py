# SPDX-License-Identifier: Apache-2.0
"""Fingerprints do not depend on devices; see also tests/scripts/test_fingerprints.py."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import fingerprints
from train_lib import AXIS


@pytest.mark.parametrize('block', [2**20, 7])
@pytest.mark.parametrize('row', [1024, 3])
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_it_does_not_depend_on_how_arrays_are_split(monkeypatch, devices, row, block):
    """Nor on how many elements are added up at once."""
    monkeypatch.setattr(fingerprints, '_BLOCK', block)
    monkeypatch.setattr(fingerprints, '_ROW', row)
    rng = np.random.default_rng(5)
    tree = {
        'a': {'rows': rng.standard_normal((16, 3, 5)).astype(np.float32)},
        'b': {'columns': rng.standard_normal((3, 24, 2)).astype(np.float16)},
        'c': {'whole': rng.standard_normal(7).astype(np.float32)},
        'd': np.int32(3),
    }
    split = {'a/rows': 0, 'b/columns': 1}
    specs = {
        'a': {'rows': PartitionSpec(AXIS)},
        'b': {'columns': PartitionSpec(None, AXIS)},
        'c': {'whole': PartitionSpec()},
        'd': PartitionSpec(),
    }
    program = jax.shard_map(
        lambda tree: fingerprints.of(tree, AXIS, split),
        mesh=Mesh(np.array(jax.devices()[:devices]), (AXIS,)),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    found = jax.jit(program)(tree)
    assert [int(x) for x in found] == fingerprints.of_host_arrays(tree)


@pytest.mark.parametrize('shape', [(), (5,), (4, 7), (3, 4, 6)])
def test_blocks_of_an_array_add_up_to_it(shape):
    """Read in any order, as the chunks of a checkpoint are."""
    array = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    (first,) = fingerprints.first_places({'a': array}, {'a': shape})
    cuts = [(0, n // 3, n // 3 + 1, n) for n in shape]
    blocks = list(itertools.product(*(itertools.pairwise(cut) for cut in cuts)))
    total = sum(
        fingerprints.words_on_host(
            array[tuple(slice(*ends) for ends in block)], [b for b, _ in block], shape, first
        )
        for block in reversed(blocks)
    )
    assert [total % 2**64] == fingerprints.of_host_arrays({'a': array})
