"""A server outside of mvmci that answers the example workflow and counts what it was asked for.

`demo_server.py [PORT]` prints its port and serves until it is killed. With `--hold PATH` it leaves requests
for PATH unanswered until it is told to go on, and prints the first of them as it comes: whoever started it
can do something meanwhile, however long that takes. `--release URL` tells a running one to go on; `/counts`
has how often it did each request.
"""

import argparse
import json
import socket
import threading
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

counts: Counter[str] = Counter()
released = threading.Event()
told = threading.Lock()  # taken by the first request that is held


class Handler(BaseHTTPRequestHandler):
    """Answers everything with a build number."""

    held = ""  # the path that has to wait

    def answer(self) -> None:
        """Count the request and answer it; one whose sender is gone when its turn comes is not done."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        body = b'{"number": 42}'
        if self.path == "/counts":
            body = json.dumps(counts).encode()
        elif self.path == "/release":
            released.set()
        else:
            if self.path == self.held and not released.is_set():
                if told.acquire(blocking=False):
                    print(request, flush=True)
                released.wait()
                if self.is_gone():
                    return
            counts[request] += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer

    def is_gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve, or tell a running server something."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=0)
    parser.add_argument("--hold", default="", metavar="PATH")
    parser.add_argument("--release", metavar="URL")
    options = parser.parse_args()
    if options.release:
        urllib.request.urlopen(f"{options.release}/release").close()
    else:
        Handler.held = options.hold
        server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
        print(server.server_port, flush=True)
        server.serve_forever()


main()
