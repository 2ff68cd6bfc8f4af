"""Real HTTP on 127.0.0.1, served by threads for as long as a `with` block lasts."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: Any

    def shutdown_request(self, request: socket.socket) -> None:
        request.close()  # without the polite shutdown: what SO_LINGER says counts

    def handle_error(self, request: object, address: object) -> None:
        pass  # the client went away


class Loopback:
    """The base of a hub; its handler finds it as `self.server.hub`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        self.server = Server(("127.0.0.1", 0), handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
