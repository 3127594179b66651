# SPDX-License-Identifier: Apache-2.0
"""Pixel arithmetic: equal to the official outputs, and to the specification in float64."""

import json
import math
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from workloads.resnet import image_decoding
from workloads.resnet import image_preprocessing as ip
from workloads.resnet.partial_jpeg import decode_top
from workloads.resnet.task import CHANNEL_MEANS

# Quantiles of 30,000 draws of the official operation for each of two image sizes.
CROPS = json.loads((Path(__file__).parents[2] / 'golden' / 'crop_distribution.json').read_text())


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise over the full range, uint8[height,width,3]."""
    noise = np.random.default_rng(seed).uniform(-40, 300, (6, 7, 3))
    return np.clip(cv2.resize(noise, (width, height)), 0, 255).round().astype(np.uint8)


def as_png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


def old_grid(image: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """The definition in float64: bilinear samples at (ys × xs), the border's pixels repeated."""

    def neighbours(c: np.ndarray, size: int):
        low = np.floor(c).astype(int)
        return low.clip(0, size - 1), (low + 1).clip(0, size - 1), c - low

    y0, y1, wy = neighbours(ys, image.shape[0])
    x0, x1, wx = neighbours(xs, image.shape[1])
    wy, wx = wy[:, None, None], wx[None, :, None]
    values = image.astype(np.float64)
    top = values[y0][:, x0] * (1 - wx) + values[y0][:, x1] * wx
    bottom = values[y1][:, x0] * (1 - wx) + values[y1][:, x1] * wx
    return top * (1 - wy) + bottom * wy


def assert_same_pixels(actual: np.ndarray, expected: np.ndarray) -> None:
    """At most 1 grey level anywhere and 0.02 on average, after rounding both."""
    difference = np.abs(actual.astype(np.float64) - np.rint(expected))
    assert difference.max() <= 1
    assert difference.mean() <= 0.02


def test_evaluation_equals_the_official_outputs(official_outputs, imagenet_sample):
    golden = np.load(official_outputs / 'eval_preprocessing.npz')
    for name in golden:
        encoded = (imagenet_sample / name).read_bytes()
        image = ip.decode_and_center_crop(encoded, size=224, resize_min=256)
        assert_same_pixels(image, golden[name] + np.array(CHANNEL_MEANS))


@pytest.mark.parametrize(
    ('height', 'width'),
    [(375, 500), (500, 333), (224, 224), (256, 300), (17, 23), (1, 9), (9, 1), (1, 1), (3, 2000)],
)
def test_evaluation_equals_float64_arithmetic(height, width):
    image = smooth_image(height, width)
    actual = ip.decode_and_center_crop(as_png(image), size=224, resize_min=256)
    scale = np.float32(256) / np.float32(min(height, width))
    new_height, new_width = int(np.float32(height) * scale), int(np.float32(width) * scale)
    ys = (np.arange(224) + (new_height - 224) // 2) * (height / new_height)
    xs = (np.arange(224) + (new_width - 224) // 2) * (width / new_width)
    assert_same_pixels(actual, old_grid(image, ys, xs))


@pytest.mark.slow
@pytest.mark.parametrize(('height', 'width'), [(5000, 8000), (1, 40000), (40000, 1)])
def test_very_large_and_very_long_images(height, width):
    image = smooth_image(height, width)
    actual = ip.decode_and_center_crop(as_png(image), size=224, resize_min=256)
    scale = 256 / min(height, width)
    ys = (np.arange(224) + (int(height * scale) - 224) // 2) * (height / int(height * scale))
    xs = (np.arange(224) + (int(width * scale) - 224) // 2) * (width / int(width * scale))
    assert_same_pixels(actual, old_grid(image, ys, xs))


def flipped_then_resized(image, box, flip: bool, size: int) -> np.ndarray:
    """The specification in float64: the crop is cut out, flipped, and only then resized."""
    y, x, height, width = box
    crop = image[y : y + height, x : x + width]
    if flip:
        crop = crop[:, ::-1]
    steps = np.arange(size)
    return old_grid(crop, steps * (height / size), steps * (width / size))


def test_training_equals_the_official_outputs(official_outputs, imagenet_sample):
    golden = np.load(official_outputs / 'train_preprocessing.npz')
    for key in golden:
        name, box, flip, size = key.split('/')
        image = ip.decode((imagenet_sample / name).read_bytes())
        box = tuple(map(int, box.split(',')))
        actual = ip.crop_and_resize(image, box, flip=flip == '1', size=int(size))
        assert_same_pixels(actual, golden[key])


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize(
    'box',
    [
        (0, 0, 211, 317),
        (0, 0, 100, 60),
        (111, 257, 100, 60),
        (0, 257, 9, 60),
        (111, 0, 100, 7),
        (40, 50, 1, 1),
        (40, 50, 1, 200),
        (40, 50, 150, 1),
        (40, 50, 64, 64),
        (210, 316, 1, 1),
    ],
)
def test_crops_are_flipped_and_then_resized(box, flip):
    image = ip.decode(simplejpeg.encode_jpeg(smooth_image(211, 317), quality=95))
    for size in (1, 64, 224):
        actual = ip.crop_and_resize(image, box, flip=flip, size=size)
        assert_same_pixels(actual, flipped_then_resized(image, box, flip, size))


@pytest.mark.parametrize('seed', range(20))
def test_training_resizes_the_sampled_crop(seed):
    image = smooth_image(300 + 7 * seed, 420 - 11 * seed)
    actual = ip.decode_and_random_crop(as_png(image), np.random.default_rng(seed), size=224)
    rng = np.random.default_rng(seed)
    box = ip.sample_crop(*image.shape[:2], rng)
    assert_same_pixels(actual, flipped_then_resized(image, box, rng.random() < 0.5, 224))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'box': (0, 0, 41, 50)}, 'not inside an image of height 40 and width 50'),
        ({'box': (0, 1, 40, 50)}, 'not inside'),
        ({'box': (-1, 0, 10, 10)}, 'not inside'),
        ({'box': (0, 0, 0, 10)}, 'is empty'),
        ({'box': (0, 0, 10, -3)}, 'is empty'),
        ({'box': (0, 2**63, 10, 10)}, 'not inside'),
        ({'box': (0, 0, 10)}, 'four integers'),
        ({'box': (0, 0, 10.0, 10)}, 'four integers'),
        ({'box': None}, 'four integers'),
        ({'size': 0}, 'size=0'),
        ({'size': -224}, 'size=-224'),
        ({'image': np.zeros((40, 50), np.uint8)}, r'uint8\[40, 50\], not uint8'),
        ({'image': np.zeros((40, 50, 4), np.uint8)}, 'not uint8'),
        ({'image': np.zeros((40, 50, 3), np.float32)}, 'float32'),
    ],
)
def test_what_cannot_be_cropped_is_rejected(change, message):
    arguments = {'image': smooth_image(40, 50), 'box': (0, 0, 40, 50), 'size': 9, 'flip': True}
    with pytest.raises(ValueError, match=message):
        ip.crop_and_resize(**(arguments | change))


def test_any_view_of_an_image_can_be_cropped():
    image = smooth_image(40, 50)
    read_only = image.copy()
    read_only.flags.writeable = False
    views = [read_only, np.asfortranarray(image), np.pad(image, ((0, 0), (3, 4), (0, 0)))[:, 3:-4]]
    expected = ip.crop_and_resize(image, (3, 5, 20, 30), flip=True, size=16)
    for view in views:
        actual = ip.crop_and_resize(view, (3, 5, 20, 30), flip=True, size=16)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize('size', range(1, 5))
def test_tiny_central_crops_lie_in_the_image(size):
    for side in range(1, 120):
        image = np.full((side, side + 1, 3), 200, np.uint8)
        for resize_min in (size, size + 1):
            crop = ip.decode_and_center_crop(as_png(image), size=size, resize_min=resize_min)
            assert (crop == 200).all()


@pytest.mark.parametrize('subsampling', ['420', '422', '444', 'gray'])
@pytest.mark.parametrize('seed', range(6))
def test_a_crop_of_a_jpeg_equals_the_crop_of_its_full_decoding(subsampling, seed):
    image = smooth_image(211, 317, seed)
    if subsampling == 'gray':
        grey = np.ascontiguousarray(image[..., :1])
        jpeg = simplejpeg.encode_jpeg(grey, colorspace='GRAY', colorsubsampling='Gray')
    else:
        jpeg = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=subsampling)
    whole = simplejpeg.decode_jpeg(jpeg, 'RGB', fastdct=True)
    actual = ip.decode_and_random_crop(jpeg, np.random.default_rng(seed), size=224)
    expected = ip.decode_and_random_crop(as_png(whole), np.random.default_rng(seed), size=224)
    np.testing.assert_array_equal(actual, expected)


def test_an_unusual_chroma_sampling_is_cropped_as_it_is_decoded():
    """Three grey values to a colour: libjpeg knows it, libjpeg-turbo's own interface does not.

    By hand, for no encoder at hand writes it: a block is a byte, one step brighter or darker than
    the one before it, and after three of them a zero says that there is no colour.
    """
    header = simplejpeg.encode_jpeg(
        np.zeros((200, 312, 3), np.uint8), quality=20, colorsubsampling='444'
    )
    header = bytearray(header[: header.index(b'\xff\xda') + 14])
    header[header.index(b'\xff\xc0') + 11] = 0x31
    steps = np.random.default_rng(0).choice(np.array([0x4A, 0x5A], np.uint8), (25 * 13, 3))
    jpeg = bytes(header) + np.pad(steps, ((0, 0), (0, 1))).tobytes() + b'\xff\xd9'
    with pytest.raises(ValueError, match='subsampling'):
        simplejpeg.decode_jpeg(jpeg)
    whole = ip.decode(jpeg)
    assert whole.std() > 20
    for seed in range(6):
        actual = ip.decode_and_random_crop(jpeg, np.random.default_rng(seed), size=64)
        expected = ip.decode_and_random_crop(as_png(whole), np.random.default_rng(seed), size=64)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize('sampling', ['411', '420', '422', '440', '444'])
@pytest.mark.parametrize('kind', ['plain', 'restart markers', 'progressive', 'optimized'])
def test_the_top_of_a_jpeg_equals_the_top_of_its_full_decoding(sampling, kind):
    options = {
        'plain': [],
        'restart markers': [cv2.IMWRITE_JPEG_RST_INTERVAL, 5],
        'progressive': [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        'optimized': [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
    }[kind]
    options += [
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        getattr(cv2, f'IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}'),
    ]
    noise = np.random.default_rng(0).integers(0, 256, (25, 40, 3), np.uint8)
    image = cv2.resize(noise, (320, 200), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode('.jpg', image, options)[1].tobytes()
    whole = simplejpeg.decode_jpeg(jpeg, 'RGB', fastdct=True)
    frame = image_decoding.find_frame(jpeg)
    assert (frame.height, frame.width) == (200, 320)
    assert frame.is_sequential == (kind != 'progressive')
    for rows in range(1, 201, 5):
        top = decode_top(jpeg, frame, rows)
        assert len(top) == (min(rows + 2, 200) if frame.is_sequential else 200)
        np.testing.assert_array_equal(top[:rows], whole[:rows])


def test_greyscale_gives_three_equal_channels():
    grey = smooth_image(40, 50)[..., :1]
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(grey), colorspace='GRAY', colorsubsampling='Gray'
    )
    for encoded in (jpeg, cv2.imencode('.png', grey)[1].tobytes()):
        image = ip.decode(encoded)
        assert image.shape == (40, 50, 3)
        assert (image == image[..., :1]).all()


@pytest.mark.parametrize('keep', [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_image_is_rejected(keep):
    image = smooth_image(200, 300)
    for encoded in (simplejpeg.encode_jpeg(image), as_png(image)):
        with pytest.raises(ValueError):
            ip.decode(encoded[: int(keep * len(encoded))])


@pytest.mark.parametrize('keep', [0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_rejected_whatever_the_crop(keep):
    jpeg = simplejpeg.encode_jpeg(smooth_image(200, 300))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        with pytest.raises(ValueError, match='truncated JPEG'):
            ip.decode_and_random_crop(jpeg[: int(keep * len(jpeg))], rng, size=64)


def test_what_is_no_image_is_rejected():
    for encoded in (b'', b'GIF89a' + bytes(50), b'\xff\xd8' + bytes(50), b'\x89PNG' + bytes(50)):
        with pytest.raises(ValueError):
            ip.decode(encoded)


READERS = {
    'decode': ip.decode,
    'random crop': lambda e: ip.decode_and_random_crop(e, np.random.default_rng(3), size=64),
    'central crop': lambda e: ip.decode_and_center_crop(e, size=64, resize_min=73),
}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def claiming_png(height: int, width: int, pixels: bytes = bytes(100), extra: bytes = b'') -> bytes:
    """An 8-bit greyscale PNG with any header."""
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    data = chunk(b'IDAT', zlib.compress(pixels, 9))
    return image_decoding.PNG_SIGNATURE + header + extra + data + chunk(b'IEND', b'')


def claiming_jpeg(height: int, width: int, *, progressive: bool = False, scans: int = 1) -> bytes:
    """A JPEG with any header, and its first scan repeated."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    jpeg = bytearray(cv2.imencode('.jpg', smooth_image(16, 16), options)[1].tobytes())
    at = image_decoding.find_frame(jpeg).height_at
    jpeg[at : at + 4] = struct.pack('>HH', height, width)
    scan = jpeg.index(b'\xff\xda')
    end = jpeg.index(b'\xff', scan + 2)
    return bytes(jpeg[:scan] + jpeg[scan:end] * scans + jpeg[scan:])


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize(
    ('encoded', 'message'),
    [
        (claiming_jpeg(60000, 60000), 'its size is 60000×60000'),
        (claiming_jpeg(60000, 1667), 'its size is 1667×60000'),
        (claiming_jpeg(60000, 60000, progressive=True), 'its size is 60000×60000'),
        (claiming_jpeg(60000, 60000)[:2] + bytes(9) + claiming_jpeg(60000, 60000)[2:], '60000×'),
        (claiming_jpeg(0, 16), 'its size is 16×0'),
        (claiming_jpeg(1000, 1000, progressive=True, scans=2000), '20.. scans of 1000×1000'),
        (claiming_png(20000, 20000), 'its size is 20000×20000'),
        (claiming_png(60000, 60000), 'its size is 60000×60000'),
        (claiming_png(2**31 - 1, 2**31 - 1), 'its size is 2147483647×2147483647'),
        (claiming_png(1, 1_000_001), 'its size is 1000001×1'),
        (claiming_png(1_000_001, 1), 'its size is 1×1000001'),
        (claiming_png(0, 5), 'its size is 5×0'),
        (claiming_png(64, 64, pixels=bytes(10**8)), 'longer than the 64×64 of its header'),
        (claiming_png(64, 64), 'broken image'),
        (claiming_png(64, 64)[:-1], 'truncated PNG'),
        (image_decoding.PNG_SIGNATURE + chunk(b'IEND', b''), 'broken PNG'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_images_that_lie_about_themselves_are_rejected_at_once(reader, encoded, message):
    before = time.process_time()
    with pytest.raises(ValueError, match=message):
        READERS[reader](encoded)
    assert time.process_time() - before < 1


def test_what_a_png_says_beside_its_pixels_is_not_read():
    image = smooth_image(40, 50)
    png, zipped = as_png(image), zlib.compress(bytes(10**8), 9)
    extra = chunk(b'zTXt', b'a\0\0' + zipped) + chunk(b'iTXt', b'a\0\1\0\0\0' + zipped)
    extra = chunk(b'iCCP', b'a\0\0' + zipped) + 100 * extra
    before = time.process_time()
    for reader in READERS.values():
        np.testing.assert_array_equal(reader(png[:33] + extra + png[33:]), reader(png))
    assert time.process_time() - before < 1


def test_a_damaged_image_is_decoded_or_rejected():
    """Thousands of random changes end in pixels or in ValueError."""
    rng = np.random.default_rng(0)
    image = smooth_image(37, 53)
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    originals = [
        simplejpeg.encode_jpeg(image),
        cv2.imencode('.jpg', image, options)[1].tobytes(),
        as_png(image),
    ]
    rejected = 0
    for trial in range(3000):
        damaged = bytearray(originals[trial % 3])
        for _ in range(rng.integers(1, 5)):
            # Half of the changes are in the headers.
            end = len(damaged) if rng.random() < 0.5 else 700
            at, length = int(rng.integers(0, min(end, len(damaged)))), int(rng.integers(1, 4))
            kept = damaged[at + length :] if rng.random() < 0.2 else damaged[at:]
            damaged[at:] = rng.bytes(length) + kept[length * (rng.random() < 0.7) :]
        for reader in READERS.values():
            try:
                reader(bytes(damaged))
            except ValueError:
                rejected += 1
    assert 1000 < rejected < 8000


def draw(height: int, width: int, draws: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.array([ip.sample_crop(height, width, rng) for _ in range(draws)])


@pytest.mark.parametrize('size', CROPS)
def test_crops_have_the_official_distribution(size):
    height, width = map(int, size.split('x'))
    official = CROPS[size]
    y, x, crop_height, crop_width = draw(height, width, 30_000).T
    area = crop_height * crop_width / (height * width)
    assert area.mean() == pytest.approx(official['mean_area'], abs=0.005)
    drawn = {'area': area, 'aspect': crop_width / crop_height, 'offset_y': y, 'offset_x': x}
    for name, values in drawn.items():
        for probability, quantile in zip(official['quantiles'], official[name], strict=True):
            # The share of draws up to the official quantile: 4.5 standard errors of both samples.
            tolerance = 4.5 * math.sqrt(2 * probability * (1 - probability) / official['n'])
            below, up_to = (values < quantile - 5e-5).mean(), (values <= quantile + 5e-5).mean()
            assert below - tolerance <= probability <= up_to + tolerance, (name, probability)


@pytest.mark.parametrize(('height', 'width'), [(375, 500), (500, 333), (64, 48)])
def test_heights_fit_the_definition(height, width):
    """Goodness of fit over 20,000 draws: given the aspect, the height is uniform where valid."""
    draws, (low_aspect, high_aspect) = 20_000, ip.CROP_ASPECT
    area = height * width
    expected = np.zeros(height + 1)
    # The definition, integrated over a fine grid of aspects instead of drawn.
    for aspect in np.linspace(low_aspect, high_aspect, 20_001):
        heights = np.arange(1, height + 1)
        widths = np.rint(heights * aspect)
        top = min(int(np.rint(np.sqrt(area / aspect))), heights[widths <= width].max())
        bottom = min(int(np.rint(np.sqrt(0.05 * area / aspect))), top)
        chosen = (heights >= bottom) & (heights <= top)
        accepted = chosen & (heights * widths >= ip.CROP_MIN_COVERED * area)
        expected[1:][accepted] += 1 / chosen.sum()
    expected *= draws / expected.sum()
    observed = np.bincount(draw(height, width, draws)[:, 2], minlength=height + 1)
    # No single height is off, the smallest and the largest included.
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected) + 3).all()
    # Neighbouring heights are pooled into cells of at least 50 expected draws.
    cells = np.floor(np.cumsum(expected) / 50).astype(int)
    pooled = [np.bincount(cells, v) for v in (observed, expected)]
    chi_squared = ((pooled[0] - pooled[1]) ** 2 / pooled[1].clip(1e-9)).sum()
    degrees = len(pooled[0]) - 1
    assert chi_squared < degrees + 4.5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (1, 50), (50, 1), (2, 3), (4000, 10)])
def test_crops_of_odd_sizes_lie_in_the_image(height, width):
    y, x, crop_height, crop_width = draw(height, width, 200).T
    assert (crop_height >= 1).all()
    assert (crop_width >= 1).all()
    assert (y >= 0).all() and (y + crop_height <= height).all()  # noqa: PT018
    assert (x >= 0).all() and (x + crop_width <= width).all()  # noqa: PT018


def test_offsets_exclude_the_upper_end():
    y, x, crop_height, crop_width = draw(375, 500, 20_000).T
    assert ((y < 375 - crop_height) | (crop_height == 375)).all()
    assert ((x < 500 - crop_width) | (crop_width == 500)).all()
