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

import cv2
import numpy as np
import simplejpeg

# The pipeline runs one image per thread; OpenCV's own threads would only get in each other's way.
cv2.setNumThreads(1)

# The official training crop: aspect ratio (width / height), share of the image's area, and the
# share of the image that a crop has to cover, or else it is drawn again.
CROP_ASPECT = (0.75, 1.33)
CROP_AREA = (0.05, 1.0)
CROP_MIN_COVERED = 0.1
CROP_ATTEMPTS = 100


def decode(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG or PNG to RGB, uint8[H,W,3]; greyscale gives three equal channels.

    Like the official decoder it takes JPEGs that libjpeg only warns of, but not truncated ones.

    Raises:
        ValueError: the bytes are no image, or not a whole one.
    """
    if encoded[:2] == b'\xff\xd8':
        try:
            return simplejpeg.decode_jpeg(encoded, 'RGB', fastdct=True)
        except ValueError as error:
            if 'Premature end of JPEG file' in str(error):
                raise ValueError(f'truncated JPEG of {len(encoded)} bytes') from error
            if 'subsampling' in str(error):  # a layout that only the accurate DCT's decoder knows
                return _decode_with_opencv(encoded)
            return simplejpeg.decode_jpeg(encoded, 'RGB', fastdct=True, strict=False)
    if encoded[:4] == b'\x89PNG':
        return _decode_with_opencv(encoded)
    raise ValueError(f'neither JPEG nor PNG: {len(encoded)} bytes that start with {encoded[:4]!r}')


def _decode_with_opencv(encoded: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if image is None:
        raise ValueError(f'broken image of {len(encoded)} bytes')
    return image


def _find_height(encoded: bytes) -> int:
    """Where a sequential JPEG that is not truncated states its height, or 0 for all other bytes.

    The offset is that of two bytes, followed by two of the width, in the frame header (ITU T.81,
    B.2.2).
    """
    position = 2 * (encoded[:2] == b'\xff\xd8')
    while position and position + 9 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker in (0xC0, 0xC1):
            end_of_image = encoded.rfind(b'\xff\xd9')
            return position + 5 if end_of_image > position else 0
        if marker != 0xC4 and not 0xDB <= marker <= 0xFE:  # neither tables nor application data
            return 0
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], 'big')
    return 0


def _decode_top(encoded: bytes, height_at: int, rows: int) -> np.ndarray:
    """Decodes at least the first `rows` rows of a sequential JPEG, and not many more.

    The decoder is told that the image ends two rows further down (chroma is interpolated from the
    next row), and so leaves the rest of the bytes alone, entropy decoding included. What it refuses
    even so is for `decode`, which knows other decoders and says what is wrong.
    """
    shortened = bytearray(encoded)
    shortened[height_at : height_at + 2] = (rows + 2).to_bytes(2, 'big')
    try:
        return simplejpeg.decode_jpeg(shortened, 'RGB', fastdct=True, strict=False)
    except ValueError:
        return decode(encoded)


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


def decode_and_random_crop(
    encoded: bytes, rng: np.random.Generator, *, size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """The training path: a random crop, flipped with probability 1/2, resized to `size`².

    Returns:
        uint8[size,size,3], which is `out` where that is given.

    Raises:
        ValueError: as `decode`.
    """
    height_at = _find_height(encoded)
    if height_at:
        full_height = int.from_bytes(encoded[height_at : height_at + 2], 'big')
        full_width = int.from_bytes(encoded[height_at + 2 : height_at + 4], 'big')
        y, x, height, width = sample_crop(full_height, full_width, rng)
    if height_at and y + height + 2 < full_height:
        image = _decode_top(encoded, height_at, y + height)
    else:
        image = decode(encoded)
    if not height_at:
        y, x, height, width = sample_crop(image.shape[0], image.shape[1], rng)
    step = (height / size, width / size)
    mirror = rng.random() < 0.5
    return _sample(image, (y, x, height, width), (0.0, 0.0), step, size, mirror, out)


def decode_and_center_crop(
    encoded: bytes, *, size: int, resize_min: int, out: np.ndarray | None = None
) -> np.ndarray:
    """The evaluation path: the shorter side resized to `resize_min`, then the central `size`².

    Only that window is computed. Returns and raises as `decode_and_random_crop`.
    """
    image = decode(encoded)
    height, width = image.shape[:2]
    # In float32 and cut off to an integer, as officially: 255 instead of 256 for some sizes.
    scale = np.float32(resize_min) / np.float32(min(height, width))
    new_height, new_width = int(np.float32(height) * scale), int(np.float32(width) * scale)
    step_y, step_x = height / new_height, width / new_width
    first = ((new_height - size) // 2 * step_y, (new_width - size) // 2 * step_x)
    return _sample(image, (0, 0, height, width), first, (step_y, step_x), size, False, out)


def pad_and_random_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    padding: int,
    flip: bool,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The training path of small images: zero padding, a random crop of the old size, maybe a flip.

    Args:
        image: uint8[H,W,3].
        rng: where the crop's two offsets and the flip come from.
        padding: rows and columns of zeros on each side; the crop starts anywhere in 0..2·padding.
        flip: whether to mirror left and right with probability 1/2.
        out: where to write the result, uint8[H,W,3].

    Returns:
        uint8[H,W,3], which is `out` where that is given.
    """
    border = (padding, padding, padding, padding)
    padded = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=0)
    y, x = (int(rng.random() * (2 * padding + 1)) for _ in range(2))
    crop = padded[y : y + image.shape[0], x : x + image.shape[1]]
    if flip and rng.random() < 0.5:
        crop = crop[:, ::-1]
    if out is None:
        return np.ascontiguousarray(crop)
    out[...] = crop
    return out


def _sample(
    image: np.ndarray,
    box: tuple[int, int, int, int],
    first: tuple[float, float],
    step: tuple[float, float],
    size: int,
    mirror: bool,
    out: np.ndarray | None,
) -> np.ndarray:
    """As `resampling.sample`, to uint8[size,size,3]."""
    import resampling  # compiles or loads machine code, which small images can do without

    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    resampling.sample(image.reshape(-1), image.shape[1], box, first, step, mirror, out)
    return out
