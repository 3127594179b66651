# SPDX-License-Identifier: Apache-2.0
"""Shows that fp32 is fp32: ResNet-50's outputs and gradients on this device against float64.

    python speed/fp32_check.py [--batch 8] [--image_size 64] [--precision default]

fp32 has 24 bits of significand (relative errors around 1e-6), the TF32 of a GPU's matrix units 11
(around 1e-3); the limit of 1e-5 lies between. Exit status 1 when an error is above it.
`--precision default` takes away the setting that forbids TF32: on a GPU that has it, it must fail.

The reference is computed on the CPU in float64. The network runs with its running statistics and
residual branches scaled down (bn3's scale 0.2), which keeps the comparison well-conditioned: at
random weights and with statistics of few values, the network itself amplifies rounding so much that
correct fp32 is off by 1e-3. The gradient is that of a random linear function of the logits.
"""

import argparse
import os
import sys

os.environ.pop('NVIDIA_TF32_OVERRIDE', None)  # main.py's second lock would hide the first one.

import jax
import jax.numpy as jnp
import numpy as np

from models.resnet import network
from settings import backend

backend.set_xla_flags()

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
    """Logits, and the gradient of sum(logits · weights) by every parameter, in `dtype`."""
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

    return jax.device_get(program(variables, images, weights))


def relative_error(ours, reference) -> float:
    """‖ours - reference‖ / ‖reference‖ over all arrays of two trees."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))
    apart = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


def main() -> int:
    """Compares and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--image_size', type=int, default=64)
    parser.add_argument('--precision', choices=['highest', 'default'], default='highest')
    flags = parser.parse_args()
    jax.config.update('jax_enable_x64', True)
    network.PRECISION = jax.lax.Precision[flags.precision.upper()]

    size = flags.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (flags.batch, size, size, 3)) - 120.0
    variables = initial_variables(size)
    case = variables, images, rng.normal(size=(flags.batch, CLASSES))
    device = jax.devices()[0]
    ours = outputs_and_gradients(np.float32, *case, device)
    reference = outputs_and_gradients(np.float64, *case, jax.devices('cpu')[0])
    errors = {
        'logits': relative_error(ours[0], reference[0]),
        'gradient': relative_error(ours[1], reference[1]),
    }
    for name, error in errors.items():
        print(f'{name}: relative error {error:.1e}, limit {LIMIT:.0e}')
    passed = all(error <= LIMIT for error in errors.values())
    print(f'{device.device_kind}, precision {flags.precision}: {"fp32" if passed else "NOT fp32"}')
    return 0 if passed else 1


if __name__ == '__main__':
    sys.exit(main())
