"""What answers can be made to reach: nats-server holds no reply subject against what the asker may publish.

Each role asks all that it may, and names as the place of the answer every subject that anybody publishes.
Observers who may hear everything stand in each account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg

from mvmci.cluster.identity import Login
from mvmci.system import keys
from mvmci.trust import tokens
from mvmci.trust.accounts import ACCOUNTS, Account
from mvmci.trust.permissions import Grantee, Permissions, api, permissions
from tests.parts.trust.conftest import Plain, World
from tests.parts.trust.test_permissions import (
    JETSTREAM,
    LAYOUT,
    OURS,
    STREAMS,
    asked,
    concrete,
    may,
    of_others,
    states,
)

ROLES: tuple[Grantee, ...] = ("worker", "executor", "client", "bootstrap")
BYTES = b'{"bytes": "of the asker"}'
SUBSCRIPTION = f"$KV.{LAYOUT.config_bucket}.settings"
INFO = b'{"offset": 0, "deleted_details": false}'
STALE = {"Nats-Expected-Last-Subject-Sequence": "999999"}  # nothing is stored, and the refusal is the answer
WITHIN_S = 60.0


def login_of(world: World, role: Grantee) -> Login:
    if role == "bootstrap":
        return world.authority.ticket("worker", ["default"], world.base, 60).login
    return world.unit("u1", role, *(["default"] if role in ("worker", "executor") else [])).login  # type: ignore[arg-type]


def in_account(world: World, account: Account, allowed: Permissions) -> Login:
    """Somebody in an account with a list that no role has."""
    seed, publics = keys.new_seed("user"), world.authority.accounts
    of_system = account == "system"
    token = tokens.user(
        world.authority.system if of_system else world.authority.account,
        keys.public(seed),
        "observer",
        allowed,
        world.authority.now(),
        expires_at=0,
        payload_max=-1,
        account="" if account in ("main", "system") else publics[account],
    )
    return msgspec.structs.replace(world.base, jwt=token, seed=seed)


class Observers:
    """Those who hear everything, and what they heard on subjects where an answer was wanted."""

    def __init__(self, world: World, plain: Any) -> None:
        self._world = world
        self._plain = plain
        self._all: dict[Account, Plain] = {}
        self.wanted: set[str] = set()
        self.heard: list[tuple[Account, str, bytes]] = []

    async def open(self) -> None:
        everything = Permissions(publish=(">",), subscribe=(">",))
        for account in dict.fromkeys(ACCOUNTS.values()):
            one = self._all[account] = await self._plain(in_account(self._world, account, everything))
            await one.client.subscribe(">", cb=self._hear(account))
            await one.client.flush()

    def _hear(self, account: Account) -> Any:
        async def hear(message: Msg) -> None:
            answers = "Nats-Stream" in (message.headers or {}) or not message.data.startswith((b"ask ", INFO))
            if message.subject in self.wanted and answers:
                self.heard.append((account, message.subject, message.data))

        return hear

    async def catch_up(self) -> None:
        """Until what was sent before has been heard."""
        for one in self._all.values():
            await one.client.flush()
            await one.client.flush()

    def outside(self, own: Account) -> list[tuple[Account, str, bytes]]:
        return [heard for heard in self.heard if heard[0] != own]


def requests(role: Grantee, seqs: dict[str, int]) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Every request that a role may make, in every form that is answered: subject, data, headers."""
    granted = permissions(LAYOUT, role, "u1", ["default"] if role in ("worker", "executor") else [])
    for pattern in granted.publish:
        if pattern.startswith("$JS.API.DIRECT.GET."):
            seq = seqs[pattern.rpartition(".")[2]]
            for body in (
                {"seq": seq},
                {"last_by_subj": ">"},
                {"seq": max(seq, 1), "next_by_subj": ">", "batch": 2},
                {"multi_last": [">"], "batch": 2},
            ):
                yield pattern, msgspec.json.encode(body), {}
        elif "CONSUMER.MSG.NEXT" in pattern:
            yield pattern, b'{"batch": 1, "no_wait": true}', {}
        else:
            data = INFO if pattern.startswith(f"{api(LAYOUT, role)}.") else b"ask "
            for subject in sorted(concrete(pattern))[:2]:
                yield subject, data, STALE


def places(allowed: Iterable[str]) -> set[str]:
    """Where an answer might do harm: what anybody publishes or JetStream hears, and this role may not."""
    tried = {*OURS, *of_others(), *(subject for verb in JETSTREAM for subject in asked(verb))}
    tried |= {LAYOUT.stored("job", "j1"), LAYOUT.capacity()}
    # The server itself refuses to take these for a reply.
    tried = {subject for subject in tried if not subject.startswith(("_R_.", "$JS.ACK."))}
    return {subject for subject in tried if not may(allowed, subject)}


async def seqs_of(world: World) -> dict[str, int]:
    admin = await world.admin()
    return {s: (await admin.link.api(f"STREAM.INFO.{s}"))["state"]["last_seq"] for s in STREAMS}


async def attack(one: Plain, role: Grantee, seqs: dict[str, int], replies: Iterable[str]) -> int:
    """Make all requests with all replies; how many were made."""
    count = 0
    for subject, data, headers in requests(role, seqs):
        for reply in replies:
            traced = {"Nats-Trace-Dest": reply} if count % 7 == 0 else {}
            await one.client.publish(subject, data, reply=reply, headers=(headers | traced) or None)
            count += 1
        await one.client.flush()
    return count


async def plant(world: World) -> None:
    """Bytes of an asker, as the last message of what everybody may write to."""
    client = await world.open(world.unit("laptop", "client"), announce=False)
    await client.link.request(LAYOUT.blob_chunks("planted"), BYTES)


@pytest.mark.parametrize("role", ROLES)
async def test_no_answer_arrives_outside_of_the_askers_account(world: World, plain: Any, role: Any) -> None:
    await world.control_plane()
    await plant(world)
    admin, seqs = await world.admin(), await seqs_of(world)
    before = await states(admin)
    login = login_of(world, role)
    one, observers = await plain(login), Observers(world, plain)
    await observers.open()
    granted = permissions(LAYOUT, role, "u1", ["default"] if role in ("worker", "executor") else [])
    observers.wanted = places(granted.publish)
    async with asyncio.timeout(WITHIN_S * 5):
        made = await attack(one, role, seqs, sorted(observers.wanted))
        await observers.catch_up()
    assert made > 500
    assert observers.outside(ACCOUNTS[role]) == []
    assert await states(admin) == before


async def test_in_the_account_of_the_streams_the_same_would_arrive(world: World, plain: Any) -> None:
    """That the observers would see it, and why roles have accounts."""
    await plant(world)
    seqs = await seqs_of(world)
    allowed = permissions(LAYOUT, "client", "u1")
    one = await plain(in_account(world, "main", allowed))
    observers = Observers(world, plain)
    await observers.open()
    observers.wanted = {SUBSCRIPTION, f"$JS.API.STREAM.PURGE.{LAYOUT.jobs}"}
    await attack(one, "client", seqs, sorted(observers.wanted))
    await observers.catch_up()
    assert {subject for _, subject, data in observers.heard if data == BYTES} == observers.wanted


@pytest.mark.parametrize("prefix", ["_R_.x", "$JS.ACK.demo-JOBS.spec-default.1.1.1.1.0"])
async def test_the_broker_takes_no_reply_that_only_it_may_name(world: World, plain: Any, prefix: str) -> None:
    """A service passes on a reply that begins as acknowledgements do, as it is."""
    one = await plain(world.unit("laptop", "client").login)
    await one.client.publish(f"$JS.API.DIRECT.GET.{LAYOUT.jobs}", b'{"seq": 1}', reply=prefix)
    await one.client.flush()
    await one.client.flush()
    assert any("reply" in told.lower() for told in one.reply)


@pytest.mark.parametrize("service", ["enrol", "renew"])
async def test_a_service_answers_in_the_inbox_of_its_asker_alone(
    world: World, plain: Any, service: str
) -> None:
    """Also to who is in its own account, where no broker stands between: it may write the settings."""
    await world.control_plane()
    asked = f"{LAYOUT.cluster}.{service}.u1"
    allowed = Permissions(publish=(asked,), subscribe=("_INBOX.>", SUBSCRIPTION))
    one, heard = await plain(in_account(world, "main", allowed)), asyncio.Queue[str]()

    async def hear(message: Msg) -> None:
        if not message.subject.startswith("_INBOX.control-plane."):  # what it asks itself
            heard.put_nowait(message.subject)

    for subject in ("_INBOX.>", SUBSCRIPTION):
        await one.client.subscribe(subject, cb=hear)
    for reply in (SUBSCRIPTION, "_INBOX.admin.u2.x", "_INBOX.admin.u1.x"):
        await one.client.publish(asked, b"ask ", reply=reply)  # answered as it comes: it cannot be read
    async with asyncio.timeout(WITHIN_S):
        assert await heard.get() == "_INBOX.admin.u1.x"
