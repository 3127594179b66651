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
import shlex
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from settings import loading

MAX_JSON_BYTES = 1 << 26
MAX_MEMBERS = 100_000  # of one tar; the largest, ILSVRC2012_img_val.tar, has 50,000
CHUNK_BYTES = 1 << 20
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b'\x1f\x8b': gzip.open,
    b'BZh': bz2.open,
    b'\xfd7zXZ\0': lzma.open,
}


def remedy(path: Path) -> str:
    """What to do about a file that can be made or fetched again."""
    return f'Delete it: rm {shlex.quote(str(path))}'


def check_regular(path: Path, limit: int | None = None) -> None:
    """Checks that something is a regular file; reading a device or a pipe might never end.

    Raises:
        FileNotFoundError: there is none. Links are followed.
        ValueError: it is a folder, a device or a pipe, or has more than `limit` bytes.
    """
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing')
    if not path.is_file():
        raise ValueError(f'{path} is not a regular file')
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise ValueError(f'{path} has {size:,} bytes; at most {limit:,} are read')


def read_json(path: Path) -> dict[str, Any]:
    """The names and values in a JSON file; raises as `check_regular`, and ValueError for others."""
    check_regular(path, MAX_JSON_BYTES)
    return loading.read_object(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(path.name + '.part')
    temporary.write_text(json.dumps(values) + '\n')
    os.replace(temporary, path)


def decompress(path: Path, limit: int) -> IO[bytes]:
    """The content of a file, in memory, without its gzip, bzip2 or xz compression if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not a regular file, or has more than `limit` bytes inside.
    """
    check_regular(path)
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


class Member(NamedTuple):
    """A regular file in a tar: its path, where in the tar its content lies, and the content."""

    path: str
    offset: int
    size: int
    content: IO[bytes]


def tar_members(tar: IO[bytes], name: str, limit: int) -> Iterator[Member]:
    """Yields the regular files of an uncompressed, seekable tar; folders are ignored.

    `name` is what errors call it. ValueError if the tar is damaged or truncated; or a member is a
    link, a device or sparse, has more than `limit` bytes, is there twice, or has an absolute or
    otherwise unusable path.
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
        if content is None or header.issparse():
            raise ValueError(f'{path} in {name} is not a regular file')
        if not 0 <= header.size <= limit:
            size = f'{header.size:,} bytes; at most {limit:,} are read'
            raise ValueError(f'{path} in {name} has {size}')
        if header.offset_data + header.size > length:
            raise ValueError(f'{name} is truncated: {path} ends after {length:,} bytes')
        if str(path) in paths:
            raise ValueError(f'{path} is in {name} twice')
        if len(paths) == MAX_MEMBERS:
            raise ValueError(f'{name} has more than {MAX_MEMBERS:,} files')
        paths.add(str(path))
        end += -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        yield Member(str(path), header.offset_data, header.size, content)
    # tarfile takes a broken header, too, for the end of the archive.
    tar.seek(end)
    if tar.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
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
