# SPDX-License-Identifier: Apache-2.0
"""Shows that fp32 is fp32: ResNet-50's outputs and gradients on this device against float64.

    python speed/fp32_check.py [--batch 4] [--image_size 64]

fp32 has 24 bits of significand (relative errors around 1e-6), the TF32 of a GPU's matrix units 11
(around 1e-3); the limit of 1e-5 lies between. Exit status 1 when an error is above it, or when
images and weights that are rounded to TF32 give none above it: then the check could not fail.

The reference is computed on the CPU in float64. The network runs with its running statistics and
residual branches scaled down (bn3's scale 0.2), which keeps the comparison well-conditioned: at
random weights and with statistics of few values, the network itself amplifies rounding so much that
correct fp32 is off by 1e-3. Gradients are those of a random linear function of an example's logits;
what counts is the median over the examples, for now and then a ReLU's input has another sign in
fp32, and moves that example's gradient by 1e-4.
"""

import argparse
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from models.resnet import network
from settings import backend

LIMIT = 1e-5
CLASSES = 10


def initial_variables(size: int):
    """Random fp32 weights on the host, the residual branches scaled down."""
    model = network.create('resnet50', num_classes=CLASSES, bn_span=1)
    images = jnp.zeros((1, size, size, 3), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * np.float32(0.2 if 'bn3' in jax.tree_util.keystr(path) else 1),
        jax.device_get(dict(variables)),
    )


def outputs_and_gradients(dtype, variables, images, weights, device):
    """Of every example in `dtype`: its logits, and the gradient of logits · weights."""
    model = network.create('resnet50', num_classes=CLASSES, bn_span=1, dtype=dtype)
    variables, images, weights = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x, dtype), device), (variables, images, weights)
    )

    @jax.jit
    def program(variables, images, weights):
        def total(params):
            logits = model.apply({**variables, 'params': params}, images, train=False)
            return (logits * weights).sum(), logits

        gradient, logits = jax.grad(total, has_aux=True)(variables['params'])
        return logits, gradient

    # Zero for the other examples.
    own = jnp.eye(len(images), dtype=dtype)[..., None] * weights[None]
    results = [jax.device_get(program(variables, images, each)) for each in own]
    return [(logits[i], gradient) for i, (logits, gradient) in enumerate(results)]


def as_tf32(tree):
    """fp32 arrays with TF32's 10 bits behind the point."""
    rounded = jax.jit(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10))
    return jax.device_get(jax.tree.map(lambda x: rounded(np.asarray(x, np.float32)), tree))


def relative_error(ours, reference) -> float:
    """‖ours - reference‖ / ‖reference‖ over all arrays of two trees."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))
    apart = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


def median_errors(ours, reference) -> list[float]:
    """Relative errors of logits and of gradients, the medians over the examples."""
    errors = [
        [relative_error(*pair) for pair in zip(*examples, strict=True)]
        for examples in zip(ours, reference, strict=True)
    ]
    return np.median(errors, axis=0).tolist()


def main() -> int:
    """Compares and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--image_size', type=int, default=64)
    flags = parser.parse_args()
    backend.configure()
    # The network's precision alone is to forbid TF32, not the second lock.
    os.environ.pop('NVIDIA_TF32_OVERRIDE', None)
    jax.config.update('jax_enable_x64', True)

    size = flags.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (flags.batch, size, size, 3)) - 120.0
    weights = rng.normal(size=(flags.batch, CLASSES))
    variables = initial_variables(size)
    device, host = jax.devices()[0], jax.devices('cpu')[0]
    exact = outputs_and_gradients(np.float64, variables, images, weights, host)

    def errors(name: str, variables, images) -> list[float]:
        ours = outputs_and_gradients(np.float32, variables, images, weights, device)
        logits, gradient = median_errors(ours, exact)
        print(f'{name}: relative error of logits {logits:.1e}, of the gradient {gradient:.1e}')
        return [logits, gradient]

    passed = max(errors('fp32', variables, images)) <= LIMIT
    passed &= min(errors('rounded to TF32', *as_tf32((variables, images)))) > LIMIT
    print(f'{device.device_kind}, limit {LIMIT:.0e}: {"fp32" if passed else "NOT fp32"}')
    return 0 if passed else 1


if __name__ == '__main__':
    sys.exit(main())
