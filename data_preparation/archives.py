# SPDX-License-Identifier: Apache-2.0
"""Large public files: fetched with resume, and checked against their published size and SHA-256."""

import base64
import dataclasses
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
FRUITLESS_ATTEMPTS = 5  # attempts in a row that bring no byte, before a download gives up


@dataclasses.dataclass(frozen=True)
class Archive:
    """What is published about a file: its name, its size in bytes and its SHA-256 in hex."""

    file_name: str
    size: int
    sha256: str


def download(url: str, path: Path, size: int, user: str = '', password: str = '') -> None:
    """Fetches `url` to `path`, going on where an earlier attempt stopped.

    The bytes gather in `path` + '.part', which gets its final name once it has `size` bytes. A
    connection that breaks is taken up again as long as every few attempts bring something.

    Raises:
        ValueError: the server refuses, sends another size, or does not answer any more.
    """
    part = path.with_name(path.name + '.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    fruitless = 0
    with progress(f'downloading {path.name}', size, 'B') as bar:
        while (have := part.stat().st_size) < size:
            try:
                _fetch_rest(url, part, bar, user, password)
                reason = 'the connection was closed early'
            except urllib.error.HTTPError as error:
                raise ValueError(f'{url}: the server says {error.code} {error.reason}') from error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
                reason = str(error)
            except TimeoutError:
                reason = f'no byte in {TIMEOUT_SECONDS} seconds'
            fruitless = 0 if part.stat().st_size > have else fruitless + 1
            if fruitless == FRUITLESS_ATTEMPTS:
                raise ValueError(
                    f'{url}: {reason}; {part.stat().st_size:,} of {size:,} bytes are kept in '
                    f'{part}, and the same command goes on from there'
                )
            time.sleep(min(2**fruitless - 1, 30))
    if have != size:
        raise ValueError(f'{part} has {have:,} bytes, not {size:,}: not the file; delete it')
    os.replace(part, path)


def _fetch_rest(url: str, part: Path, bar: tqdm, user: str, password: str) -> None:
    """Appends to `part` what one connection brings of the bytes it does not have."""
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'})
    if user:
        token = base64.b64encode(f'{user}:{password}'.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {token}')
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        # A server that knows no ranges answers 200 and sends everything from the start.
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        with part.open('r+b') as file:
            file.truncate(have)
            file.seek(have)
            bar.update(have - bar.n)
            while chunk := response.read1(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))


def check(path: Path, archive: Archive, memory: Path) -> None:
    """Checks that a file is there, and is what was published.

    Hashing 148 GB takes minutes, so `memory`, a JSON file, keeps the files found good with their
    size and time of change.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its size or its SHA-256 is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing. Put the archive there, or name the folder that has it with '
            '--archives_dir, or an address to fetch it from with --url'
        )
    status = path.stat()
    if status.st_size != archive.size:
        fault = 'is truncated' if status.st_size < archive.size else 'is another file'
        raise ValueError(f'{path} {fault}: it has {status.st_size:,} of {archive.size:,} bytes')
    found_good = json.loads(memory.read_text()) if memory.exists() else {}
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
            f'{archive.sha256}. Delete it and fetch it again'
        )
    memory.write_text(json.dumps(found_good | {str(path): state}))


def progress(text: str, total: int, unit: str, done: int = 0) -> tqdm:
    """A bar with the time left on a terminal, and a line now and then in a file.

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
        unit=unit,
        unit_scale=unit == 'B',
        mininterval=interval,
        maxinterval=2 * interval,
    )
