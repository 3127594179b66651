# SPDX-License-Identifier: Apache-2.0
"""Reads files that may hold anything, within limits: plain files, JSON and tar archives.

Whatever is wrong with one is a ValueError that names it, and for archives the member. Nothing is
ever unpacked to the disk.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

MAX_JSON_BYTES = 1 << 26
MAX_MEMBERS = 100_000  # of one tar; the largest, ILSVRC2012_img_val.tar, has 50,000
CHUNK_BYTES = 1 << 20
TAR_BLOCK = 512  # bytes: headers, contents and the end mark are padded to a multiple of it
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b'\x1f\x8b': gzip.open,
    b'BZh': bz2.open,
    b'\xfd7zXZ\0': lzma.open,
}


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a folder, a device or a pipe, or has more than `limit` bytes.
    """
    _require_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f'{path} has {size:,} bytes; at most {limit:,} are read')
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises as `read`, and ValueError for what is not JSON."""
    content = read(path, MAX_JSON_BYTES)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: not JSON ({error})') from error


def decompress(path: Path, limit: int) -> IO[bytes]:
    """The content of a file, in memory, without its gzip, bzip2 or xz compression if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not a regular file, or has more than `limit` bytes inside.
    """
    _require_regular(path)
    with path.open('rb') as file:
        magic = file.read(6)
    opener = next((o for start, o in DECOMPRESSORS.items() if magic.startswith(start)), open)
    content = io.BytesIO()
    try:
        with opener(path, 'rb') as stream:
            while chunk := stream.read(CHUNK_BYTES):
                if content.tell() + len(chunk) > limit:
                    raise ValueError(f'{path} has more than {limit:,} bytes inside')
                content.write(chunk)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f'{path} is damaged or truncated: {error}') from error
    return content


def _require_regular(path: Path) -> None:
    """Links are followed; reading a device or a pipe might never end."""
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing')
    if not path.is_file():
        raise ValueError(f'{path} is not a regular file')


class Member(NamedTuple):
    """A regular file in a tar: its path, where in the tar its content lies, and the content."""

    path: str
    offset: int
    size: int
    content: IO[bytes]


def tar_members(tar: IO[bytes], name: str, limit: int) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar in their order, passing over folders.

    Args:
        tar: the tar, seekable.
        name: what to call it in an error.
        limit: bytes that a member may have.

    Raises:
        ValueError: the tar is damaged or truncated; or a member is a link, a device or sparse, is
            larger than `limit`, is there twice, or has an absolute or otherwise unusable path.
    """
    paths: set[str] = set()
    length, end = tar.seek(0, os.SEEK_END), 0
    tar.seek(0)
    for header, content in _headers(tar, name):
        path = PurePosixPath(header.name)
        if path.is_absolute() or '..' in path.parts or not header.name.isprintable():
            raise ValueError(f'{name} has a member with the unusable path {header.name!r}')
        end = header.offset_data
        if header.isdir():
            continue
        if content is None or not header.isreg() or header.issparse():
            raise ValueError(f'{path} in {name} is not a regular file')
        if not 0 <= header.size <= limit:
            raise ValueError(
                f'{path} in {name} has {header.size:,} bytes; at most {limit:,} are read'
            )
        if header.offset_data + header.size > length:
            raise ValueError(f'{name} is truncated: {path} ends after {length:,} bytes')
        if str(path) in paths:
            raise ValueError(f'{path} is in {name} twice')
        if len(paths) == MAX_MEMBERS:
            raise ValueError(f'{name} has more than {MAX_MEMBERS:,} files')
        paths.add(str(path))
        end += -(-header.size // TAR_BLOCK) * TAR_BLOCK
        yield Member(str(path), header.offset_data, header.size, content)
    # To tarfile a broken header, too, is the end of the archive.
    tar.seek(end)
    if tar.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise ValueError(f'{name} is truncated or damaged at byte {end:,}')


def _headers(file: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yields each member's header, and its content where it is a regular file."""
    try:
        with tarfile.open(fileobj=file, mode='r:') as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep every header
                yield member, tar.extractfile(member) if member.isreg() else None
    except Exception as error:  # on broken headers tarfile raises more than its own errors
        raise ValueError(f'{name} is damaged, truncated or not a tar archive: {error}') from error
