"""Machines that come with a ticket: who is let in, as what, for how long, and who is not."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster.broker import LOOPBACK
from mvmci.cluster.identity import Identity, Login, TicketRole, decode_ticket, encode_ticket
from mvmci.errors import (
    EXIT_REFUSED,
    EXIT_USAGE,
    EXIT_VERSIONS,
    MvmciError,
    StoreUnavailable,
    TicketRefused,
    Usage,
    VersionsDiffer,
)
from mvmci.store import Chunk
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.trust import tokens
from mvmci.trust.authority import Authority, read_identity, write_identity
from mvmci.trust.enrol import client
from mvmci.trust.enrol.client import (
    EnrolReply,
    check_cluster,
    check_role,
    enrol,
    host_name,
    identity_of,
    is_due,
    renew,
    renew_always,
)
from mvmci.trust.enrol.server import EnrolmentServer
from mvmci.trust.registry import TicketRecord, change_ticket, read_tickets, read_units, revoke_ticket
from mvmci.trust.signer import UNIT_S
from mvmci.wire import WIRE
from tests.harness.waiting import LONG_S, until_true
from tests.parts.trust.conftest import CLUSTER, EVERYWHERE, World

both = pytest.mark.parametrize("listen", [LOOPBACK, EVERYWHERE], ids=["plain", "tls"])


def place(tmp_path: Path, name: str = "box") -> Path:
    """Where a machine keeps who it is."""
    return tmp_path / name / "identity.json"


def one_sentence(error: MvmciError) -> str:
    assert error.exit_code == EXIT_REFUSED
    assert "\n" not in error.message and len(error.message) < 200
    assert error.hint
    return error.message


def later(world: World, seconds: float) -> Authority:
    """The same authority with another idea of what time it is."""
    return replace(world.authority, now=lambda: time.time() + seconds)


@both
async def test_a_machine_with_a_ticket_becomes_a_unit(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    identity = await enrol(await world.ticket("worker", "default"), place(tmp_path), name="box")
    assert (identity.unit, identity.role, identity.queues) == ("box", "worker", ("default",))
    cluster = await world.open(identity)
    assert {member.unit for member in await cluster.store.presence.members()} >= {"box", "control-plane-1"}
    unit = (await read_units(cluster.config))["box"]
    assert (unit.key, unit.role, unit.queues) == (keys.public(identity.login.seed), "worker", ("default",))


async def test_what_a_machine_keeps_is_its_owners_alone(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    await enrol(await world.ticket("worker", "default"), place(tmp_path))
    assert place(tmp_path).stat().st_mode & 0o777 == 0o600
    assert place(tmp_path).parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in place(tmp_path).parent.iterdir()] == ["identity.json"]


async def test_an_identity_survives_a_restart_without_its_ticket(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    first = await enrol(ticket, place(tmp_path))
    monkeypatch.setattr(client, "_ask", None)  # nobody is asked
    assert await enrol(ticket, place(tmp_path)) == first
    assert await enrol(msgspec.structs.replace(ticket, expires_at=1), place(tmp_path)) == first


async def test_an_identity_is_taken_where_a_newer_ticket_is_refused(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    first = await enrol(await world.ticket("worker", "default"), place(tmp_path))
    await asyncio.sleep(1.1)  # tokens count in seconds
    newer = await world.ticket("worker", "default")
    await enrol(newer, place(tmp_path, "other"))  # somebody was faster
    assert await enrol(newer, place(tmp_path)) == first


async def test_a_ticket_lets_in_as_many_machines_as_it_says(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default", uses=2)
    results = await asyncio.gather(
        *(enrol(ticket, place(tmp_path, f"m{number}")) for number in range(6)), return_exceptions=True
    )
    let_in = [one for one in results if isinstance(one, Identity)]
    kept_out = [one for one in results if isinstance(one, TicketRefused)]
    assert (len(let_in), len(kept_out)) == (2, 4)
    assert {one_sentence(one) for one in kept_out} == {"the ticket has been used up"}
    assert len({one.unit for one in let_in}) == 2


async def test_an_answer_that_was_lost_is_asked_for_again_and_uses_nothing_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")

    def lose(*_: Any) -> Identity:
        raise KeyboardInterrupt

    with monkeypatch.context() as lost:
        lost.setattr(client, "_granted", lose)
        with pytest.raises(KeyboardInterrupt):
            await enrol(ticket, place(tmp_path), name="box")
    assert not place(tmp_path).exists()
    again = await enrol(ticket, place(tmp_path), name="box")
    record = (await read_tickets((await world.admin()).config))[ticket.id]
    assert record.used_by == (keys.public(again.login.seed),)


async def test_a_control_plane_that_dies_between_its_writes_has_lost_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    register, calls = EnrolmentServer._register, []

    async def die_once(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 1:
            raise StoreUnavailable("killed")
        return await register(*args)

    with monkeypatch.context() as dying:
        dying.setattr(EnrolmentServer, "_register", die_once)
        dying.setattr("mvmci.stores.nats.link.ANSWER_S", 0.5)
        dying.setattr(Link.call, "__kwdefaults__", {"wait_s": 0.5})
        identity = await enrol(ticket, place(tmp_path), name="box")
    assert identity.unit == "box"
    assert len(calls) >= 2  # a slow disk may let it be asked once more
    record = (await read_tickets((await world.admin()).config))[ticket.id]
    assert record.used_by == (keys.public(identity.login.seed),)


async def test_machines_of_one_name_get_numbers_and_keep_them(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default", uses=3)
    units = [(await enrol(ticket, place(tmp_path, f"m{number}"))).unit for number in range(3)]
    assert units == [host_name(), f"{host_name()}-2", f"{host_name()}-3"]
    place(tmp_path, "m1").with_name(".identity.json.key").write_text(
        read_identity(place(tmp_path, "m1")).login.seed  # type: ignore[union-attr]
    )
    place(tmp_path, "m1").unlink()
    assert (await enrol(ticket, place(tmp_path, "m1"))).unit == f"{host_name()}-2"


async def test_a_name_that_was_asked_for_is_given_or_refused(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default", uses=2)
    await enrol(ticket, place(tmp_path, "m0"), name="box")
    with pytest.raises(Usage, match="the name box is taken") as caught:
        await enrol(ticket, place(tmp_path, "m1"), name="box")
    assert caught.value.exit_code == EXIT_USAGE and "--name" in str(caught.value.hint)
    with pytest.raises(Usage, match="the name control-plane-1 is taken"):
        await enrol(ticket, place(tmp_path, "m1"), name="control-plane-1")
    assert (await enrol(ticket, place(tmp_path, "m1"), name="other")).unit == "other"


@both
async def test_a_ticket_that_expired_is_refused_in_one_sentence(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default", ttl_s=0.2)
    await asyncio.sleep(1.5)  # nobody tells of it; the broker counts in seconds
    with pytest.raises(TicketRefused) as caught:
        await enrol(ticket, place(tmp_path))
    assert one_sentence(caught.value).startswith("the ticket expired at ")


async def test_a_control_plane_knows_by_itself_that_a_ticket_expired(world: World, tmp_path: Path) -> None:
    await world.control_plane(now=lambda: time.time() + 7200)
    with pytest.raises(TicketRefused) as caught:
        await enrol(await world.ticket("worker", "default"), place(tmp_path))
    assert one_sentence(caught.value).startswith("the ticket expired at ")


async def test_a_control_plane_knows_by_itself_that_a_ticket_was_revoked(
    world: World, tmp_path: Path
) -> None:
    """Between the record and the broker's learning of it, that is all there is."""
    await world.control_plane()
    ticket, admin = await world.ticket("worker", "default"), await world.admin()

    def revoked(record: TicketRecord | None) -> TicketRecord:
        assert record is not None
        return msgspec.structs.replace(record, revoked=1)

    await change_ticket(admin.config, ticket.id, revoked)
    with pytest.raises(TicketRefused) as caught:
        await enrol(ticket, place(tmp_path))
    assert one_sentence(caught.value) == "the ticket was revoked"


async def test_a_ticket_that_was_revoked_is_refused_and_who_used_it_stays(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default", uses=2)
    cluster = await world.open(await enrol(ticket, place(tmp_path, "m0")))
    admin = await world.admin()
    await revoke_ticket(admin.config, world.authority, world.base, ticket.id)
    with pytest.raises(TicketRefused) as caught:
        await enrol(ticket, place(tmp_path, "m1"))
    assert "refuses the credential" in one_sentence(caught.value)
    assert "revoked" in str(caught.value.hint)
    await cluster.store.logs.read("j1")  # it still is one of us


async def test_a_ticket_that_the_cluster_has_no_record_of_is_refused(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = world.authority.ticket("worker", ("default",), world.base, 3600)
    with pytest.raises(TicketRefused) as caught:
        await enrol(ticket, place(tmp_path))
    assert one_sentence(caught.value) == "the cluster does not know this ticket"


async def test_a_ticket_of_another_cluster_is_refused(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    other = Authority.create(tmp_path / "state" / "other")
    with pytest.raises(TicketRefused) as caught:
        await enrol(other.ticket("worker", ("default",), world.base, 3600), place(tmp_path))
    one_sentence(caught.value)


@pytest.mark.parametrize("listen", [EVERYWHERE])
async def test_a_broker_that_another_ca_vouches_for_is_not_trusted(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    ca = Authority.create(tmp_path / "state" / "other").ca
    login = msgspec.structs.replace(ticket.login, ca=ca)
    with pytest.raises(TicketRefused) as caught:
        await enrol(msgspec.structs.replace(ticket, login=login), place(tmp_path))
    assert "is not the broker" in one_sentence(caught.value)
    assert not place(tmp_path).exists()


def test_a_ticket_of_another_role_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / CLUSTER)
    base = authority.login(["nats://127.0.0.1:1"], tls=False)
    pairs: list[tuple[TicketRole, TicketRole]] = [
        ("worker", "client"),
        ("client", "worker"),
        ("executor", "worker"),
    ]
    for role, wanted in pairs:
        with pytest.raises(TicketRefused) as caught:
            check_role(authority.ticket(role, ("default",), base, 60), wanted)
        assert re.search(rf"for an? {role}", one_sentence(caught.value))


async def test_a_ticket_says_what_its_machine_becomes_whatever_the_registry_says(
    world: World, tmp_path: Path
) -> None:
    """Others can write where the record is; they cannot sign the token in the ticket."""
    await world.control_plane()
    ticket, admin = await world.ticket("worker", "default"), await world.admin()

    def promote(record: TicketRecord | None) -> TicketRecord:
        assert record is not None
        return msgspec.structs.replace(record, role="client", queues=())

    await change_ticket(admin.config, ticket.id, promote)
    identity = await enrol(ticket, place(tmp_path))
    assert (identity.role, identity.queues) == ("worker", ("default",))


async def test_a_ticket_is_of_no_use_to_who_shows_another_tickets_token(world: World) -> None:
    await world.control_plane()
    mine, other = await world.ticket("worker", "default"), await world.ticket("client")
    link = await world.link(mine.login)
    ask = client._said(token=other.login.jwt, key=keys.public(keys.new_seed("user")))
    told = await link.call(Layout(CLUSTER).enrol(mine.id), msgspec.json.encode(ask))
    assert b"does not show its ticket" in told


async def test_nobody_enrols_with_the_key_of_another(world: World, tmp_path: Path) -> None:
    """All may read public keys: with any ticket one could be had, and its unit renewed no more."""
    await world.control_plane()
    path = place(tmp_path)
    victim = await enrol(await world.ticket("worker", "default"), path)
    mine, other = await world.ticket("client"), await world.ticket("client")
    cluster = await world.open(victim)
    before = (await read_units(cluster.config))[victim.unit]
    key, own = keys.public(victim.login.seed), keys.new_seed("user")
    link = await world.link(mine.login)
    seen = client.prove(victim.login.seed, other.id)  # of another ticket: it cannot be used again
    for proof in ("", "x", client.prove(own, mine.id), seen):
        ask = client._said(token=mine.login.jwt, key=key, proof=proof)
        told = await link.call(Layout(CLUSTER).enrol(mine.id), msgspec.json.encode(ask))
        assert b"does not show that it has its key" in told
    assert (await read_units(cluster.config))[victim.unit] == before
    assert not (await read_tickets(cluster.config))[mine.id].used_by
    assert (await renew(cluster.link, victim, path)).unit == victim.unit


@pytest.mark.parametrize(
    "asked",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"protocol": 1}',
        b'{"protocol": 1, "key": "U"}',
        b'{"protocol": 4, "more": ' + b"[" * 10_000,
    ],
    ids=range(6),
)
async def test_whatever_is_asked_the_control_plane_goes_on(
    world: World, tmp_path: Path, asked: bytes
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    link = await world.link(ticket.login)
    assert b"refused" in await link.call(Layout(CLUSTER).enrol(ticket.id), asked)
    assert (await enrol(ticket, place(tmp_path))).role == "worker"


async def test_whatever_a_unit_shows_as_its_token_the_control_plane_goes_on(world: World) -> None:
    await world.control_plane()
    unit = await world.open(world.unit("worker-1", "worker", "default"))
    deep = base64.urlsafe_b64encode(b'{"nats": ' + b"[" * 10_000).decode().rstrip("=")
    for token in ("", "a.b", "a.YWJj.c", f"a.{deep}.c"):
        ask = msgspec.json.encode(client._said(token=token))
        assert b"does not show a token" in await unit.link.call(Layout(CLUSTER).renew("worker-1"), ask)


async def test_versions_that_do_not_understand_each_other_say_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    monkeypatch.setattr(client, "PROTOCOL", client.PROTOCOL + 1)
    with pytest.raises(VersionsDiffer) as caught:
        await enrol(ticket, place(tmp_path))
    assert caught.value.exit_code == EXIT_VERSIONS
    record = (await read_tickets((await world.admin()).config))[ticket.id]
    assert record.used_by == ()


async def test_who_does_not_understand_the_level_of_the_cluster_does_not_get_in_and_is_told(
    world: World, tmp_path: Path
) -> None:
    """As the release before asks, which knows of no level: the answer's number is not its own."""
    plane = await world.control_plane()
    ticket = await world.ticket("worker", "default")
    link = await world.link(ticket.login)
    ask = {"protocol": 4, "version": "0.1.0", "token": ticket.login.jwt, "key": "U"}
    for level in range(WIRE + 1):
        plane._cluster.store.level.spoken = level
        answer = msgspec.json.decode(
            await link.call(Layout(CLUSTER).enrol(ticket.id), msgspec.json.encode(ask)), type=EnrolReply
        )
        assert answer.protocol == 4 + level
        assert ("versions differ" in answer.refused) == (level > 0)
    plane._cluster.store.level.spoken = WIRE + 1
    with pytest.raises(VersionsDiffer):
        await enrol(ticket, place(tmp_path))
    assert (await read_tickets((await world.admin()).config))[ticket.id].used_by == ()


async def test_the_registry_keeps_what_a_unit_understands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket = await world.ticket("worker", "default")
    identity = await enrol(ticket, place(tmp_path))
    cluster = await world.open(identity)
    assert (await read_units(cluster.config))[identity.unit].wire == WIRE
    monkeypatch.setattr(client, "WIRE", WIRE + 1)  # the next build
    await renew(cluster.link, identity, place(tmp_path))
    assert (await read_units(cluster.config))[identity.unit].wire == WIRE + 1


async def test_a_cluster_without_a_control_plane_is_unreachable(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ASK_S", 0.0)
    with pytest.raises(StoreUnavailable, match="no control plane answers"):
        await enrol(await world.ticket("worker", "default"), place(tmp_path))


# Keeping it.


async def test_a_unit_of_up_is_in_the_registry_as_soon_as_it_has_asked(world: World) -> None:
    await world.control_plane()
    identity = world.unit("worker-1", "worker", "default")
    path = world.folder / "units" / "worker-1" / "identity.json"
    cluster = await world.open(identity)
    assert await renew(cluster.link, identity, path) == identity  # its token is still good
    unit = (await read_units(cluster.config))["worker-1"]
    assert (unit.key, unit.queues, unit.ticket) == (keys.public(identity.login.seed), ("default",), "")


async def test_a_token_of_another_version_is_renewed_when_its_unit_comes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a unit may do stands in its token, and a newer version may need more or less."""
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    with monkeypatch.context() as older:
        older.setattr(Layout, "capacity", lambda self: f"{self.cluster}.elsewhere")
        old = world.unit("worker-1", "worker", "default")
    cluster = await world.open(old)
    new = await renew(cluster.link, old, path)
    assert new.login.jwt != old.login.jwt
    assert new.login.seed == old.login.seed
    assert world.unit("worker-1", "worker", "default") == new
    write_identity(path, old)
    assert world.unit("worker-1", "worker", "default") != old


@both
async def test_a_token_is_renewed_when_two_thirds_of_its_life_are_over(world: World) -> None:
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    old = later(world, -UNIT_S * 0.7).identity("worker-1", "worker", ("default",), world.base, path)
    assert is_due(old, time.time())
    cluster = await world.open(old)
    renewing = asyncio.create_task(renew_always(cluster.link, old, path))
    async with asyncio.timeout(LONG_S):
        while cluster.link.login.jwt == old.login.jwt:  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)
    new = read_identity(path)
    assert new is not None and new.login == cluster.link.login
    assert new.login.seed == old.login.seed
    assert not is_due(new, time.time())
    async with asyncio.timeout(LONG_S):
        while await read_or_none(cluster) != []:  # under the new one, once it is connected again
            pass
    renewing.cancel()


async def read_or_none(cluster: Cluster) -> list[Chunk] | None:
    """None while there is no connection."""
    try:
        return await cluster.store.logs.read("j1")
    except StoreUnavailable:
        await asyncio.sleep(0.02)
        return None


async def test_a_connection_ends_with_its_token_unless_it_is_renewed(world: World) -> None:
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    soon = later(world, 5.0 - UNIT_S).identity("worker-1", "worker", ("default",), world.base, path)
    renewed = await world.open(soon)
    link = await world.link(soon.login)
    renewing = asyncio.create_task(renew_always(renewed.link, soon, path))
    await until_true(lambda: renewed.link.login.jwt != soon.login.jwt)
    async with asyncio.timeout(LONG_S):
        await link.refused.wait()
    assert isinstance(link.failure, TicketRefused)
    await renewed.store.logs.read("j1")
    renewing.cancel()


async def test_a_unit_cannot_renew_as_another(world: World) -> None:
    await world.control_plane()
    one, two = world.unit("worker-1", "worker", "default"), world.unit("worker-2", "worker", "default")
    cluster = await world.open(one)
    ask = client._said(token=two.login.jwt)
    told = await cluster.link.call(Layout(CLUSTER).renew("worker-1"), msgspec.json.encode(ask))
    assert b"does not show a token of worker-1" in told


async def test_a_ticket_is_not_a_token_of_a_unit_whatever_its_name(world: World) -> None:
    await world.control_plane()
    ticket = await world.ticket("client")
    cluster = await world.open(world.unit(ticket.id, "worker", "default"))
    ask = client._said(token=ticket.login.jwt)
    told = await cluster.link.call(Layout(CLUSTER).renew(ticket.id), msgspec.json.encode(ask))
    assert b"does not show a token" in told


async def test_what_a_unit_may_do_is_renewed_from_its_token_whatever_the_registry_says(world: World) -> None:
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    old = later(world, -UNIT_S * 0.7).identity("worker-1", "worker", ("default",), world.base, path)
    cluster, admin = await world.open(old), await world.admin()
    record = {"key": keys.public(old.login.seed), "role": "admin", "since": 1}
    await admin.config.put("unit.worker-1", msgspec.json.encode(record))
    new = await renew(cluster.link, old, path)
    claims = tokens.peek(new.login.jwt)
    assert claims is not None and (claims.tagged("role"), claims.queues) == ("worker", ("default",))


async def test_up_may_give_its_own_units_other_queues_and_keys(world: World) -> None:
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    first = world.unit("worker-1", "worker", "default")
    await renew((await world.open(first)).link, first, path)
    await asyncio.sleep(1.1)  # tokens count in seconds
    second = world.unit("worker-1", "worker", "default", "other")
    assert second.login.seed == first.login.seed
    await renew((await world.open(second)).link, second, path)
    path.unlink()
    await asyncio.sleep(1.1)
    third = world.unit("worker-1", "worker", "default")
    await renew((await world.open(third)).link, third, path)
    unit = (await read_units((await world.admin()).config))["worker-1"]
    assert unit.key == keys.public(third.login.seed) != keys.public(first.login.seed)
    with pytest.raises(TicketRefused, match="newer token"):
        await renew((await world.open(second)).link, second, path)


async def test_a_machine_with_a_ticket_keeps_its_name_from_a_unit_of_up(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    await enrol(await world.ticket("worker", "default"), place(tmp_path), name="worker-9")
    await asyncio.sleep(1.1)
    late = world.unit("worker-9", "worker", "default")
    path = world.folder / "units" / "worker-9" / "identity.json"
    with pytest.raises(TicketRefused, match="came with ticket"):
        await renew((await world.open(late)).link, late, path)


async def test_a_unit_finds_its_identity_by_its_options(world: World, tmp_path: Path) -> None:
    state = world.folder.parent
    identity = world.unit("worker-1", "worker", "default")
    found, path = await identity_of(state, CLUSTER, "worker-1", role="worker", join=None)
    assert found == identity and read_identity(path) == identity
    with pytest.raises(StoreUnavailable, match="no worker worker-2 of cluster demo"):
        await identity_of(state, None, "worker-2", role="worker", join=None)
    with pytest.raises(StoreUnavailable, match="no control-plane worker-1"):
        await identity_of(state, None, "worker-1", role="control-plane", join=None)


def no_file(ticket: Path) -> None:
    ticket.unlink()


def emptied(ticket: Path) -> None:
    ticket.write_text("")


def used_up(ticket: Path) -> None:
    """As it is: it was for one use."""


def expired(ticket: Path) -> None:
    made = decode_ticket(ticket.read_text())
    ticket.write_text(encode_ticket(msgspec.structs.replace(made, expires_at=1)))


@pytest.mark.parametrize("becomes", [no_file, emptied, used_up, expired])
@pytest.mark.parametrize("name", [None, "box"], ids=["unnamed", "named"])
async def test_who_has_joined_goes_on_as_who_it_is_whatever_its_ticket_and_its_host_are_by_now(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, becomes: Any
) -> None:
    await world.control_plane()
    file, state = tmp_path / "ticket", tmp_path / "there"
    file.write_text(encode_ticket(await world.ticket("worker", "default")) + "\n")
    first = await identity_of(state, None, name, role="worker", join=f"@{file}")
    becomes(file)
    monkeypatch.setattr(client, "_ask", None)  # nobody is asked
    monkeypatch.setattr(client, "host_name", lambda: "renamed")
    assert await identity_of(state, None, name, role="worker", join=f"@{file}") == first
    assert await identity_of(state, None, None, role="worker", join=None) == first


async def test_a_bad_ticket_is_said_where_nobody_has_joined(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="cannot be read"):
        await identity_of(tmp_path, None, None, role="worker", join=f"@{tmp_path / 'ticket'}")


async def test_several_units_of_a_machine_keep_apart(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    ticket, state = encode_ticket(await world.ticket("worker", "default", uses=3)), tmp_path / "there"
    found = {
        name: await identity_of(state, None, name, role="worker", join=ticket) for name in (None, "a", "b")
    }
    assert {one.unit for one, _ in found.values()} == {host_name(), "a", "b"}
    monkeypatch.setattr(client, "_ask", None)
    monkeypatch.setattr(client, "host_name", lambda: "renamed")
    for name, one in found.items():
        assert await identity_of(state, CLUSTER, name, role="worker", join=None) == one
    found[None][1].unlink()
    with pytest.raises(StoreUnavailable, match="no worker renamed") as caught:
        await identity_of(state, CLUSTER, None, role="worker", join=None)
    assert caught.value.hint == "there is a, b: name it with --name"


async def test_a_worker_and_an_executor_of_one_host_do_not_become_each_other(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    state, roles = tmp_path / "there", {}
    for role in ("worker", "executor", "worker", "executor"):
        ticket = encode_ticket(await world.ticket(role, "default"))  # type: ignore[arg-type]
        identity, _ = await identity_of(state, None, None, role=role, join=ticket)  # type: ignore[arg-type]
        assert roles.setdefault(role, identity.unit) == identity.unit
    assert roles == {"worker": host_name(), "executor": f"{host_name()}-2"}
    with pytest.raises(Usage, match=f"{host_name()} is a worker of this machine"):
        await identity_of(state, None, host_name(), role="executor", join=ticket)


@pytest.mark.parametrize("kept", ["client.json", "units/box/identity.json", "keys"])
async def test_two_clusters_of_one_name_are_told_apart_by_their_keys(tmp_path: Path, kept: str) -> None:
    base = Login(urls=("nats://127.0.0.1:4222",))
    one = Authority.create(tmp_path / "one" / "demo")
    other = Authority.create(tmp_path / "other" / "demo")
    state = tmp_path / "one" if kept == "keys" else tmp_path / "there"
    if kept != "keys":
        one.identity("box", "worker", ("default",), base, state / "demo" / kept)
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    check_cluster(state / "demo", one.ticket("client", (), base, 60))
    wrong = other.ticket("worker", ("default",), base, 60)
    with pytest.raises(TicketRefused, match="another cluster demo") as caught:
        await identity_of(state, None, None, role="worker", join=encode_ticket(wrong))
    assert "--state DIR keeps the two apart" in one_sentence_hint(caught.value)
    assert ("`rm -r" in str(caught.value.hint)) == (kept != "keys")
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before


def one_sentence_hint(error: MvmciError) -> str:
    one_sentence(error)
    return str(error.hint)


async def test_a_unit_joins_by_the_ticket_file_in_the_environment(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    (tmp_path / "ticket").write_text(encode_ticket(await world.ticket("worker", "default")) + "\n")
    monkeypatch.setenv("MVMCI_TICKET_FILE", str(tmp_path / "ticket"))
    state = tmp_path / "there"
    identity, path = await identity_of(state, None, None, role="worker", join=None)
    assert identity.unit == host_name()
    assert path == state / CLUSTER / "units" / host_name() / "identity.json"
    with pytest.raises(Usage, match="for cluster demo, not for x"):
        await identity_of(state, "x", None, role="worker", join=f"@{tmp_path / 'ticket'}")
