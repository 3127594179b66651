# SPDX-License-Identifier: Apache-2.0
"""Downloads and checksums: resumed, bounded, and every failure named."""

import hashlib
import os

import numpy as np
import pytest

from data_preparation import archives
from tests.range_server import RangeServer


@pytest.mark.parametrize('ranges', [True, False])
def test_a_broken_connection_is_taken_up_again(tmp_path, ranges):
    content = np.random.default_rng(0).bytes(3_000_000)
    with RangeServer(content, [1_000_000, 500_000], ranges) as server:
        archives.download(f'{server.url}/file', tmp_path / 'file', len(content), 'me', 'secret')
    assert (tmp_path / 'file').read_bytes() == content
    starts = [0, 1_000_000, 1_500_000 if ranges else 500_000]
    assert [wanted for wanted, _ in server.requests] == [f'bytes={start}-' for start in starts]
    assert {a for _, a in server.requests} == {'Basic bWU6c2VjcmV0'}
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


def test_a_download_that_gets_nowhere_ends_and_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.time, 'sleep', lambda _: None)
    with (
        RangeServer(b'x' * 1000, [400] + [0] * 10) as server,
        pytest.raises(ValueError, match=r'400 of 1,000 bytes are in .*file.part. Run the same command again'),
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
