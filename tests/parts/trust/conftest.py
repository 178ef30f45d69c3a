"""A cluster's broker in operator mode, on the loopback without TLS and beyond it with TLS."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from mvmci.cluster.broker import LOOPBACK, BrokerSettings
from mvmci.cluster.deployment import Unit, UnitConfig
from mvmci.cluster.identity import Identity, Login, Ticket, TicketRole, UnitRole
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.system.files import write_private
from mvmci.trust.authority import Authority
from mvmci.trust.enrol.server import EnrolmentServer
from mvmci.trust.provision import ControlPlaneConfig, make_config, read_config
from mvmci.trust.registry import make_ticket, push_accounts
from tests.harness.broker import Broker, ensure
from tests.harness.waiting import LONG_S

CLUSTER = "demo"
STORE_BYTES = 256 << 20
QUEUES = ("default", "other")
EVERYWHERE = "0.0.0.0"


@dataclass
class World:
    """A cluster: its keys, its broker, and a control plane that lets machines in."""

    folder: Path
    authority: Authority
    broker: Broker
    stack: AsyncExitStack
    enrolments: list[EnrolmentServer] = field(default_factory=list)

    @property
    def base(self) -> Login:
        """How anybody reaches the broker, by its loopback address."""
        port = self.broker.settings.port
        return self.authority.login(
            [f"nats://{LOOPBACK}:{port}"], tls=self.broker.settings.listen != LOOPBACK
        )

    def unit(self, name: str, role: UnitRole, *queues: str) -> Identity:
        """A unit of `up`."""
        path = self.folder / "units" / name / "identity.json"
        return self.authority.identity(name, role, queues, self.base, path)

    async def link(self, login: Login) -> Link:
        link = Link(login, "test")
        await link.open()
        self.stack.push_async_callback(link.close)
        return link

    async def open(self, identity: Identity, *, announce: bool = True, maintains: bool = False) -> Cluster:
        cluster = await open_cluster(identity, announce=announce, maintains=maintains)
        self.stack.push_async_callback(cluster.close)
        return cluster

    async def admin(self) -> Cluster:
        return await self.open(self.authority.admin(self.base), announce=False)

    def plane(self, name: str = "control-plane-1", generation: int = 0) -> ControlPlaneConfig:
        """What `up` gives a control plane."""
        unit = Unit(name=name, role="control-plane", host="local")
        config = UnitConfig(unit=unit, dial=self.base.urls, generation=generation)
        file = self.folder / "units" / name / "config.json"
        there = file.read_bytes() if file.exists() else b""
        data = make_config(config, self.authority, there, keys_in=self.authority.folder)
        assert data is not None
        write_private(file, data)
        return msgspec.structs.replace(read_config(file, ControlPlaneConfig), login=self.base)

    async def control_plane(
        self, name: str = "control-plane-1", plane: ControlPlaneConfig | None = None, **more: Any
    ) -> EnrolmentServer:
        """One that serves until the end of the test, as soon as the broker knows of it."""
        plane = plane or self.plane(name)
        await self.push()
        identity = plane.identity(self.folder / "units" / name / "identity.json")
        cluster = await self.open(identity, maintains=True)
        enrolment = EnrolmentServer(
            cluster, plane.signer(), plane.trusted(), certifier=plane.certifier(), **more
        )
        await enrolment.start()
        self.stack.push_async_callback(enrolment.close)
        return enrolment

    async def push(self) -> None:
        """What `up` does when it has given units their files."""
        admin = await open_cluster(self.authority.admin(self.base), announce=False)
        try:
            await push_accounts(admin.config, self.authority, self.base)
        finally:
            await admin.close()

    async def ticket(
        self, role: TicketRole = "worker", *queues: str, uses: int = 1, ttl_s: float = 3600
    ) -> Ticket:
        admin = await self.admin()
        return await make_ticket(
            admin.config, self.authority, self.base, role=role, queues=queues, uses=uses, ttl_s=ttl_s
        )

    async def restart(self) -> None:
        """Kill -9, and start again."""
        await self.broker.kill()
        await self.broker.start()


@pytest.fixture
def listen() -> str:
    """Where the broker listens; a test that wants TLS says otherwise."""
    return LOOPBACK


@pytest.fixture
def synced() -> bool:
    """Whether the broker syncs each write; a test that writes very much says otherwise."""
    return True


@pytest.fixture
async def world(tmp_path: Path, listen: str, synced: bool) -> AsyncIterator[World]:
    folder = tmp_path / "state" / CLUSTER
    authority = Authority.create(folder)
    broker = Broker(folder / "broker", BrokerSettings(listen=listen, synced=synced), authority.guard())
    await broker.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.stop)
        world = World(folder, authority, broker, stack)
        admin = authority.admin(world.base)
        await ensure(admin.login, CLUSTER, store_bytes=STORE_BYTES, queues=QUEUES)
        yield world


async def until_refused(link: Link) -> None:
    """Until the broker has cut `link` off for good."""
    async with asyncio.timeout(LONG_S):
        await link.refused.wait()


class Plain:
    """A client of somebody who knows NATS and has a credential, and what the broker told it."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self.client = Client()
        self.reply: list[str] = []

    async def open(self) -> Plain:
        async def hear(error: Exception) -> None:
            self.reply.append(str(error))

        await self.client.connect(
            list(self.login.urls),
            user_jwt_cb=lambda: self.login.jwt.encode(),
            signature_cb=lambda nonce: base64.b64encode(keys.sign(self.login.seed, nonce.encode())),
            inbox_prefix=self.login.inbox,
            error_cb=hear,
            allow_reconnect=False,
        )
        return self

    async def refusals(self, publish: Iterable[str] = (), subscribe: Iterable[str] = ()) -> set[str]:
        """Which of these the broker refuses."""
        self.reply.clear()
        tried = [("publish to", subject) for subject in publish]
        tried += [("subscription to", subject) for subject in subscribe]
        for kind, subject in tried:
            if kind == "publish to":
                await self.client.publish(subject, b"x")
            else:
                await self.client.subscribe(subject)
        await self.client.flush()
        await self.client.flush()  # the first one's ping may overtake what was published before it
        told = "\n".join(self.reply)
        return {subject for kind, subject in tried if f'violation for {kind} "{subject.lower()}"' in told}


@pytest.fixture
async def plain(world: World) -> Any:
    opened: list[Plain] = []

    async def open_plain(login: Login) -> Plain:
        opened.append(await Plain(login).open())
        return opened[-1]

    yield open_plain
    for one in opened:
        await one.client.close()
