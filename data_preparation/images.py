# SPDX-License-Identifier: Apache-2.0
"""The size that an encoded image states, for checks that are cheaper than decoding it."""

import simplejpeg

from workloads.resnet.image_decoding import decode, find_frame


def check_header(encoded: bytes) -> tuple[int, int]:
    """Checks the start of a JPEG, and the whole of a PNG; returns height and width in pixels.

    Raises:
        ValueError: it is neither, or states a size that `decode` rejects.
    """
    if encoded[:2] != b'\xff\xd8':
        height, width, _ = decode(encoded).shape
        return height, width
    simplejpeg.decode_jpeg_header(encoded)
    frame = find_frame(encoded)
    return frame.height, frame.width
