"""A cluster's broker in operator mode, on the loopback without TLS and beyond it with TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mvmci.cluster.broker import LOOPBACK, BrokerSettings
from mvmci.cluster.identity import Identity, Login, Ticket, TicketRole, UnitRole
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.link import Link
from mvmci.trust.authority import Authority
from mvmci.trust.enrol.server import EnrolmentServer
from mvmci.trust.registry import make_ticket
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

    async def control_plane(self, name: str = "control-plane-1") -> EnrolmentServer:
        """One that serves until the end of the test."""
        cluster = await self.open(self.unit(name, "control-plane"), maintains=True)
        enrolment = EnrolmentServer(cluster, self.authority)
        await enrolment.start()
        self.stack.push_async_callback(enrolment.close)
        return enrolment

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
async def world(tmp_path: Path, listen: str) -> AsyncIterator[World]:
    folder = tmp_path / "state" / CLUSTER
    authority = Authority.create(folder)
    broker = Broker(folder / "broker", BrokerSettings(listen=listen), authority.guard())
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
