# SPDX-License-Identifier: Apache-2.0
"""The benchmark's pixel arithmetic: encoded bytes in, uint8 RGB pixels out, as pure functions.

Every function here repeats what the official code does and what no library does by default:
JPEGs are decoded with libjpeg's fast integer DCT; resizing is bilinear on the *old* sampling grid,
on which output pixel i of n samples the input coordinate i·(input / n), with no half-pixel shift
and no antialiasing; and the height of a training crop, not its area, is uniform. Random numbers
come from the caller's generator, so that an example's augmentation is a function of its position.
Subtracting the channel means is left to the device.

Sources: MLPerf Training v0.7-v4.0 ResNet reference (`imagenet_preprocessing.py`) and the TensorFlow
operations it calls (`decode_and_crop_jpeg`, `sample_distorted_bounding_box`, `resize_bilinear`).
"""

import math
import operator

import numpy as np

from workloads.resnet.image_decoding import decode, find_frame, is_jpeg
from workloads.resnet.partial_jpeg import decode_top
from workloads.resnet.resampling import sample

# The official training crop: aspect ratio (width / height), share of the image's area, and the
# share of the image that a crop has to cover, or else it is drawn again.
CROP_ASPECT = (0.75, 1.33)
CROP_AREA = (0.05, 1.0)
CROP_MIN_COVERED = 0.1
CROP_ATTEMPTS = 100
# The evaluation's central crop is this share of the resized image's shorter side (224 / 256).
CENTRAL_FRACTION = 0.875


def sample_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a training crop of an image of that size, as (y, x, crop height, crop width) in pixels.

    This is `sample_distorted_bounding_box` for the whole image as the only object. Plain floats and
    `rng.random` throughout: NumPy's scalars would cost as much as reading the record.
    """
    random = rng.random
    image_area = height * width
    min_area, max_area = CROP_AREA[0] * image_area, CROP_AREA[1] * image_area
    for _ in range(CROP_ATTEMPTS):
        aspect = CROP_ASPECT[0] + (CROP_ASPECT[1] - CROP_ASPECT[0]) * random()
        max_height = round(math.sqrt(max_area / aspect))
        if round(max_height * aspect) > width:
            max_height = int((width + 0.5 - 1e-7) / aspect)
            if round(max_height * aspect) > width:
                max_height -= 1
        max_height = min(max_height, height)
        crop_height = min(round(math.sqrt(min_area / aspect)), max_height)
        crop_height += int(random() * (max_height - crop_height + 1))
        crop_width = round(crop_height * aspect)
        # Rounding may have moved the area out of its range; one row more or less mends that.
        if crop_height * crop_width < min_area:
            crop_height += 1
            crop_width = round(crop_height * aspect)
        if crop_height * crop_width > max_area:
            crop_height -= 1
            crop_width = round(crop_height * aspect)
        area = crop_height * crop_width
        if not (min_area <= area <= max_area and 0 < crop_height <= height and crop_width <= width):
            continue
        y = int(random() * (height - crop_height))
        x = int(random() * (width - crop_width))
        if area >= CROP_MIN_COVERED * image_area:
            return y, x, crop_height, crop_width
    return 0, 0, height, width


def decode_and_random_crop(encoded: bytes, rng: np.random.Generator, *, size: int) -> np.ndarray:
    """The training path: a random crop, flipped with probability 1/2, resized to `size`².

    Returns:
        uint8[size,size,3].

    Raises:
        ValueError: as `decode`.
    """
    if is_jpeg(encoded):
        frame = find_frame(encoded)
        box = sample_crop(frame.height, frame.width, rng)
        image = decode_top(encoded, frame, rows=box[0] + box[2])
    else:
        image = decode(encoded)
        box = sample_crop(image.shape[0], image.shape[1], rng)
    return crop_and_resize(image, box, flip=rng.random() < 0.5, size=size)


def crop_and_resize(
    image: np.ndarray, box: tuple[int, int, int, int], *, flip: bool, size: int
) -> np.ndarray:
    """Cuts a box out of an image, flips it left and right if `flip`, and resizes it to `size`².

    The old grid is not symmetric, so flipping after resizing would give other pixels.

    Args:
        image: uint8[H,W,3].
        box: (y, x, height, width) in pixels, inside the image.
        flip: whether to exchange left and right.
        size: height and width of the result in pixels, at least 1.

    Returns:
        uint8[size,size,3].

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        y, x, height, width = map(operator.index, box)
    except (TypeError, ValueError) as error:
        raise ValueError(f'box={box!r} is not four integers y, x, height, width') from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'the image is {image.dtype}{list(image.shape)}, not uint8[H,W,3]')
    if not (0 <= y < y + height <= image.shape[0] and 0 <= x < x + width <= image.shape[1]):
        raise ValueError(
            f'box={box}, as y, x, height, width, is empty or not inside an image of height '
            f'{image.shape[0]} and width {image.shape[1]}'
        )
    if size < 1:
        raise ValueError(f'size={size} is not positive')
    step = (height / size, width / size)
    return sample(image, (y, x, height, width), (0.0, 0.0), step, size=size, flip=bool(flip))


def decode_and_center_crop(encoded: bytes, *, size: int, resize_min: int) -> np.ndarray:
    """The evaluation path: the shorter side resized to `resize_min`, then the central `size`².

    Only that window is computed. Returns and raises as `decode_and_random_crop`.
    """
    if not 0 < size <= resize_min:
        raise ValueError(f'size={size} is not from 1 to resize_min={resize_min}')
    image = decode(encoded)
    height, width = image.shape[:2]
    # In float32 and cut off to an integer, as officially: 255 instead of 256 for some sizes.
    scale = np.float32(resize_min) / np.float32(min(height, width))
    new_height = max(size, int(np.float32(height) * scale))
    new_width = max(size, int(np.float32(width) * scale))
    step_y, step_x = height / new_height, width / new_width
    first = ((new_height - size) // 2 * step_y, (new_width - size) // 2 * step_x)
    return sample(image, (0, 0, height, width), first, (step_y, step_x), size=size, flip=False)
