"""What who has a control plane's host can do, by its credentials: tried on a broker, as a thief would."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.errors import NoRespondersError

from mvmci.cluster.identity import Identity, Login
from mvmci.errors import TicketRefused
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.trust import tokens
from mvmci.trust.accounts import ACCOUNTS
from mvmci.trust.authority import as_unit, read_identity
from mvmci.trust.enrol import client
from mvmci.trust.enrol.client import enrol, renew
from mvmci.trust.permissions import CLAIMS_LOOKUP, CLAIMS_UPDATE, Grantee, Permissions
from mvmci.trust.provision import ControlPlaneConfig
from mvmci.trust.registry import AccountTokens, revoke_units
from tests.harness.waiting import LONG_S
from tests.parts.trust.conftest import CLUSTER, World, until_refused


async def joined(world: World, path: Path, name: str = "box") -> Identity:
    return await enrol(await world.ticket("worker", "default"), path, name=name)


async def revoke(world: World, *names: str) -> None:
    admin = await world.admin()
    await revoke_units(admin.config, world.authority, world.base, names)


async def is_let_in(login: Login) -> bool:
    link = Link(login, "thief")
    try:
        await link.open()
    except TicketRefused:
        return False
    finally:
        await link.close()
    return True


def minted(world: World, plane: ControlPlaneConfig, role: Grantee, unit: str = "thief") -> Login:
    """What somebody with a control plane's file makes of its key."""
    seed = keys.new_seed("user")
    jwt = plane.signer().mint(keys.public(seed), unit, role, ("default",), 3600)
    return as_unit(world.base, CLUSTER, role, unit, jwt=jwt, seed=seed)


async def test_a_control_plane_signs_with_a_key_of_its_own(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    identity = await joined(world, tmp_path / "identity.json")
    claims = tokens.peek(identity.login.jwt)
    assert claims is not None
    assert claims.iss == keys.public(world.plane().signer().seed)
    assert claims.account == world.authority.accounts["workers"]
    await (await world.open(identity)).store.logs.read("j1")


async def test_it_signs_for_those_who_enrol_and_for_nobody_else(world: World) -> None:
    await world.control_plane()
    roles: tuple[Grantee, ...] = (
        "worker",
        "executor",
        "client",
        "control-plane",
        "admin",
        "bootstrap",
        "system",
    )
    found = {role for role in roles if await is_let_in(minted(world, world.plane(), role))}
    assert found == {"worker", "executor", "client"}


async def test_it_can_tell_the_broker_nothing_of_accounts(world: World, plain: Any) -> None:
    """Who may could undo a revocation: the server takes a token that is older than the one that it has."""
    await world.control_plane()
    plane = world.plane()
    thief = await plain(plane.identity(world.folder / "stolen.json").login)
    lookup = CLAIMS_LOOKUP.format(world.authority.accounts["workers"])
    assert await thief.refusals([CLAIMS_UPDATE, lookup]) == {CLAIMS_UPDATE, lookup}


async def test_the_broker_takes_an_older_token_of_an_account(world: World) -> None:
    """Why no control plane may: should this fail one day, the server has become stricter."""
    older = world.authority.account_token("workers")
    newer = world.authority.account_token("workers", {keys.public(keys.new_seed("user"))}, after=2e9)
    link = await world.link(world.authority.system_login(world.base))
    for token in (newer, older):
        assert b"error" not in await link.call(CLAIMS_UPDATE, token.encode())
    lookup = CLAIMS_LOOKUP.format(world.authority.accounts["workers"])
    assert await link.call(lookup) == older.encode()


async def test_a_control_plane_that_is_revoked_signs_no_more_and_what_it_signed_is_worth_nothing(
    world: World, tmp_path: Path
) -> None:
    plane = world.plane()
    enrolment = await world.control_plane(plane=plane)
    box = await world.open(await joined(world, tmp_path / "m0" / "identity.json"))
    stolen = minted(world, plane, "worker", "stolen")
    thief, own = await world.link(stolen), enrolment._cluster.link
    ours = await world.open(world.unit("worker-1", "worker", "default"))
    await revoke(world, "control-plane-1")
    for link in (own, thief, box.link):
        await until_refused(link)
    assert not await is_let_in(minted(world, plane, "client"))
    await ours.store.logs.read("j1")
    assert not ours.link.refused.is_set()


async def test_another_control_plane_goes_on_and_what_the_first_one_signed_is_renewed_by_no_one(
    world: World, tmp_path: Path
) -> None:
    plane = world.plane()
    first = await world.control_plane(plane=plane)
    box = await joined(world, tmp_path / "m0" / "identity.json")
    await world.control_plane("control-plane-2")
    await revoke(world, "control-plane-1")
    await until_refused(first._cluster.link)
    assert (await joined(world, tmp_path / "m1" / "identity.json", "box-2")).unit == "box-2"
    other = await world.open(world.unit("worker-1", "worker", "default"))
    ask = msgspec.json.encode(client._said(token=box.login.jwt, host="h"))
    answer = await other.link.call(Layout(CLUSTER).renew("worker-1"), ask)
    assert b"does not show a token" in answer


async def test_a_unit_renews_with_whichever_control_plane_answers(world: World, tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    first = await world.control_plane()
    box = await joined(world, path)
    await first.close()
    await world.control_plane("control-plane-2")
    cluster = await world.open(box)
    assert (await renew(cluster.link, box, path)).unit == "box"


async def test_a_revoked_control_plane_comes_back_under_another_key(world: World, tmp_path: Path) -> None:
    first = world.plane()
    await world.control_plane(plane=first)
    await revoke(world, "control-plane-1")
    await asyncio.sleep(1.1)  # tokens count in seconds
    second = world.plane(generation=1)
    assert second.seed != first.seed
    await world.control_plane(plane=second)
    await joined(world, tmp_path / "identity.json")
    assert not await is_let_in(minted(world, first, "worker"))


async def test_nobody_is_enrolled_before_the_broker_knows_who_signs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who enrolled would be refused at the broker, and would give up for good."""

    async def not_yet() -> None:
        pass

    push = world.push
    monkeypatch.setattr(world, "push", not_yet)
    ticket = await world.ticket("worker", "default")
    enrolment = await world.control_plane()
    assert not enrolment._unsubscribe
    enrolling = asyncio.create_task(enrol(ticket, tmp_path / "identity.json", name="box"))
    await push()
    async with asyncio.timeout(LONG_S):
        await (await world.open(await enrolling)).store.logs.read("j1")


async def test_what_it_writes_to_config_makes_nobody_sign(world: World, tmp_path: Path) -> None:
    """A control plane writes there: only what the operator signed is believed."""
    await world.control_plane()
    admin = await world.admin()
    thief = keys.new_seed("account")
    forged = tokens.account(
        thief, world.authority.accounts["workers"], "demo-workers", 3e9, store=False, revoked=(),
        signers=[keys.public(thief)],
    )  # fmt: skip
    await admin.config.put("account.workers", forged.encode())
    trusted = AccountTokens(operator=keys.public(world.authority.operator))
    assert await trusted.signers(admin.config) == frozenset()
    await world.push()
    assert keys.public(thief) not in await trusted.signers(admin.config)
    assert keys.public(thief) not in tokens.peek(world.authority.account_token("workers")).signers  # type: ignore[union-attr]


async def test_what_it_writes_to_config_adds_no_line_to_the_ledger(world: World) -> None:
    """What is revoked in CONFIG is taken over at each push: somebody who signs must not come with it."""
    enrolment = await world.control_plane()
    thief, victim = keys.public(keys.new_seed("account")), keys.public(keys.new_seed("user"))
    key = f"{victim} .\nplane ghost {victim} {thief}"
    record = {"key": key, "role": "worker", "revoked": 1}
    await enrolment._cluster.config.put("unit.ghost", msgspec.json.encode(record))
    await world.push()
    await revoke(world, "ghost")
    assert world.authority.ledger.planes().keys() == {"control-plane-1"}
    assert thief not in world.authority.ledger.signers()


async def test_it_cannot_say_whose_program_a_machine_is_to_take(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine believes an offer by what its token says of its cluster, and that by its ticket alone."""
    await world.control_plane()
    path, thief = tmp_path / "identity.json", keys.public(keys.new_seed("account"))
    identity = await joined(world, path)
    ticket, cluster = await world.ticket("worker", "default"), await world.open(identity)
    monkeypatch.setattr(tokens, "origin_tag", lambda issuer: f"cluster:{thief}")
    monkeypatch.setattr("mvmci.trust.signer.Signer.is_due", lambda *_: True)
    with pytest.raises(TicketRefused, match="a token of another cluster"):
        await renew(cluster.link, identity, path)
    assert read_identity(path) == identity
    with pytest.raises(TicketRefused, match="a token of another cluster"):
        await enrol(ticket, tmp_path / "other" / "identity.json", name="other")
    assert not (tmp_path / "other" / "identity.json").exists()


async def test_it_cannot_hide_from_being_revoked(world: World) -> None:
    """Its record in CONFIG is one that it may write; its keys stand in the ledger as well."""
    plane = world.plane()
    enrolment = await world.control_plane(plane=plane)
    own = enrolment._cluster
    await own.config.put("unit.control-plane-1", msgspec.json.encode({"key": "U", "role": "client"}))
    await own.config.delete("unit.control-plane-1")
    await revoke(world, "control-plane-1")
    await until_refused(own.link)
    assert not await is_let_in(minted(world, plane, "worker"))


@pytest.mark.parametrize("role", ["control-plane", "admin"])
@pytest.mark.parametrize("before", [False, True], ids=["", "beside one of the version before"])
async def test_no_other_control_plane_makes_more_of_what_it_signed(
    world: World, role: Grantee, before: bool
) -> None:
    """One that still has a file of the version before could sign for every role."""
    await world.push()
    stolen, other = world.plane(), world.plane("control-plane-2")
    if before:
        a = world.authority
        old = {"operator": a.operator, "account": a.account, "system": a.system}
        other = msgspec.structs.replace(other, token="", operator_key="", accounts={}, **old)
    await world.control_plane("control-plane-2", plane=other)
    thief = await world.link(minted(world, stolen, "worker"))
    forged = minted(world, stolen, role)
    ask = msgspec.json.encode(client._said(token=forged.jwt, host="h"))
    answer = await thief.call(Layout(CLUSTER).renew("thief"), ask)
    assert b"does not show a token" in answer
    admin = await world.admin()
    assert await admin.config.get("unit.thief") is None


@pytest.mark.parametrize("role", ["worker", "executor", "client"])
async def test_a_token_with_more_than_a_role_may_opens_no_more_than_its_account_imports(
    world: World, plain: Any, role: Grantee
) -> None:
    """The key signs any list of subjects: what is not imported leads nowhere."""
    await world.control_plane()
    plane, seed, account = world.plane(), keys.new_seed("user"), world.authority.accounts[ACCOUNTS[role]]
    all_of_it = {"expires_at": 0, "payload_max": 1 << 20, "account": account}
    wide = tokens.user(
        plane.signer().seed, keys.public(seed), "thief", Permissions((">",), (">",)), 0, **all_of_it
    )
    login = msgspec.structs.replace(minted(world, plane, role), jwt=wide, seed=seed)
    thief = await plain(login)
    for subject in ("STREAM.DELETE.demo-JOBS", "STREAM.PURGE.demo-JOBS", "CONSUMER.LIST.demo-JOBS"):
        for prefix in ("$JS.API", f"{CLUSTER}.api"):
            try:
                answer = (await thief.client.request(f"{prefix}.{subject}", b"", timeout=1)).data
            except (NoRespondersError, TimeoutError):
                continue
            assert b"not enabled for account" in answer, f"{role} got {answer!r} of {prefix}.{subject}"
    await thief.client.publish(Layout(CLUSTER).setting("settings"), b"{}")
    await thief.client.flush()
    admin = await world.admin()
    assert await admin.config.settings() is None
