# SPDX-License-Identifier: Apache-2.0
"""Encoded bytes to RGB pixels, as the official reference decodes them, within bounds.

JPEGs are decoded with libjpeg's fast integer DCT. A few bytes may claim any size, and decoders take
them at their word, so headers are read and judged first.
"""

import zlib
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

# Beyond these an image is rejected by its header. A few bytes may claim any size, and decoders take
# them at their word; at the limits they take up to 1.7 GB and 5 seconds. A progressive JPEG usually
# has 10 scans, and each passes over the whole image. The side is libpng's limit.
MAX_PIXELS, MAX_SIDE = 100_000_000, 1_000_000
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


def decode(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG or PNG to RGB, uint8[H,W,3]; greyscale gives three equal channels.

    Like the official decoder it takes JPEGs that libjpeg only warns of, but not truncated ones.

    Raises:
        ValueError: the bytes are no image, not a whole one, or state a size beyond `MAX_PIXELS` or
            `MAX_SCANNED_PIXELS`; then nothing is decoded.
    """
    if is_jpeg(encoded):
        find_frame(encoded)
        return decode_jpeg_whole(encoded)
    if encoded[:8] == PNG_SIGNATURE:
        return _decode_with_opencv(_critical_chunks(encoded))
    raise ValueError(f'neither JPEG nor PNG: {len(encoded)} bytes that start with {encoded[:4]!r}')


def is_jpeg(encoded: bytes) -> bool:
    """Whether the bytes start like a JPEG."""
    return encoded[:2] == b'\xff\xd8'


def _check_size(height: int, width: int, scans: int = 1) -> None:
    if not 0 < height * width <= MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise ValueError(
            f'its size is {width}×{height}, not 1 to {MAX_PIXELS:,} pixels with no side longer '
            f'than {MAX_SIDE:,}'
        )
    if height * width * scans > MAX_SCANNED_PIXELS:
        raise ValueError(
            f'it has {scans} scans of {width}×{height}, in all more than '
            f'{MAX_SCANNED_PIXELS:,} pixels'
        )


class Frame(NamedTuple):
    """What a JPEG states of itself.

    `height_at` is the offset of the two bytes of the height, followed by two of the width.
    `is_sequential` is neither progressive nor lossless, and Huffman-coded.
    """

    height_at: int
    height: int
    width: int
    is_sequential: bool


def find_frame(encoded: bytes) -> Frame:
    """Reads a JPEG's markers up to its first scan (ITU T.81, B.1 and B.2).

    Whatever libjpeg accepts is read as libjpeg reads it, rubbish between segments included.

    Raises:
        ValueError: there is no frame or no scan; or from `_check_size`.
    """
    at = kind = 0
    position, last = 2, len(encoded) - 10
    while position := encoded.find(b'\xff', position, last) + 1:
        marker = encoded[position]
        if marker == 0xFF:  # padding
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # a marker without a segment
            position += 1
            continue
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            at, kind = position + 4, marker
        position += 1 + max(2, int.from_bytes(encoded[position + 1 : position + 3], 'big'))
    if not (at and position):
        raise ValueError(f'broken JPEG of {len(encoded)} bytes')
    height = int.from_bytes(encoded[at : at + 2], 'big')
    width = int.from_bytes(encoded[at + 2 : at + 4], 'big')
    is_sequential = kind in (0xC0, 0xC1)
    # A scan of all components is the only one; else there may be many, each of the whole image.
    is_single = is_sequential and encoded[position + 3] == encoded[at + 4]
    _check_size(height, width, 1 if is_single else encoded.count(b'\xff\xda', position - 1))
    return Frame(at, height, width, is_sequential)


def decode_jpeg_whole(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG whose size `find_frame` has judged; returns and raises as `decode`."""
    try:
        return simplejpeg.decode_jpeg(encoded, 'RGB', fastdct=True)
    except ValueError as error:
        if 'Premature end of JPEG file' in str(error):
            raise ValueError(f'truncated JPEG of {len(encoded)} bytes') from error
        if 'subsampling' in str(error):  # a layout that only the accurate DCT's decoder knows
            return _decode_with_opencv(encoded)
        return simplejpeg.decode_jpeg(encoded, 'RGB', fastdct=True, strict=False)


def _critical_chunks(encoded: bytes) -> bytes:
    """A PNG without what its pixels do not need: texts, profiles and animations.

    Compressed data may take any time and memory to read, so texts and profiles are left out, and
    pixels may not be longer than the header says.

    Raises:
        ValueError: it is not whole; or it states or has too many pixels.
    """
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while kept[-1][4:8] != b'IEND':
        end = position + 12 + int.from_bytes(encoded[position : position + 4], 'big')
        if end > len(encoded):
            raise ValueError(f'truncated PNG of {len(encoded)} bytes')
        if not encoded[position + 4] & 0x20:  # a capital letter: critical
            kept.append(encoded[position:end])
        position = end
    header = kept[1]
    if header[:8] != b'\0\0\0\x0dIHDR':
        raise ValueError(f'broken PNG of {len(encoded)} bytes')
    width, height = (int.from_bytes(header[at : at + 4], 'big') for at in (8, 12))
    _check_size(height, width)
    pixels = b''.join(chunk[8:-4] for chunk in kept if chunk[4:8] == b'IDAT')
    longest = 8 * height * width + 16 * height + 64  # 64 bits a pixel, interlaced
    try:
        is_longer = len(zlib.decompressobj().decompress(pixels, longest + 1)) > longest
    except zlib.error as error:
        raise ValueError(f'broken PNG of {len(encoded)} bytes: {error}') from error
    if is_longer:
        raise ValueError(f'its pixels are longer than the {width}×{height} of its header')
    return b''.join(kept)


def _decode_with_opencv(encoded: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f'broken image of {len(encoded)} bytes: {error.err}') from error
    if image is None:
        raise ValueError(f'broken image of {len(encoded)} bytes')
    return image
