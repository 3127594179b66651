# SPDX-License-Identifier: Apache-2.0
"""How long the convolutions and matrix products of ResNet-50's loss and gradient take alone.

    python speed/products.py [--batch 8] [--image_size 224]

Each is timed by itself. A step that computes one after another is not faster than their sum.
"""

import argparse
import collections
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from models.resnet import network
from settings import backend

REPEATS = 3


def seconds(equation: JaxprEqn) -> float:
    """The least of several calls on ones."""
    shapes: list[Any] = [x.aval for x in equation.invars]
    inputs = [jnp.ones(x.shape, x.dtype) for x in shapes]
    program = jax.jit(lambda *x: equation.primitive.bind(*x, **equation.params))
    program(*inputs).block_until_ready()
    taken = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        program(*inputs).block_until_ready()
        taken.append(time.perf_counter() - before)
    return min(taken)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--image_size', type=int, default=224)
    args = parser.parse_args()
    backend.prepare(deterministic=True, micro_batches=1)

    images = jnp.zeros((args.batch, args.image_size, args.image_size, 3))
    model = network.create('resnet50', num_classes=1000, bn_span=args.batch)

    def loss(params, batch_stats):
        variables = {'params': params, 'batch_stats': batch_stats}
        return model.apply(variables, images, train=True, mutable=['batch_stats'])[0].sum()

    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    program = jax.make_jaxpr(jax.grad(loss))(variables['params'], variables['batch_stats'])
    total = collections.defaultdict[str, float](float)
    for equation in program.jaxpr.eqns:
        if equation.primitive.name in ('conv_general_dilated', 'dot_general'):
            total[equation.primitive.name] += seconds(equation)
    for name, taken in total.items():
        print(f'{name}: {taken:.2f} s')
    print(f'{args.batch / sum(total.values()):.1f} images/s, if the rest took no time')


if __name__ == '__main__':
    main()
