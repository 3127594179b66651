# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine that breaks its connections, for the tests of downloads."""

import http.server
import threading
from collections.abc import Mapping


class RangeServer:
    """Serves files by the last part of their address.

    Args:
        content: the files by name; or one, which every address then has.
        breaks: the bytes after which the first connections are cut.
        ranges: whether it knows the header `Range`.
    """

    def __init__(
        self, content: bytes | Mapping[str, bytes], breaks: list[int], ranges: bool = True
    ):
        requests = self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append((self.headers['Range'], self.headers['Authorization']))
                first = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
                first = first if ranges else 0
                name = self.path.rsplit('/', 1)[-1]
                file = content if isinstance(content, bytes) else content[name]
                self.send_response(206 if ranges else 200)
                self.send_header('Content-Length', str(len(file) - first))
                self.end_headers()
                body = file[first:]
                self.wfile.write(body[: breaks.pop(0)] if breaks else body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}/folder'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
