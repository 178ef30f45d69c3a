"""What back-up and restore promise: all of it, what is new at each call, and nothing changed is believed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.deploy import backup
from mvmci.deploy.backup import MANIFEST, Report, back_up, restore
from mvmci.deploy.state import ClusterState
from mvmci.errors import Usage
from mvmci.jobs.journal import Lease
from mvmci.journals.client import submit
from mvmci.roles.witness import FILE, Watch
from mvmci.store import Chunk, ClusterSettings
from mvmci.stores.nats import Cluster, dial_cluster
from tests.harness.broker import Broker, ensure
from tests.parts.roles.test_reconciler import append
from tests.parts.roles.test_retention import end, spec

SETTINGS = ClusterSettings(store_bytes=64 << 20)
STORE = BrokerSettings(store_bytes=128 << 20)


def say(text: str) -> None:
    """Nobody listens."""


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    found = Broker(tmp_path / "first", STORE)
    await found.start()
    await ensure(found.url, "demo", store_bytes=SETTINGS.store_bytes)
    yield found
    await found.kill()


@pytest.fixture
async def cluster(broker: Broker) -> AsyncIterator[Cluster]:
    found = await dial_cluster(broker.url, "demo", "u", announce=False)
    await found.config.put_settings(SETTINGS)
    yield found
    await found.close()


async def save(cluster: Cluster, tmp_path: Path, **options: object) -> Report:
    state = ClusterState(tmp_path / "state", "demo")
    given = {"keys": False, "say": say, **options}
    return await back_up(cluster, state, tmp_path / "backup", **given)  # type: ignore[arg-type]


async def everything(cluster: Cluster) -> object:
    journals = [(job, entry.seq, entry.data) async for job, entry in cluster.store.journals.all()]
    names = sorted({name for part in ("drain", "unit", "ticket") for name in await cluster.config.all(part)})
    return journals, names, await cluster.store.logs.read("a"), await cluster.config.settings()


async def restored(tmp_path: Path, root: Path) -> Broker:
    """A broker on what was restored beneath `root`."""
    folder = root / "demo" / "broker"
    (account,) = (folder / "store" / "jetstream").iterdir()
    account.rename(account.with_name("$G"))  # a broker without a guard has this one account
    broker = Broker(folder, STORE)
    await broker.start()
    return broker


async def test_a_lost_store_comes_back_as_it_was_backed_up(
    cluster: Cluster, broker: Broker, tmp_path: Path
) -> None:
    for job in ("a", "b"):
        await end(cluster, job)
    await submit(cluster.store, await spec(cluster.store, "open"))
    await append(cluster, "open", Lease(at=1, epoch=1, unit="u", incarnation="i", run="r", why="first"))
    await cluster.store.logs.append(
        "a", "default", [Chunk(attempt=1, number=0, stream="stdout", data=b"hello", at=1)]
    )
    blob = await cluster.store.blobs.put(bytes(300_000))
    await cluster.config.put("drain.x", b"{}")
    await cluster.config.put("drain.y", b"{}")
    first = await save(cluster, tmp_path)
    await end(cluster, "c")
    await cluster.config.delete("drain.y")
    second = await save(cluster, tmp_path)
    assert second.new["jobs"] == 2
    assert second.messages["jobs"] == first.messages["jobs"] + 2
    assert second.new["blobs"] > 0
    assert (await save(cluster, tmp_path)).new == dict.fromkeys(backup.PARTS, 0)
    before = await everything(cluster)
    await Watch(cluster, tmp_path / FILE).look()
    await broker.kill()
    root = tmp_path / "elsewhere"
    report = restore(root, tmp_path / "backup", say=say)
    assert report.jobs == 4
    again = await restored(tmp_path, root)
    try:
        there = await dial_cluster(again.url, "demo", "plane", maintains=True)
        for _ in range(2):
            await there.maintain(SETTINGS)
        assert await everything(there) == before
        assert await there.store.blobs.get(blob) == bytes(300_000)
        assert await there.store.hints.pull("default", wait_s=0.5) is None  # no spec comes as if it were new
        watch = Watch(there, tmp_path / "new" / FILE)
        await watch.look()
        assert watch.loss is None
        assert await submit(there.store, await spec(there.store, "new"))
        hint = await there.store.hints.pull("default", wait_s=30)
        assert hint is not None
        assert hint.job == "new"
        await there.close()
    finally:
        await again.kill()


async def test_what_came_after_a_back_up_is_named_where_a_witness_is_left(
    cluster: Cluster, broker: Broker, tmp_path: Path
) -> None:
    await end(cluster, "a")
    await save(cluster, tmp_path)
    await end(cluster, "after")
    file = tmp_path / "elsewhere" / "demo" / "units" / "control-plane-1" / FILE
    await Watch(cluster, file).look()
    await broker.kill()
    report = restore(tmp_path / "elsewhere", tmp_path / "backup", say=say)
    assert report.missing[0] == "demo-JOBS ends at sequence 2, and had 4"
    again = await restored(tmp_path, tmp_path / "elsewhere")
    try:
        there = await dial_cluster(again.url, "demo", "plane", maintains=True)
        watch = Watch(there, file)
        await watch.look()
        assert watch.loss is not None
        await there.close()
    finally:
        await again.kill()


async def test_a_back_up_that_was_interrupted_is_finished_by_the_next(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in ("a", "b", "c"):
        await end(cluster, job)
    monkeypatch.setattr(backup, "SEGMENT_BYTES", 1_000)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await save(cluster, tmp_path, say=interrupt)
    with pytest.raises(Usage, match="never finished"):
        restore(tmp_path / "elsewhere", tmp_path / "backup", say=say)
    report = await save(cluster, tmp_path)
    assert report.messages["jobs"] == 6
    assert report.new["jobs"] < 6
    assert restore(tmp_path / "elsewhere", tmp_path / "backup", say=say).jobs == 3


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def point_outside(folder: Path) -> None:
    told = msgspec.json.decode((folder / MANIFEST).read_bytes())
    told["parts"]["jobs"]["segments"][0]["file"] = "../../../etc/passwd"
    (folder / MANIFEST).write_bytes(msgspec.json.encode(told))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed bit": (lambda folder: flip(next((folder / "jobs").glob("*.seg"))), "not as it was written"),
    "a file that is gone": (lambda folder: next((folder / "blobs").glob("*.seg")).unlink(), "cannot be read"),
    "a file that is elsewhere": (point_outside, "none of its files"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "is no back-up"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"[1"), "is damaged"),
    "a name that leads out": (
        lambda folder: (folder / MANIFEST).write_bytes(b'{"format":1,"cluster":"../x"}'),
        "cannot be a cluster name",
    ),
}


async def test_a_damaged_back_up_is_refused_in_a_sentence_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    await end(cluster, "a")
    await save(cluster, tmp_path)
    for number, (damage, said) in enumerate(DAMAGES.values()):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "backup", copy)
        damage(copy)
        with pytest.raises(Usage, match=said):
            restore(tmp_path / "elsewhere", copy, say=say)
    assert restore(tmp_path / "elsewhere", tmp_path / "backup", say=say).jobs == 1
    with pytest.raises(Usage, match="would take its place"):
        restore(tmp_path / "elsewhere", tmp_path / "backup", say=say)


async def test_a_folder_that_is_something_else_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "photo").write_bytes(b"x")
    with pytest.raises(Usage, match="is not empty"):
        await save(cluster, tmp_path)
