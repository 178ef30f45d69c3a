"""A server outside of the cluster, which counts what it is asked for."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Server:
    """Counts what it is asked for. `on_request` is called before it answers."""

    url: str
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, idempotency key
    on_request: Callable[[str], None] = lambda path: None

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def count(self, path: str) -> int:
        return self.paths().count(path)

    @property
    def allow(self) -> tuple[str, str]:
        return "--allow-http", f"{self.url}/*"


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[Server]:
    """A server outside, at an address of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.requests.append((self.path, self.headers.get("Idempotency-Key")))
            seen.on_request(self.path)
            body = json.dumps({"path": self.path, "number": len(seen.requests)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                pass  # the client was killed

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Quiet((host, 0), Handler) as listening:
        seen = Server(f"http://{host}:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield seen
        finally:
            listening.shutdown()
            thread.join()
