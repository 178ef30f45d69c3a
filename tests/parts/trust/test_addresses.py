"""A broker at several addresses, of which most are silent, refuse, or are somebody else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.broker import LOOPBACK
from mvmci.errors import StoreUnavailable, TicketRefused
from mvmci.stores.nats import dial
from mvmci.stores.nats.link import Link
from mvmci.trust.authority import Authority, read_identity
from mvmci.trust.enrol.client import remember_address
from tests.harness.broker import Broker
from tests.harness.ports import own_port
from tests.harness.waiting import LONG_S
from tests.parts.trust.conftest import EVERYWHERE, World


@asynccontextmanager
async def listening(says: bytes) -> AsyncIterator[int]:
    """Somebody who takes every connection, and says so much and no more; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, LOOPBACK, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def ports() -> AsyncIterator[list[int]]:
    """Those of nobody who could be the broker: at the last one nobody listens."""
    async with AsyncExitStack() as stack:
        silent = await stack.enter_async_context(listening(b""))
        stranger = await stack.enter_async_context(listening(b"HTTP/1.1 400 Bad Request\r\n"))
        yield [silent, stranger, own_port()]


@pytest.fixture(params=[LOOPBACK, EVERYWHERE], ids=["plain", "tls"])
def listen(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def url(world: World) -> Callable[[int], str]:
    scheme = "tls" if world.broker.settings.listen == EVERYWHERE else "nats"
    return lambda port: f"{scheme}://{LOOPBACK}:{port}"


async def test_the_address_that_answers_is_found_among_others_and_remembered(
    world: World, ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "ANSWER_S", LONG_S)  # nobody who is silent is waited for
    good = world.broker.settings.port
    urls = tuple(map(url(world), [*ports, good]))
    identity = world.unit("worker-1", "worker", "default")
    identity = msgspec.structs.replace(identity, login=msgspec.structs.replace(identity.login, urls=urls))
    link = await world.link(identity.login)
    assert link.login.urls == (urls[-1], *urls[:-1])
    kept = remember_address(link, identity, tmp_path / "identity.json")
    assert kept.login.urls[0] == urls[-1]
    assert read_identity(tmp_path / "identity.json") == kept
    back = asyncio.Event()
    link.on_reconnect.append(back.set)
    monkeypatch.undo()  # dialled before it is up, only the silent are there to wait for
    await world.restart()
    async with asyncio.timeout(LONG_S):
        await back.wait()


async def test_where_only_others_answer_it_is_said_who_was_asked(world: World, ports: list[int]) -> None:
    identity = world.unit("worker-1", "worker", "default")
    login = msgspec.structs.replace(identity.login, urls=tuple(map(url(world), ports)))
    with pytest.raises(StoreUnavailable, match="no broker answers at "):
        await Link(login, "test").open()


@pytest.mark.parametrize("listen", [EVERYWHERE], indirect=True)
async def test_the_broker_of_another_cluster_is_passed_over_and_said_where_it_is_all_there_is(
    world: World, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other" / "demo")
    stranger = Broker(tmp_path / "broker", world.broker.settings, other.guard())
    stranger.settings = msgspec.structs.replace(stranger.settings, port=-1)
    await stranger.start()
    world.stack.push_async_callback(stranger.stop)
    identity, at = world.unit("worker-1", "worker", "default"), url(world)
    ours, theirs = at(world.broker.settings.port), at(stranger.settings.port)
    await world.link(msgspec.structs.replace(identity.login, urls=(theirs, ours)))
    with pytest.raises(TicketRefused, match="is not the broker that this credential is for"):
        await Link(msgspec.structs.replace(identity.login, urls=(theirs, at(own_port()))), "test").open()
