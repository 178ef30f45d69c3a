"""What takes a machine's right away, and that it stays away."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client

from mvmci.cluster.broker import LOOPBACK
from mvmci.cluster.identity import Identity, Login, UnitRole
from mvmci.errors import NotFound, TicketRefused, Usage
from mvmci.roles import disk_watch
from mvmci.stores.nats.link import Link
from mvmci.system import keys
from mvmci.trust import registry
from mvmci.trust.authority import Authority
from mvmci.trust.enrol.client import enrol, renew
from mvmci.trust.registry import read_units, revoke_ticket, revoke_units
from tests.harness.waiting import LONG_S
from tests.parts.trust.conftest import EVERYWHERE, World

both = pytest.mark.parametrize("listen", [LOOPBACK, EVERYWHERE], ids=["plain", "tls"])
CUT_S_MAX = 10.0  # two seconds is the promise; a busy machine has its own ideas


async def joined(world: World, path: Path, name: str = "box") -> Identity:
    return await enrol(await world.ticket("worker", "default"), path, name=name)


async def revoke(world: World, name: str) -> None:
    admin = await world.admin()
    await revoke_units(admin.config, world.authority, world.base, [name])


async def refused(login: Login) -> None:
    """See that nobody gets in with `login`."""
    with pytest.raises(TicketRefused, match="refuses the credential"):
        await Link(login, "test").open()


@both
async def test_a_machine_that_is_revoked_is_cut_off_at_once_and_for_good(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    identity = await joined(world, tmp_path / "identity.json")
    cluster = await world.open(identity)
    other = await world.open(world.unit("worker-1", "worker", "default"))
    began = time.monotonic()
    await revoke(world, "box")
    async with asyncio.timeout(CUT_S_MAX):
        await cluster.link.refused.wait()
    assert time.monotonic() - began < CUT_S_MAX
    assert isinstance(cluster.link.failure, TicketRefused)
    with pytest.raises(TicketRefused):
        await cluster.store.logs.read("j1")
    await refused(identity.login)
    await other.store.logs.read("j1")
    assert not other.link.refused.is_set()


async def test_a_machine_notices_also_when_its_client_library_dies_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing fails where something was still to be sent, and then nobody is told."""
    await world.control_plane()
    identity = world.unit("worker-1", "worker", "default")
    cluster = await world.open(identity)
    await renew(cluster.link, identity, world.folder / "identity.json")
    library, close = cluster.link._client, Client._close

    async def die(one: Client, status: int, do_cbs: bool = True) -> None:
        if one is not library:
            return await close(one, status, do_cbs)
        one._status = Client.CLOSED
        one._transport.close()  # type: ignore[union-attr]
        raise ConnectionResetError

    monkeypatch.setattr(Client, "_close", die)
    await revoke(world, "worker-1")
    async with asyncio.timeout(CUT_S_MAX):
        await cluster.link.refused.wait()  # its presence finds out, within a second
    assert isinstance(cluster.link.failure, TicketRefused)


@both
async def test_a_revocation_survives_the_death_of_the_broker(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    identity = await joined(world, tmp_path / "identity.json")
    other = await world.open(world.unit("worker-1", "worker", "default"))
    await revoke(world, "box")
    await world.restart()
    await refused(identity.login)
    assert await other.store.logs.read("j1") == []  # came back by itself


@pytest.mark.parametrize("left", ["nothing", "empty", "torn"])
async def test_a_broker_whose_files_were_not_synced_keeps_a_revocation(
    world: World, tmp_path: Path, left: str
) -> None:
    """A power cut may take what the server wrote last, or a part of it; the copies were synced."""
    await world.control_plane()
    identity = await joined(world, tmp_path / "identity.json")
    await revoke(world, "box")
    folder = str(world.broker.folder)
    disk_watch.keep_tokens(folder, disk_watch.keep_tokens(folder, {}))
    await world.broker.kill()
    for file in (world.broker.folder / "resolver").iterdir():
        if left == "nothing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: 0 if left == "empty" else 100])
    await world.broker.start()
    await refused(identity.login)


async def test_a_token_that_is_being_written_is_not_copied(world: World) -> None:
    file = next((world.broker.folder / "resolver").iterdir())
    whole, folder = file.read_bytes(), world.broker.folder
    before = disk_watch.keep_tokens(str(folder), {})
    file.write_bytes(whole[:100])
    before = disk_watch.keep_tokens(str(folder), before)
    assert not (folder / "accounts" / file.name).exists()
    file.write_bytes(whole)
    before = disk_watch.keep_tokens(str(folder), before)
    disk_watch.keep_tokens(str(folder), before)
    assert (folder / "accounts" / file.name).read_bytes() == whole


async def test_a_broker_that_is_given_newer_tokens_takes_them_and_forgets_no_revocation(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    identity = await joined(world, tmp_path / "identity.json")
    await revoke(world, "box")
    later = replace(world.authority, now=lambda: time.time() + 3600)
    account = world.authority.accounts["workers"]
    there = world.broker.folder / "resolver" / f"{account}.jwt"
    (world.authority.folder / "ledger").unlink()  # as with one that was made by the version before
    await world.broker.kill()
    world.broker.guard = later.guard()
    await world.broker.start()
    await refused(identity.login)
    await world.push()
    await world.broker.kill()
    world.broker.guard = later.guard()
    await world.broker.start()
    await refused(identity.login)
    assert world.broker.guard is not None
    assert there.read_text() == world.broker.guard.accounts[account], "it says no less, and is newer"


async def test_a_machine_whose_token_is_from_the_future_is_cut_off_as_well(world: World) -> None:
    """The clock of the control plane that made it may have been ahead."""
    await world.control_plane()
    ahead = replace(world.authority, now=lambda: time.time() + 1800)
    path = world.folder / "units" / "worker-1" / "identity.json"
    identity = ahead.identity("worker-1", "worker", ("default",), world.base, path)
    await renew((await world.open(identity)).link, identity, path)
    await revoke(world, "worker-1")
    await refused(identity.login)


async def test_every_revocation_counts_also_when_many_come_at_once(world: World, tmp_path: Path) -> None:
    await world.control_plane()
    there = [await joined(world, tmp_path / f"m{i}" / "identity.json", f"box-{i}") for i in range(4)]
    await asyncio.gather(*(revoke(world, one.unit) for one in there))
    for one in there:
        await refused(one.login)


async def test_a_revocation_that_another_one_overtook_counts_as_well(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins and ends while the first is about to write what it knew before."""
    await world.control_plane()
    there = [await joined(world, tmp_path / f"m{i}" / "identity.json", f"box-{i}") for i in range(2)]
    overtaken = False

    class Slow(Link):
        async def call(self, subject: str, data: bytes = b"", *, wait_s: float = LONG_S) -> bytes:
            nonlocal overtaken
            if subject == registry.CLAIMS_UPDATE and not overtaken:
                overtaken = True
                await revoke(world, "box-1")
            return await super().call(subject, data, wait_s=wait_s)

    monkeypatch.setattr(registry, "Link", Slow)
    await revoke(world, "box-0")
    assert overtaken
    for one in there:
        await refused(one.login)


async def test_a_machine_that_is_revoked_renews_nothing(world: World, tmp_path: Path) -> None:
    """The record alone does that, should the broker not have been told yet."""
    await world.control_plane()
    path = tmp_path / "identity.json"
    identity = await joined(world, path)
    cluster, admin = await world.open(identity), await world.admin()
    units = await read_units(admin.config)
    record = {"key": units["box"].key, "role": "worker", "queues": ["default"], "revoked": 1}
    await admin.config.put("unit.box", msgspec.json.encode(record))
    with pytest.raises(TicketRefused, match="box was revoked"):
        await renew(cluster.link, identity, path)


async def test_a_machine_that_is_revoked_does_not_come_back_with_its_old_ticket(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    ticket, path = await world.ticket("worker", "default"), tmp_path / "identity.json"
    await enrol(ticket, path, name="box")
    await revoke(world, "box")
    path.unlink()
    with pytest.raises(TicketRefused, match="used up"):
        await enrol(ticket, path, name="box")


async def test_a_machine_that_is_revoked_comes_back_with_a_new_ticket_and_another_key(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    path = tmp_path / "identity.json"
    first = await joined(world, path)
    await revoke(world, "box")
    await asyncio.sleep(1.1)  # tokens count in seconds: the ticket is to be newer than what is there
    second = await joined(world, path)
    assert second.unit == "box"
    assert keys.public(second.login.seed) != keys.public(first.login.seed)
    await (await world.open(second)).store.logs.read("j1")
    await refused(first.login)


async def test_another_machine_may_have_the_name_of_one_that_was_revoked(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    first = await joined(world, tmp_path / "m0" / "identity.json")
    await revoke(world, "box")
    await joined(world, tmp_path / "m1" / "identity.json")
    await refused(first.login)
    await revoke(world, "box")
    await refused(first.login)


async def test_a_unit_of_up_is_revoked_as_any_other_and_up_may_bring_it_back(
    world: World, tmp_path: Path
) -> None:
    await world.control_plane()
    path = world.folder / "units" / "worker-1" / "identity.json"
    first = world.unit("worker-1", "worker", "default")
    cluster = await world.open(first)
    await renew(cluster.link, first, path)
    await revoke(world, "worker-1")
    async with asyncio.timeout(CUT_S_MAX):
        await cluster.link.refused.wait()
    await refused(world.unit("worker-1", "worker", "default").login)
    admin = await world.admin()
    await admin.forget_member("worker-1")  # who was cut off cannot say that it leaves
    assert "worker-1" not in {one.unit for one in await admin.store.presence.members()}
    # Nobody else takes its name meanwhile: `plan` would find it down for ever, beside the one that runs.
    with pytest.raises(Usage, match="the name worker-1 is taken") as caught:
        await joined(world, tmp_path / "m0" / "identity.json", "worker-1")
    assert "`mvmci up` brings worker-1 back" in str(caught.value.hint)
    path.unlink()
    await asyncio.sleep(1.1)
    second = world.unit("worker-1", "worker", "default")
    await renew((await world.open(second)).link, second, path)
    await refused(first.login)


async def test_revoking_what_is_not_there_says_so(world: World) -> None:
    admin = await world.admin()
    with pytest.raises(NotFound, match="no unit box"):
        await revoke_units(admin.config, world.authority, world.base, ["box"])
    with pytest.raises(NotFound, match="no ticket box"):
        await revoke_ticket(admin.config, world.authority, world.base, "box")


async def test_on_a_broker_of_the_users_own_a_machine_cannot_be_revoked(world: World, tmp_path: Path) -> None:
    external = Authority.of_external(tmp_path / "state" / "lent", world.unit("worker-1", "worker", "q").login)
    admin = await world.admin()
    with pytest.raises(Usage, match="not mvmci's") as caught:
        await revoke_units(admin.config, external, world.base, ["box"])
    assert "operator" in str(caught.value.hint)


async def test_all_units_of_a_host_are_cut_off_in_one_go_and_the_others_stay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.control_plane()
    roles: dict[str, UnitRole] = {"worker-1": "worker", "worker-2": "worker", "executor-1": "executor"}
    units = {name: world.unit(name, role, "default") for name, role in roles.items()}
    clusters = {name: await world.open(one) for name, one in units.items()}
    for name, one in units.items():
        path = world.folder / "units" / name / "identity.json"
        await renew(clusters[name].link, one, path)
    other = await world.open(world.unit("worker-3", "worker", "default"))
    told: list[str] = []

    class Counting(Link):
        async def call(self, subject: str, data: bytes = b"", *, wait_s: float = LONG_S) -> bytes:
            told.extend([subject] if subject == registry.CLAIMS_UPDATE else [])
            return await super().call(subject, data, wait_s=wait_s)

    monkeypatch.setattr(registry, "Link", Counting)
    admin = await world.admin()
    began = time.monotonic()
    await revoke_units(admin.config, world.authority, world.base, [*units])
    async with asyncio.timeout(CUT_S_MAX):
        for cluster in clusters.values():
            await cluster.link.refused.wait()
    assert time.monotonic() - began < CUT_S_MAX
    assert len(told) == len({"workers", "executors"}), "the broker is told once of each account"
    await other.store.logs.read("j1")
    assert not other.link.refused.is_set()
    records = await read_units(admin.config)
    for name, one in units.items():
        await refused(one.login)
        assert records[name].revoked, "whoever renews is refused by the record"
