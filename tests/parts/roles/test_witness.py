"""What the watch promises: what was acknowledged and is gone is said, and nothing goes on in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.witness import Removal, Witness
from mvmci.deploy.recover import accept, missing
from mvmci.errors import StoreLost, StoreUnavailable
from mvmci.jobs.journal import Lease
from mvmci.journals.client import submit
from mvmci.roles.control_plane import ControlPlane
from mvmci.roles.reconciler import Reconciler
from mvmci.roles.unit import read_settings
from mvmci.roles.witness import Watch
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster, remove
from mvmci.system.tasks import cancel
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure
from tests.harness.waiting import LONG_S, until_true
from tests.parts.roles.conftest import Place
from tests.parts.roles.test_reconciler import append
from tests.parts.roles.test_retention import end, spec


@pytest.fixture
async def plane(place: Place) -> Cluster:
    return await place.join("control-plane", maintains=True, listens=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "witness.json"


async def looked(plane: Cluster, file: Path) -> Watch:
    """A control plane that has just come, and has looked."""
    watch = Watch(plane, file)
    await watch.look()
    return watch


async def test_messages_that_nothing_removed_are_a_loss_until_the_owner_accepts_it(
    plane: Cluster, client: Cluster, place: Place, file: Path
) -> None:
    await submit(client.store, await spec(client.store, "a"))
    await append(client, "a", Lease(at=1, epoch=1, unit="u", incarnation="i", run="r", why="first"))
    watch = await looked(plane, file)
    assert watch.loss is None
    await plane.journals.purge(Removal("a", 2, 1))  # the spec of `a`
    await watch.look()
    assert watch.loss is not None
    assert "lacks 1 messages that nothing removed" in watch.loss.what[0]
    other = await place.join("other", announce=False)
    with pytest.raises(StoreLost, match="takes no jobs") as refused:
        await submit(other.store, await spec(other.store, "c"))
    assert "mvmci recover" in (refused.value.hint or "")
    told = await missing(plane)
    assert told is not None
    assert (told.gaps, told.removed) == ([(1, 1)], 0)
    assert set(told.damaged) == {"a"}
    await accept(plane)
    await watch.look()
    assert watch.loss is None
    assert await missing(plane) is None
    assert await submit(other.store, await spec(other.store, "c"))
    assert (await looked(plane, file)).loss is None


async def test_who_has_no_file_knows_of_a_loss_by_what_config_says(
    plane: Cluster, client: Cluster, file: Path
) -> None:
    await submit(client.store, await spec(client.store, "a"))
    await looked(plane, file)
    await plane.journals.purge(Removal("a", 2, 1))
    assert (await looked(plane, file.with_name("another.json"))).loss is not None


async def test_each_record_of_config_has_headers_without_which_a_bit_of_it_could_turn_unseen(
    plane: Cluster, file: Path
) -> None:
    await looked(plane, file)
    await plane.config.put("drain.worker-1", b"yes")
    await plane.config.tell()
    records = [one async for one in plane.link.read(plane.layout.config, ">")]
    assert {plane.layout.setting_of(one.subject) for one in records} >= {"witness", "drain.worker-1"}
    for one in records:
        assert one.headers.get("Nats-Expected-Stream") == plane.layout.config, one.subject


async def test_an_open_job_that_is_gone_is_named(plane: Cluster, client: Cluster, file: Path) -> None:
    await submit(client.store, await spec(client.store, "gone"))
    watch = Watch(plane, file, open_jobs=lambda: [("gone", 1)])
    await watch.look()
    await plane.journals.purge(Removal("gone", 2, 1))
    await watch.look()
    told = await missing(plane)
    assert told is not None
    assert told.jobs == ["gone"]


async def test_after_a_loss_jobs_are_looked_after_whose_sequences_are_used_again(
    plane: Cluster, client: Cluster, place: Place
) -> None:
    lost = False
    reconciler = Reconciler(plane, paused=lambda: lost)
    for job in ("a", "b", "c"):
        await end(client, job)
    await reconciler.look()
    lost = True
    await plane.link.api(f"STREAM.DELETE.{plane.layout.jobs}")
    await reconciler.look()
    await ensure(place.url, place.name, store_bytes=CLUSTER_BYTES, queues=("default",))
    lost = False
    other = await place.join("other", announce=False)
    await submit(other.store, await spec(other.store, "new"))
    await reconciler.look()
    assert [job for job, _ in reconciler.open_jobs()] == ["new"]


async def test_what_retention_removes_is_no_loss_also_if_it_dies_over_it(
    plane: Cluster, client: Cluster, file: Path
) -> None:
    for job in ("a", "b"):
        await end(client, job)
    watch = await looked(plane, file)
    await watch.remove([Removal("a", 2, 1)])
    await watch.look()
    assert watch.loss is None
    witness, revision = await plane.config.witness()
    assert witness is not None
    assert witness.jobs.removed == 1
    begun = msgspec.structs.replace(witness, removals=(Removal("a", 3, 1), Removal("b", 4, 1)))
    await plane.config.put_witness(begun, expect=revision)
    await plane.journals.purge(begun.removals[0])  # and then it died
    again = await looked(plane, file)
    assert again.loss is None
    jobs = await plane.look("jobs")
    assert jobs is not None
    assert jobs.removed == 3
    await plane.journals.purge(Removal("b", 5, 1))
    await again.look()
    assert again.loss is not None


@pytest.mark.parametrize("when", ["at any time", "after a look at the settings, before that for the streams"])
async def test_a_store_that_goes_while_the_cluster_runs_is_a_loss_that_all_can_read(
    plane: Cluster, client: Cluster, place: Place, file: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    settings = ClusterSettings(store_bytes=CLUSTER_BYTES, queues=("default", "other"))
    await plane.config.put_settings(settings)
    await end(client, "a")
    control = ControlPlane(plane, file)
    running = asyncio.create_task(control.run())
    await until_true(file.exists)
    lacks = Cluster.lacks

    async def go_and_look(self: Cluster, queues: Iterable[str]) -> bool:
        """Whoever finds it so makes all of it anew, without settings."""
        monkeypatch.setattr(Cluster, "lacks", lacks)
        await remove(place.url, place.name)
        return await lacks(self, queues)

    if when == "at any time":
        await remove(place.url, place.name)
    else:
        monkeypatch.setattr(Cluster, "lacks", go_and_look)

    async def told() -> bool:
        try:
            return await client.config.loss() is not None
        except StoreUnavailable:
            return False

    await until_true(told)
    async with asyncio.timeout(LONG_S):
        assert await read_settings(client) == settings
    await accept(plane)
    await until_true(lambda: control.watch.loss is None)
    assert await submit(client.store, await spec(client.store, "b"))
    await cancel(running)


@pytest.mark.parametrize("stream", ["jobs", "blobs", "config"])
async def test_a_stream_that_was_made_anew_is_a_loss(
    plane: Cluster, client: Cluster, place: Place, file: Path, stream: str
) -> None:
    await end(client, "a")
    await looked(plane, file)
    await plane.link.api(f"STREAM.DELETE.{getattr(plane.layout, stream)}")
    gone = await looked(plane, file) if stream != "config" else Watch(plane, file)
    await ensure(place.url, place.name, store_bytes=CLUSTER_BYTES)
    for watch in (gone, Watch(plane, file)):
        await watch.look()
        assert watch.loss is not None
        assert getattr(plane.layout, stream) in watch.loss.what[0]
    assert await plane.config.loss() is not None
    told = await missing(plane)
    assert told is not None
    assert all(first >= 1 for first, _ in told.gaps)


async def test_an_older_copy_of_the_store_is_known_by_the_witness_outside_of_it(
    plane: Cluster, client: Cluster, file: Path
) -> None:
    await end(client, "a")
    await looked(plane, file)
    newer = msgspec.json.decode(file.read_bytes(), type=Witness)
    assert newer.config is not None
    config = msgspec.structs.replace(newer.config, last=newer.config.last + 100)
    jobs = msgspec.structs.replace(newer.jobs, last=newer.jobs.last + 7, messages=newer.jobs.messages + 7)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(newer, jobs=jobs, config=config)))
    watch = await looked(plane, file)
    assert watch.loss is not None
    assert len(watch.loss.what) == 2
    assert watch.loss.last == jobs.last
    await accept(plane)
    assert (await looked(plane, file)).loss is None


async def test_a_key_that_config_lost_is_a_loss(plane: Cluster, file: Path) -> None:
    await plane.config.put("unit.a", b"{}")
    watch = await looked(plane, file)
    await plane.link.api(f"STREAM.PURGE.{plane.layout.config}", filter=plane.layout.setting("unit.a"))
    await watch.look()
    assert watch.loss is not None
    assert "lacks 1 keys" in watch.loss.what[0]


async def test_a_sweep_of_blobs_is_no_loss_and_bytes_that_go_otherwise_are(
    plane: Cluster, client: Cluster, file: Path
) -> None:
    await client.store.blobs.put(b"stray")
    await client.store.blobs.put(b"kept")
    watch = await looked(plane, file)
    old = await plane.blobs.older_than(-1)
    async with watch.sweeping():
        await plane.blobs.remove(old[0])
    await watch.look()
    assert watch.loss is None
    await plane.blobs.remove(old[1])
    await watch.look()
    assert watch.loss is not None
