# SPDX-License-Identifier: Apache-2.0
"""ResNet v1.5 (He et al. 2015, arXiv:1512.03385; "v1.5" moves the stride to the 3×3 convolution).

Images [N, H, W, 3] go in, fp32 logits [N, classes] come out. Parameter names follow torchvision's
(`conv1`, `layer1_0/conv2`, `fc`, …), so that a checkpoint converts by renaming.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from models.resnet.architectures import ARCHITECTURES
from models.resnet.batch_norm import BatchNorm
from models.resnet.pooling import max_pool_3x3_stride_2

# fp32 is computed in fp32, also in the gradients; without it, in TF32 on Ampere and later.
PRECISION = lax.Precision.HIGHEST

Padding = Literal['symmetric', 'same']


def conv_init(truncated: bool) -> nn.initializers.Initializer:
    """Normal of variance 2 / fan-in (He et al. 2015, arXiv:1502.01852, equation 10).

    Truncated at two standard deviations and widened to the same variance, or not: the rules leave
    the choice.
    """
    return nn.initializers.variance_scaling(
        2.0, 'fan_in', 'truncated_normal' if truncated else 'normal'
    )


def window_padding(kernel: int, stride: int, size: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after one spatial axis of `size` elements.

    'symmetric' pads (kernel - 1) // 2 on both sides, as PyTorch's ResNet does. 'same' reproduces
    TensorFlow's SAME, which at stride 2 and even sizes pads one less before than after.
    """
    if padding == 'symmetric':
        return (kernel - 1) // 2, (kernel - 1) // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Pointwise(nn.Module):
    """A 1×1 convolution without a bias, as a product of matrices; the kernel is nn.Conv's."""

    features: int
    stride: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H/stride, W/stride, features]."""
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)[0, 0]
        if self.stride > 1:
            # Fused with the product, the slice makes the compiler of JAX 0.11.2 for GPUs abort.
            x = lax.optimization_barrier(x[:, :: self.stride, :: self.stride])
        return jnp.tensordot(
            x.astype(self.dtype), kernel.astype(self.dtype), 1, precision=PRECISION
        )


class Stem(nn.Module):
    """The 7×7 convolution with stride 2 of large images, padded by 3; the kernel is nn.Conv's.

    It is computed as a 4×4 one over blocks of 2×2 pixels, whose colours and one zero fill 16
    channels: three channels are too few for a GPU's matrix units.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, 3] to [N, ⌈H/2⌉, ⌈W/2⌉, features]."""
        kernel = self.param('kernel', self.kernel_init, (7, 7, 3, self.features), jnp.float32)
        zero, (n, height, width, _) = jnp.zeros((), self.dtype), x.shape
        edges = [(3, 3 + size % 2, 0) for size in (height, width)]
        x = lax.pad(x.astype(self.dtype), zero, [(0, 0, 0), *edges, (0, 1, 0)])
        kernel = lax.pad(kernel.astype(self.dtype), zero, [(0, 1, 0)] * 3 + [(0, 0, 0)])
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        blocks = x.reshape(n, rows, 2, columns, 2, 4).transpose(0, 1, 3, 2, 4, 5)
        of_blocks = kernel.reshape(4, 2, 4, 2, 4, -1).transpose(0, 2, 1, 3, 4, 5)
        return lax.conv_general_dilated(
            blocks.reshape(n, rows, columns, 16),
            of_blocks.reshape(4, 4, 16, -1),
            window_strides=(1, 1),
            padding='VALID',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            precision=PRECISION,
        )


def convolution(
    x: jax.Array,
    features: int,
    kernel: int,
    stride: int,
    *,
    name: str,
    padding: Padding = 'symmetric',
    dtype: jnp.dtype,
    truncated_init: bool,
) -> jax.Array:
    """Maps [N, H, W, C] to [N, H', W', features] without a bias, in `dtype`.

    To be called in a module, of which it becomes the submodule `name`.
    """
    kernel_init = conv_init(truncated_init)
    # On GPUs, cuBLAS multiplies fp32 matrices faster than cuDNN convolves; in half precision
    # it is the other way round (docs/performance.md).
    if kernel == 1 and jnp.finfo(dtype).bits >= 32:
        return Pointwise(features, stride, dtype, kernel_init, name=name)(x)
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=[window_padding(kernel, stride, size, padding) for size in x.shape[1:3]],
        use_bias=False,
        dtype=dtype,
        precision=PRECISION,
        kernel_init=kernel_init,
        name=name,
    )(x)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """ReLU whose gradient reads its result, which the next convolution keeps in memory.

    The automatic gradient reads x; at the end of a block that is two arrays, the summands.
    """
    return nn.relu(x)


def _relu_forward(x):
    # Without the barrier XLA sees that y > 0 is x > 0, and reads the summands all the same.
    y = lax.optimization_barrier(nn.relu(x))
    return y, y


relu.defvjp(_relu_forward, lambda y, dy: (jnp.where(y > 0, dy, 0),))


class Block(nn.Module):
    """Residual block: relu(branch(x) + shortcut(x)).

    The branch is 1×1, 3×3, 1×1 with a fourfold expansion (`bottleneck`), or 3×3, 3×3. The 3×3
    convolution (the first of two) carries the stride; a 1×1 projection with BatchNorm stands on
    the shortcut where the shape changes.
    """

    width: int
    stride: int
    bottleneck: bool
    span: int
    padding: Padding
    dtype: jnp.dtype
    truncated_init: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [N, H, W, C] to [N, H/stride, W/stride, width or 4·width]."""
        conv = functools.partial(
            convolution,
            padding=self.padding,
            dtype=self.dtype,
            truncated_init=self.truncated_init,
        )
        norm = functools.partial(BatchNorm, span=self.span)
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (self.width, 3, 1)]

        y = x
        for i, (features, kernel, stride) in enumerate(layers, start=1):
            y = conv(y, features, kernel, stride, name=f'conv{i}')
            y = norm(name=f'bn{i}')(y, train)
            y = nn.relu(y) if i < len(layers) else y
        # Every stage's first block projects when the blocks expand (the first stage's does not
        # change its size, but its width); otherwise only where the stride or the width changes.
        if x.shape != y.shape:
            x = conv(x, y.shape[-1], 1, self.stride, name='downsample_conv')
            x = norm(name='downsample_bn')(x, train)
        return relu(y + x)


class ResNet(nn.Module):
    """ResNet v1.5.

    Attributes:
      stage_sizes: blocks in each stage; stage i is `width`·2^i wide and halves the image (i > 0).
      bottleneck: which residual block.
      width: channels of the stem and the first stage.
      num_classes: width of the logits.
      bn_span: examples per BatchNorm group.
      large_stem: 7×7 stride 2 and a 3×3 max-pool (224×224 images), else 3×3 (small images).
      padding: 'symmetric' (PyTorch's, exportable) or 'same' (the official TensorFlow graph).
      dtype: of activations and convolutions; parameters and statistics are fp32.
      truncated_init: whether convolutions start from a truncated normal distribution.
    """

    stage_sizes: Sequence[int]
    bottleneck: bool
    width: int
    num_classes: int
    bn_span: int
    large_stem: bool
    padding: Padding = 'symmetric'
    dtype: jnp.dtype = jnp.float32
    truncated_init: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images [N, H, W, 3] to logits [N, num_classes], fp32 (or wider, if dtype is)."""
        init = conv_init(self.truncated_init)
        if self.large_stem:
            # The official graph pads it by 3 on both sides, under either padding.
            x = Stem(self.width, self.dtype, init, name='conv1')(x)
        else:
            x = nn.Conv(
                self.width,
                (3, 3),
                use_bias=False,
                dtype=self.dtype,
                precision=PRECISION,
                kernel_init=init,
                name='conv1',
            )(x)
        x = nn.relu(BatchNorm(self.bn_span, name='bn1')(x, train))
        if self.large_stem:
            pads = tuple(window_padding(3, 2, size, self.padding) for size in x.shape[1:3])
            x = max_pool_3x3_stride_2(x, pads)
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                x = Block(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    span=self.bn_span,
                    padding=self.padding,
                    dtype=self.dtype,
                    truncated_init=self.truncated_init,
                    name=f'layer{stage + 1}_{i}',
                )(x, train)
        precise = jnp.promote_types(self.dtype, jnp.float32)
        features = x.astype(precise).mean(axis=(1, 2))
        kernel_init = nn.initializers.normal(0.01)
        return nn.Dense(
            self.num_classes,
            kernel_init=kernel_init,
            dtype=precise,
            precision=PRECISION,
            name='fc',
        )(features)


def create(
    name: str,
    *,
    num_classes: int,
    bn_span: int,
    padding: Padding = 'symmetric',
    dtype: jnp.dtype = jnp.float32,
    truncated_init: bool = True,
) -> ResNet:
    """The network of a name in `ARCHITECTURES`; see `ResNet` for the arguments.

    Raises:
      KeyError: for another name.
    """
    return ResNet(
        **ARCHITECTURES[name]._asdict(),
        num_classes=num_classes,
        bn_span=bn_span,
        padding=padding,
        dtype=dtype,
        truncated_init=truncated_init,
    )
