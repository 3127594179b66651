# SPDX-License-Identifier: Apache-2.0
"""Large public files: downloads that resume, checked against the published size and SHA-256."""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data_preparation import files

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
FRUITLESS_ATTEMPTS = 5  # attempts in a row that bring no byte, before a download gives up


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
    """Checks an address before it is used.

    Raises:
        ValueError: it is not an http or https URL, or has a password in it, which other users of
            the machine could see.
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


def download(url: str, path: Path, size: int, user: str = '', password: str = '') -> None:
    """Fetches `url` to `path`, resuming where an earlier attempt stopped.

    The bytes gather in `path` + '.part', which gets its final name once it has `size` bytes. A
    connection that breaks is opened again as long as every few attempts bring something. Name and
    password go to the host of `url` alone, never to where it redirects.

    Raises:
        ValueError: the server sends an error or a file of another size, or does not answer any
            more.
        OSError: the disk is full, or the folder cannot be written to.
    """
    check_url(url)
    part = path.with_name(path.name + '.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    fruitless = 0
    with progress(f'downloading {path.name}', size, 'B') as bar:
        while (have := part.stat().st_size) < size:
            reason = 'the connection was closed early'
            try:
                _fetch_rest(url, part, size, bar, user, password)
            except ConnectionError as error:
                reason = str(error)
            fruitless = 0 if part.stat().st_size > have else fruitless + 1
            if fruitless == FRUITLESS_ATTEMPTS:
                raise ValueError(
                    f'{redacted(url)}: {reason}; {part.stat().st_size:,} of {size:,} bytes are in '
                    f'{part}. Run the same command again to resume'
                )
            time.sleep(min(2**fruitless - 1, 30))
    if have != size:
        raise ValueError(
            f'{part} has {have:,} bytes, the published file {size:,}: it is another file. '
            f'Delete it: rm {shlex.quote(str(part))}'
        )
    os.replace(part, path)


@contextlib.contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Turns what the network raises into ConnectionError, and what the server says into ValueError.

    Of the two, only a ConnectionError may be gone at the next attempt. The text of a ValueError
    names the URL.
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


def _fetch_rest(url: str, part: Path, size: int, bar: tqdm, user: str, password: str) -> None:
    """Appends to `part` what one connection brings of the bytes it does not have."""
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'})
    if user:
        token = base64.b64encode(f'{user}:{password}'.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {token}')
    with network_errors(url):
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    with response:
        have = _first_byte(url, response, have, size)
        with part.open('r+b') as file:
            file.truncate(have)
            file.seek(have)
            bar.update(have - bar.n)
            while True:
                with network_errors(url):
                    chunk = response.read1(CHUNK_BYTES)
                if not chunk:
                    return
                have += len(chunk)
                if have > size:
                    raise ValueError(
                        f'{redacted(url)}: the server sends more than the published {size:,} '
                        f'bytes: it is another file. Delete it: rm {shlex.quote(str(part))}'
                    )
                file.write(chunk)
                file.flush()  # A program that is killed has lost nothing then.
                bar.update(len(chunk))


def _first_byte(url: str, response: http.client.HTTPResponse, have: int, size: int) -> int:
    """Where in the file a response begins; ValueError if it is not the file of `size` bytes."""
    if response.status == http.client.PARTIAL_CONTENT:
        announced = response.headers.get('Content-Range', '')
        rest = re.fullmatch(rf'bytes {have}-\d+/(\d+|\*)', announced)
        if not rest:
            raise ValueError(
                f'{redacted(url)}: asked for the bytes from {have:,} on, the server sends '
                f'{announced[:200]!r}'
            )
        first, total = have, rest[1]
    else:  # A server without ranges sends everything from the start.
        first, total = 0, response.headers.get('Content-Length', '*')
    if total.isdecimal() and total.lstrip('0') != str(size):
        raise ValueError(
            f'{redacted(url)}: the file there has {total[:20]} bytes, the published one {size}'
        )
    return first


def check(path: Path, archive: Archive, memory: Path) -> None:
    """Checks that a file is there, and is what was published.

    Hashing 148 GB takes minutes, so `memory`, a JSON file, keeps the files found good with their
    size and time of change. A memory that is damaged is as good as none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its size or its SHA-256 differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing')
    again = f'Delete it and get it again: rm {shlex.quote(str(path))}'
    status = path.stat()
    if status.st_size != archive.size:
        what = 'is truncated' if status.st_size < archive.size else 'is another file'
        raise ValueError(
            f'{path} {what}: it has {status.st_size:,} bytes, published are {archive.size:,}. '
            f'{again}'
        )
    try:
        found_good = dict(files.read_json(memory))
    except (FileNotFoundError, ValueError, TypeError):
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
            f'{archive.sha256}. {again}'
        )
    memory.write_text(json.dumps(found_good | {str(path): state}))


def progress(text: str, total: int, unit: str, done: int = 0) -> tqdm:
    """A bar with the time left on a terminal, and a line now and then in a file; after two seconds.

    Args:
        text: what is being done.
        total: how many `unit`s there are.
        unit: 'B' for bytes, which are scaled, or the name of another thing.
        done: how many were done before and took no time.
    """
    interval = 0.2 if sys.stderr.isatty() else 60
    return tqdm(
        desc=text,
        total=total,
        initial=done,
        delay=2,
        unit=unit,
        unit_scale=unit == 'B',
        mininterval=interval,
        maxinterval=2 * interval,
    )
