"""A server outside of mvmci that answers the example workflow and counts what it was asked for.

`demo_server.py [PORT]` prints its port and serves until it is killed; `demo_server.py --counts URL` prints
the counts of a running one, and fails if any request came twice.
"""

import json
import sys
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

counts: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    """Answers everything with a build number."""

    def answer(self) -> None:
        """Count the request and answer it."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/counts":
            body = json.dumps(counts).encode()
        else:
            counts[f"{self.command} {self.path}"] += 1
            body = b'{"number": 42}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve, or ask a server for its counts."""
    if sys.argv[1:2] == ["--counts"]:
        with urllib.request.urlopen(f"{sys.argv[2]}/counts") as answer:
            seen = json.load(answer)
        for request, times in seen.items():
            print(f"{request}: {times} time{'s' if times != 1 else ''}")
        sys.exit(any(times != 1 for times in seen.values()))
    port = int(sys.argv[1]) if sys.argv[1:] else 0
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(server.server_port, flush=True)
    sys.stdout.close()
    server.serve_forever()


main()
