"""The program that a cluster offers: who may say which it is, and who believes that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.identity import Identity
from mvmci.errors import MvmciError, TicketRefused, Usage
from mvmci.stores.nats import Cluster
from mvmci.system import keys
from mvmci.trust.authority import Authority
from mvmci.trust.enrol.client import enrol
from mvmci.trust.program import Offer, check_order, find_offer, is_wanted, keep_taken, machines, offer
from tests.parts.trust.conftest import World

MACHINE = "x86_64"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mvmci.pyz"
    path.write_bytes(b"a program" * 50_000)
    return path


async def joined(world: World, tmp_path: Path) -> tuple[Identity, Cluster]:
    """A worker that came with a ticket."""
    await world.control_plane()
    identity = await enrol(await world.ticket("worker", "default"), tmp_path / "box" / "identity.json")
    return identity, await world.open(identity, announce=False)


async def offered(admin: Cluster, authority: Authority, file: Path, version: str = "1.0") -> None:
    await offer(admin, authority, file, machine=MACHINE, version=version, at=1)


async def test_a_machine_that_joined_gets_what_the_clusters_key_signed(
    world: World, tmp_path: Path, file: Path
) -> None:
    admin = await world.admin()
    await world.push()
    assert not await is_wanted(admin.config)
    identity, cluster = await joined(world, tmp_path)
    assert await is_wanted(admin.config)
    assert await find_offer(cluster.config, identity, MACHINE) is None
    await offered(admin, world.authority, file)
    found = await find_offer(cluster.config, identity, MACHINE)
    assert found is not None
    assert (found.cluster, found.machine, found.version) == (identity.cluster, MACHINE, "1.0")
    await cluster.blobs.fetch(found.digest, tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == file.read_bytes()
    assert await find_offer(cluster.config, identity, "aarch64") is None
    assert await machines(cluster.config) == [MACHINE]


async def test_the_same_program_is_offered_once(world: World, file: Path) -> None:
    admin = await world.admin()
    await offered(admin, world.authority, file)
    before = await admin.config.get(f"program.{MACHINE}")
    await offered(admin, world.authority, file)
    assert await admin.config.get(f"program.{MACHINE}") == before
    file.write_bytes(b"another")
    await offered(admin, world.authority, file, "2.0")
    after = await admin.config.get(f"program.{MACHINE}")
    assert after is not None
    assert b"2.0" in after.value


async def test_an_offer_that_is_put_back_is_refused_by_who_took_a_later_one(
    world: World, tmp_path: Path, file: Path
) -> None:
    """Who has a control plane's host can do so, and what the older program lacks is known."""
    admin, key = await world.admin(), f"program.{MACHINE}"
    identity, cluster = await joined(world, tmp_path)

    async def found() -> Offer:
        offer = await find_offer(cluster.config, identity, MACHINE)
        assert offer is not None
        return offer

    await offered(admin, world.authority, file)
    before = await admin.config.get(key)
    assert before is not None
    older = await found()
    check_order(older, tmp_path)
    file.write_bytes(b"another")
    await offered(admin, world.authority, file, "2.0")  # at the same time, by our clock
    later, after = await found(), await admin.config.get(key)
    assert after is not None
    keep_taken(later, tmp_path)
    check_order(later, tmp_path)
    await admin.config.put(key, before.value)
    assert await found() == older
    with pytest.raises(TicketRefused, match="this machine had one of"):
        check_order(await found(), tmp_path)
    await admin.config.put(key, after.value)
    file.write_bytes(b"a program" * 50_000)
    await offered(admin, world.authority, file)
    assert (await found()).digest == older.digest
    check_order(await found(), tmp_path)  # `up` itself goes back to it


@pytest.mark.parametrize("lie", ["another key", "changed", "another machine", "another cluster", "nonsense"])
async def test_what_its_key_did_not_sign_is_refused(
    world: World, tmp_path: Path, file: Path, lie: str
) -> None:
    admin = await world.admin()
    identity, cluster = await joined(world, tmp_path)
    authority, key = world.authority, f"program.{MACHINE}"
    if lie == "another key":
        authority = dataclasses.replace(authority, account=keys.new_seed("account"))
    if lie == "another cluster":
        authority = dataclasses.replace(authority, cluster="other")
    await offered(admin, authority, file)
    there = await admin.config.get(key)
    assert there is not None
    value = there.value
    if lie == "changed":
        value = value.replace(b"1.0", b"0.9")
    if lie == "nonsense":
        value = b"\xff{"
    if lie == "another machine":
        key = "program.aarch64"
    await admin.config.put(key, value, expect=None)
    with pytest.raises(TicketRefused, match="not signed by its key"):
        await find_offer(cluster.config, identity, key.partition(".")[2])
    if lie in ("another key", "nonsense"):  # `up` puts it right
        await offered(admin, world.authority, file)
        assert await find_offer(cluster.config, identity, MACHINE) is not None


async def test_a_worker_cannot_offer_a_program(world: World, tmp_path: Path) -> None:
    _, cluster = await joined(world, tmp_path)
    with pytest.raises(MvmciError):
        await cluster.config.put(f"program.{MACHINE}", b"{}", expect=None)


async def test_where_nothing_is_signed_nothing_is_believed(world: World) -> None:
    admin = await world.admin()
    identity = world.unit("box", "worker", "default")
    unsigned = msgspec.structs.replace(identity, login=msgspec.structs.replace(identity.login, jwt=""))
    with pytest.raises(Usage, match="nothing there is signed"):
        await find_offer(admin.config, unsigned, MACHINE)
