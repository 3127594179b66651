# SPDX-License-Identifier: Apache-2.0
"""Downloads and checksums: resumed, bounded, and every failure named."""

import hashlib
import itertools
import json
import os

import numpy as np
import pytest

from data_preparation import archives
from tests.range_server import RangeServer, RawServer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(archives.time, 'sleep', lambda _: None)


@pytest.mark.parametrize('ranges', [True, False])
def test_a_broken_connection_is_resumed(tmp_path, ranges):
    content = np.random.default_rng(0).bytes(3_000_000)
    with RangeServer(content, [1_000_000, 500_000], ranges) as server:
        archives.download(f'{server.url}/file', tmp_path / 'file', len(content), 'me', 'secret')
    assert (tmp_path / 'file').read_bytes() == content
    starts = [0, 1_000_000, 1_500_000 if ranges else 500_000]
    assert [wanted for wanted, _ in server.requests] == [f'bytes={start}-' for start in starts]
    assert {a for _, a in server.requests} == {'Basic bWU6c2VjcmV0'}
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


def test_a_download_that_gets_nowhere_ends_and_keeps_what_it_has(tmp_path):
    with (
        RangeServer(b'x' * 1000, [400] + [0] * 10) as server,
        pytest.raises(
            ValueError, match=r'400 of 1,000 bytes are in .*file.part. Run the same command again'
        ),
    ):
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)
    assert not (tmp_path / 'file').exists()


def test_an_archive_found_good_is_not_read_again_until_it_changes(tmp_path):
    path, memory = tmp_path / 'file', tmp_path / 'memory.json'
    path.write_bytes(b'content')
    archive = archives.Archive('file', 7, hashlib.sha256(b'content').hexdigest())
    archives.check(path, archive, memory)
    state = path.stat()
    path.write_bytes(b'CONTENT')
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    archives.check(path, archive, memory)  # unread, so the change is not seen
    path.touch()
    with pytest.raises(ValueError, match=r'SHA-256'):
        archives.check(path, archive, memory)


def test_a_download_stops_at_the_published_size_whatever_the_server_sends(tmp_path):
    answer = [b'HTTP/1.1 200 OK\r\n\r\n', *itertools.repeat(b'x' * 100_000, 50)]
    with (
        RawServer(answer) as server,
        pytest.raises(ValueError, match=r'more than the published 300,000 bytes.*rm .*file.part'),
    ):
        archives.download(f'{server.url}/file', tmp_path / 'file', 300_000)
    assert (tmp_path / 'file.part').stat().st_size <= 300_000


@pytest.mark.parametrize('size', [999, 1001])
@pytest.mark.parametrize('ranges', [True, False])
def test_a_file_of_another_size_is_rejected_and_the_fetched_part_kept(tmp_path, ranges, size):
    (tmp_path / 'file.part').write_bytes(b'y' * 500)
    with (
        RangeServer(b'x' * size, [], ranges) as server,
        pytest.raises(
            ValueError, match=rf'the file there has {size} bytes, the published one 1000'
        ),
    ):
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)
    assert (tmp_path / 'file.part').read_bytes() == b'y' * 500


@pytest.mark.parametrize('header', ['', 'Content-Range: bytes 0-999/1000\r\n'])
def test_another_range_than_asked_for_is_rejected(tmp_path, header):
    (tmp_path / 'file.part').write_bytes(b'y' * 500)
    answer = f'HTTP/1.1 206 Partial Content\r\n{header}\r\n'.encode() + b'x' * 500
    with (
        RawServer([answer]) as server,
        pytest.raises(ValueError, match=r'asked for the bytes from 500 on, the server sends'),
    ):
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)
    assert (tmp_path / 'file.part').read_bytes() == b'y' * 500


def test_a_server_that_announces_no_size_is_enough(tmp_path):
    with RawServer([b'HTTP/1.0 200 OK\r\n\r\n' + b'x' * 1000]) as server:
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)
    assert (tmp_path / 'file').read_bytes() == b'x' * 1000


@pytest.mark.parametrize(
    ('answer', 'said'),
    [
        (b'', 'RemoteDisconnected'),
        (b'nonsense\r\n\r\n', 'BadStatusLine'),
        (b'\xff' * 100_000, 'LineTooLong'),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n', 'IncompleteRead'),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n', 'closed early'),
        (b'HTTP/1.1 200 OK\r\n' + b'A: b\r\n' * 200 + b'\r\n', 'HTTPException'),
        (b'HTTP/1.1 401 Unauthorized\r\n\r\n', '401 Unauthorized'),
        (b'HTTP/1.1 404 Not Found\r\n\r\n', '404 Not Found'),
        (b'HTTP/1.1 500 Oh \x1b[1mno\r\n\r\n', '500 Oh'),
        (b'HTTP/1.1 302 Found\r\nLocation: /folder/file\r\n\r\n', 'infinite loop'),
        (b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n', 'not allowed'),
        (
            b'HTTP/1.1 302 Found\r\nLocation: http://a..b/\r\n\r\n',
            'idna|label empty|resolution|known',
        ),
    ],
)
def test_what_a_server_does_wrong_is_said_with_the_url(tmp_path, answer, said):
    with RawServer([answer]) as server, pytest.raises(ValueError, match=said) as caught:
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)
    assert f'{server.url}/file' in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_server_that_is_not_there_is_named(tmp_path):
    with RawServer([]) as server:
        pass
    with pytest.raises(ValueError, match=rf'{server.url}/file: .*Connection refused'):
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)


@pytest.mark.parametrize('start', [b'', b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nxx'])
def test_a_server_that_hangs_is_given_up(tmp_path, monkeypatch, start):
    monkeypatch.setattr(archives, 'TIMEOUT_SECONDS', 0.05)
    with (
        RawServer([start], hangs=True) as server,
        pytest.raises(ValueError, match=r'no byte in 0.05 seconds'),
    ):
        archives.download(f'{server.url}/file', tmp_path / 'file', 1000)


@pytest.mark.parametrize(
    'url',
    [
        'http://me:secret@127.0.0.1:1/file',
        'https://me:sec/ret@host/file',
        'http://me:sec?ret@host/file',
        'me:secret@host/file',
        'http://host:port/file',
        'http://host:99999/file',
        'http://[::1/file',
        'http://host/a file',
        'http://host/b\u00fccher',
        'http://host/a\nfile',
        'http:///file',
        'file:///etc/passwd',
        'ftp://host/file',
        'host/file',
        '',
    ],
)
def test_an_unusable_url_is_rejected_before_anything_is_written(tmp_path, url):
    with pytest.raises(ValueError, match=r'cannot be downloaded: it must be a URL') as caught:
        archives.download(url, tmp_path / 'folder' / 'file', 1000, 'me', 'secret')
    assert not list(tmp_path.iterdir())
    assert not any(part in str(caught.value) for part in ('secret', 'sec/ret', 'sec?ret', 'me:'))


def test_name_and_password_are_not_sent_where_a_server_redirects(tmp_path):
    with RangeServer(b'x' * 1000, []) as other:
        location = f'HTTP/1.1 302 Found\r\nLocation: {other.url}/file\r\n\r\n'
        with RawServer([location.encode()]) as server:
            archives.download(f'{server.url}/file', tmp_path / 'file', 1000, 'me', 'secret')
    assert 'Authorization: Basic' in server.requests[0]
    assert other.requests == [('bytes=0-', None)]


@pytest.mark.parametrize('content', ['', '{', 'null', '[]', '[1]', '5', '{"x": 1}', '[' * 100_000])
def test_a_damaged_memory_of_checks_costs_only_time(tmp_path, content):
    path, memory = tmp_path / 'file', tmp_path / 'checked.json'
    path.write_bytes(b'content')
    memory.write_text(content)
    archive = archives.Archive('file', 7, hashlib.sha256(b'content').hexdigest())
    archives.check(path, archive, memory)
    assert str(path) in json.loads(memory.read_text())
