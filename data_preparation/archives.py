# SPDX-License-Identifier: Apache-2.0
"""Large public files: downloads that resume, checked against the published size and SHA-256."""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data_preparation import files
from data_preparation.progress import progress

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
MOST_FAILURES = 5  # attempts in a row that bring no byte, before a download gives up
MAX_UNPUBLISHED_BYTES = 1 << 30  # of a file whose size only the server states


@dataclasses.dataclass(frozen=True)
class Archive:
    """What is published about a file: its name, its size in bytes and its SHA-256 in hex."""

    file_name: str
    size: int
    sha256: str


def redacted(url: str) -> str:
    """A URL as it may be printed: without its query, and without a user name and password."""
    before, at, after = url.rpartition('@')
    return re.split('[?#]', f'***@{after}' if at else before + after)[0]


def check_url(url: str) -> None:
    """Raises ValueError unless it is an http or https URL without a user name and password.

    Other users of the machine could see a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        usable = False
    if not usable or '@' in parts.netloc or not re.fullmatch('[!-~]+', url):
        raise ValueError(
            f'{redacted(url)!r} cannot be downloaded: it must be a URL http://HOST/PATH or '
            'https://HOST/PATH without a user name and password, and with %20 for a space'
        )


def download(
    url: str,
    path: Path,
    size: int | None = None,
    user: str = '',
    password: str = '',
    most: int = MAX_UNPUBLISHED_BYTES,
) -> None:
    """Fetches `url` to `path`, resuming where an earlier attempt stopped.

    The bytes are collected in `path` + '.part'. A connection that breaks is opened again as long as
    every few attempts bring something. `size` is the published one in bytes; None takes what the
    server states, up to `most`. User and password go to the host of `url` alone, never to where it
    redirects.

    Raises:
        ValueError: the server sends an error or a file of another size, or stops answering.
        OSError: the disk is full, or the folder cannot be written to.
    """
    check_url(url)
    part = path.with_name(path.name + '.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url)
    if user:
        token = base64.b64encode(f'{user}:{password}'.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {token}')
    failures, have = 0, part.stat().st_size if part.exists() else 0
    with progress(f'downloading {path.name}', size, 'B') as bar:
        while size is None or have < size:
            before, reason = have, 'the connection was closed early'
            try:
                size = _fetch_rest(request, part, have, size, most, bar)
            except ConnectionError as error:
                reason = str(error)
            have = part.stat().st_size if part.exists() else 0
            failures = 0 if have > before else failures + 1
            if failures == MOST_FAILURES:
                of = '' if size is None else f' of {size:,}'
                raise ValueError(
                    f'{redacted(url)}: {reason}; {have:,}{of} bytes are in {part}. Run the same '
                    'command again to resume'
                )
            time.sleep(min(2**failures - 1, 30))
    if have != size:
        raise ValueError(
            f'{part} has {have:,} bytes, the published file {size:,}: it is another file. '
            f'{files.remedy(part)}'
        )
    os.replace(part, path)


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Makes what may be gone at the next attempt a ConnectionError, and the rest a ValueError.

    The text of a ValueError names the URL.
    """
    try:
        yield
    except urllib.error.HTTPError as error:
        said = f'{error.code} {_one_line(error.reason)}'
        raise ValueError(f'{redacted(url)}: the server says {said}') from error
    except TimeoutError as error:
        raise ConnectionError(f'no byte in {TIMEOUT_SECONDS} seconds') from error
    except (http.client.HTTPException, OSError) as error:
        raise ConnectionError(f'{type(error).__name__}: {_one_line(error)}') from error
    except ValueError as error:  # of a host name that cannot be encoded
        raise ValueError(f'{redacted(url)}: {_one_line(error)}') from error


def _one_line(said: object) -> str:
    """What a server sent, as it can be printed on a terminal."""
    text = ''.join(letter if letter.isprintable() else ' ' for letter in str(said))
    return ' '.join(text.split())[:200]


def _fetch_rest(
    request: urllib.request.Request,
    part: Path,
    have: int,
    size: int | None,
    most: int,
    bar: tqdm,
) -> int:
    """Appends to `part` the bytes that one connection brings; returns the whole file's size."""
    url = request.full_url
    request.add_header('Range', f'bytes={have}-')
    with _network_errors(url):
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    with response:
        have, size = _first_byte_and_size(url, response, have, size, most)
        bar.total = size
        with part.open('r+b' if part.exists() else 'wb') as file:
            file.truncate(have)
            file.seek(have)
            bar.update(have - bar.n)
            while True:
                with _network_errors(url):
                    chunk = response.read1(CHUNK_BYTES)
                if not chunk:
                    return size
                have += len(chunk)
                if have > size:
                    raise ValueError(
                        f'{redacted(url)}: the server sends more than the published {size:,} '
                        f'bytes: it is another file. {files.remedy(part)}'
                    )
                file.write(chunk)
                file.flush()  # A program that is killed has lost nothing then.
                bar.update(len(chunk))


def _first_byte_and_size(
    url: str, response: http.client.HTTPResponse, have: int, size: int | None, most: int
) -> tuple[int, int]:
    """Where in the file a response begins, and the file's size; ValueError if it is another one."""
    if response.status == http.client.PARTIAL_CONTENT:
        header, form = 'Content-Range', rf'bytes {have}-\d+/(\d{{1,19}}|\*)'
    else:  # A server without ranges sends everything from the start.
        have, header, form = 0, 'Content-Length', r'(\d{0,19})'
    announced = response.headers.get(header, '')
    found = re.fullmatch(form, announced, re.ASCII)
    if not found:
        reason = f'asked for the bytes from {have:,} on, the server sends {header} '
        raise ValueError(f'{redacted(url)}: {reason}{announced[:200]!r}')
    stated = int(found[1]) if found[1].isdecimal() else size
    if size not in (None, stated):
        raise ValueError(
            f'{redacted(url)}: the file there has {stated} bytes, the published one {size}'
        )
    if stated is None or (size is None and not 0 < stated <= most):
        raise ValueError(
            f'{redacted(url)}: the server says {header} {announced!r}; it must be 1 to '
            f'{most:,} bytes'
        )
    return have, stated


def check(path: Path, archive: Archive, memory: Path) -> None:
    """Checks that a file is there, and is what was published.

    Hashing 148 GB takes minutes, so `memory`, a JSON file, keeps the files found good with their
    size and time of change. One that is damaged is ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its size or its SHA-256 differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing')
    status = path.stat()
    if status.st_size != archive.size:
        what = 'is truncated' if status.st_size < archive.size else 'is another file'
        raise ValueError(
            f'{path} {what}: it has {status.st_size:,} bytes, published are {archive.size:,}. '
            f'{files.remedy(path)}'
        )
    try:
        found_good = files.read_json(memory)
    except (FileNotFoundError, ValueError):
        found_good = {}
    state = [status.st_size, status.st_mtime_ns, archive.sha256]
    if found_good.get(str(path)) == state:
        return
    digest = hashlib.sha256()
    with path.open('rb') as file, progress(f'checking {path.name}', archive.size, 'B') as bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != archive.sha256:
        raise ValueError(
            f'{path} is damaged: its SHA-256 is {digest.hexdigest()}, published is '
            f'{archive.sha256}. {files.remedy(path)}'
        )
    files.write_json(memory, found_good | {str(path): state})
