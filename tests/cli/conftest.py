"""One home and one state directory for the whole run, so that each guest is compiled once.

Tests take ids of their own. A test that looks at what a state directory holds takes `alone`.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.cli.program import Mvmci

IN_CI = os.environ.get("CI") == "true"
ROOT = Path(__file__).resolve().parent.parent.parent


def need(condition: object, reason: str) -> None:
    """Skips at home; fails where everything is to be there."""
    if not condition:
        pytest.fail(reason) if IN_CI else pytest.skip(reason)


@pytest.fixture(scope="session")
def zipapp() -> Path:
    path = Path(os.environ.get("MVMCI_ZIPAPP", ROOT / "dist" / "mvmci.pyz")).resolve()
    need(path.exists(), "no zipapp: build it with ./just zipapp")
    return path


@pytest.fixture(scope="session")
def mvmci(zipapp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mvmci]:
    """The program with the state directory that tests share."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache").mkdir()
    mvmci = Mvmci(zipapp, home / "state", home)
    yield mvmci
    mvmci.assert_nothing_runs()


@pytest.fixture
def alone(mvmci: Mvmci, tmp_path: Path) -> Mvmci:
    """The program with an empty state directory."""
    return replace(mvmci, state=tmp_path / "state")


@pytest.fixture
def with_code(alone: Mvmci, mvmci: Mvmci, script: Path) -> Mvmci:
    """The program with a state directory of its own that has `script` compiled, as a copy."""
    if not (mvmci.state / "_host" / "code").is_dir():
        assert mvmci("run", script, "--input", '{"steps": []}').code == 0
    copy_code(mvmci.state, alone.state)
    return alone


def copy_code(there: Path, here: Path) -> None:
    """Take the compiled code along to another state directory; the key that vouches for it too."""
    (here / "_host").mkdir(parents=True, mode=0o711)
    shutil.copytree(there / "_host" / "code", here / "_host" / "code")
    shutil.copy2(there / "_host" / "code.key", here / "_host" / "code.key")


def _guest(name: str) -> Path:
    path = ROOT / "dist" / "guests" / f"{name}.wasm"
    need(path.exists(), "no guests: build them with ./just examples")
    return path


@pytest.fixture(scope="session")
def guest() -> Callable[[str], Path]:
    """The path of a guest by its name."""
    return _guest


@pytest.fixture(scope="session")
def script() -> Path:
    """The workflow that does what its input says."""
    return _guest("script")


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory where every user may write: what programs do there can be counted."""
    directory = Path(tempfile.mkdtemp(prefix="mvmci-test-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


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


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


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
