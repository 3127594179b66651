# SPDX-License-Identifier: Apache-2.0
"""Web servers on this machine that misbehave, for the tests of downloads."""

import contextlib
import http.server
import socketserver
import threading
from collections.abc import Iterable, Mapping


class _Server:
    """A server in a thread of its own, as a context manager."""

    def __init__(self, kind: type[socketserver.TCPServer], handler):
        self.server = kind(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}/folder'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class RangeServer(_Server):
    """Serves files by the last part of their address.

    Args:
        content: the files by name; or one, which every address then has.
        breaks: the bytes after which the first connections are cut.
        ranges: whether it knows the header `Range`.
    """

    def __init__(
        self, content: bytes | Mapping[str, bytes], breaks: list[int], ranges: bool = True
    ):
        requests: list[tuple] = []
        self.requests = requests

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append((self.headers['Range'], self.headers['Authorization']))
                first = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
                first = first if ranges else 0
                name = self.path.rsplit('/', 1)[-1]
                file = content if isinstance(content, bytes) else content[name]
                self.send_response(206 if ranges else 200)
                if ranges:
                    self.send_header('Content-Range', f'bytes {first}-{len(file) - 1}/{len(file)}')
                self.send_header('Content-Length', str(len(file) - first))
                self.end_headers()
                body = file[first:]
                self.wfile.write(body[: breaks.pop(0)] if breaks else body)

            def log_message(self, *_):
                pass

        super().__init__(http.server.ThreadingHTTPServer, Handler)


class RawServer(_Server):
    """Answers every request with the same bytes, whatever they are, and then closes or hangs.

    `requests` has what was asked.
    """

    def __init__(self, answer: Iterable[bytes], hangs: bool = False):
        requests: list[tuple] = []
        self.requests = requests
        over = self._over = threading.Event()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                requests.append(self.request.recv(1 << 16).decode())
                with contextlib.suppress(OSError):  # The client may have had enough.
                    for piece in answer:
                        self.request.sendall(piece)
                if hangs:
                    over.wait(10)

        super().__init__(socketserver.ThreadingTCPServer, Handler)

    def __exit__(self, *args):
        self._over.set()
        super().__exit__(*args)
