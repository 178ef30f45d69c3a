"""A broker that a test starts, and what a cluster has on it for tests that are their own control plane."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mvmci.cluster.broker import ANY_PORT, BrokerSettings, Guard
from mvmci.cluster.identity import Login
from mvmci.errors import StoreUnavailable
from mvmci.roles.broker import check_sync, find_server, prepare, read_ports
from mvmci.store import ClusterSettings
from mvmci.stores.nats.layout import STORE_BYTES, Layout
from mvmci.stores.nats.link import Link
from mvmci.stores.nats.streams import maintain
from mvmci.system.linux import dying_with_us
from tests.harness.ports import own_port

START_S = 60.0
LOOK_EVERY_S = 0.01
STOP_S = 30.0
MONITOR_S = 30.0


@dataclass
class Broker:
    """A server that this process starts, and its folder. `url` is where it answers, once it was started.

    Its port then stays. Without a guard it must sync.
    """

    folder: Path
    settings: BrokerSettings = field(default_factory=BrokerSettings)
    guard: Guard | None = None
    url: str = ""
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises StoreUnavailable, Usage."""
        if self.settings.port == ANY_PORT:  # it comes back there, and nobody else is to have it meanwhile
            port = own_port(self.settings.listen)
            self.settings = msgspec.structs.replace(self.settings, port=port)
        config = prepare(self.folder, self.settings, self.guard)
        with open(self.folder / "nats.log", "ab") as log:  # noqa: ASYNC230 (a local file)
            self.process = await asyncio.create_subprocess_exec(
                find_server(), "-c", config, stdout=log, stderr=log, preexec_fn=dying_with_us()
            )
        try:
            ports = await self._ports(self.process)
            self.url = ports["nats"][0]
            if self.guard is None:
                await asyncio.to_thread(check_monitor, ports["monitoring"][0])
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

    async def _ports(self, process: asyncio.subprocess.Process) -> dict[str, list[str]]:
        """Where it listens, as it wrote down once it did."""
        for _ in range(int(START_S / LOOK_EVERY_S)):
            if process.returncode is not None:
                break
            ports = read_ports(self.folder, process.pid)
            if ports:
                return ports
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


def check_monitor(monitor: str) -> None:
    """Ask an unguarded server whether it syncs. Raises StoreUnavailable."""
    host, _, port = monitor.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=MONITOR_S)
    try:
        connection.request("GET", "/varz")
        told = json.loads(connection.getresponse().read())
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"nats-server does not tell about itself at {monitor}") from error
    finally:
        connection.close()
    check_sync(told)


async def ensure(
    login: Login | str, cluster: str, *, store_bytes: int = STORE_BYTES, queues: Sequence[str] = ()
) -> None:
    """Make what `cluster` has on its broker, within `store_bytes`. Raises as `Cluster.maintain`."""
    link = Link(login, f"{cluster}/ensure")
    await link.open()
    try:
        await maintain(link, Layout(cluster), ClusterSettings(store_bytes=store_bytes), queues)
    finally:
        await link.close()
