"""A power cut: whatever was acknowledged before it is there after it; with relaxed durability it is not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import Spec
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.store import Store
from tests.conftest import open_nats
from tests.faults.chaos import disk
from tests.faults.chaos.disk import Disk, mounted, new_disk
from tests.harness import broker
from tests.harness.broker import Broker, ensure
from tests.harness.places import need
from tests.harness.waiting import LONG_S

CLUSTER = "demo"
STORE_BYTES = 128 << 20
CUTS = 20
CLIENTS = 8
BETWEEN_S = (0.02, 0.2)  # from one cut to the next
HEARD_S = 0.05  # for answers that the broker gave before it stood still
LOOK_S = 0.005
READ_WHOLE = 50  # of the newest jobs
SEED = 1


@pytest.fixture
def old_disk(tmp_path: Path) -> AsyncIterator[Disk]:
    need(not disk.missing(), disk.missing())
    with new_disk(tmp_path) as found:
        yield found


def spec(job: str) -> Spec:
    digest = "sha256:" + "0" * 64
    return Spec(
        at=1,
        id=job,
        queue="default",
        kind="workflow",
        module=digest,
        name="m",
        component=True,
        seed=1,
        by="t",
    )


@dataclass
class Load:
    """Clients that submit jobs, one after the other each; `acknowledged` in the order of the answers."""

    store: Store
    acknowledged: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        try:
            yield
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def goes_on(self) -> None:
        """Until submits are acknowledged again: it is cut under load, or not at all."""
        before = len(self.acknowledged)
        async with asyncio.timeout(LONG_S):
            while len(self.acknowledged) <= before + CLIENTS:  # noqa: ASYNC110 (nobody tells of it)
                await asyncio.sleep(LOOK_S)

    async def _client(self, number: int) -> None:
        turn = 0
        while True:
            job = f"j-{number}-{turn}"
            await submit(self.store, spec(job))
            self.acknowledged.append(job)
            turn += 1


async def cut(server: Broker, load: Load, disk: Disk, to: Path) -> list[str]:
    """Copy the disk at this instant; what was acknowledged by then."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(HEARD_S)
        acknowledged = list(load.acknowledged)
        await asyncio.to_thread(disk.copy, to)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    return acknowledged


async def lost(image: Path, folder: Path, acknowledged: list[str], settings: BrokerSettings) -> list[str]:
    """The acknowledged jobs that a broker does not find on a disk that lost its power."""
    with mounted(image, folder) as after:
        server = Broker(after.folder / "broker", settings)
        await server.start()
        try:
            store = await open_nats(server.url, CLUSTER, "reader", announce=False)
            try:
                there = {job async for job in store.journals.jobs()}
                for job in acknowledged[-READ_WHOLE:]:
                    if job in there:
                        assert (await load(store, job)).state.spec == spec(job)
            except StoreUnavailable:
                there = set()  # not even the stream
            finally:
                await store.close()
        finally:
            await server.stop()
    return [job for job in acknowledged if job not in there]


@asynccontextmanager
async def loaded(disk: Disk, settings: BrokerSettings) -> AsyncIterator[tuple[Broker, Load]]:
    """A broker on `disk`, and clients at work on it."""
    server = Broker(disk.folder / "broker", settings)
    await server.start()
    try:
        await ensure(server.url, CLUSTER, store_bytes=STORE_BYTES)
        store = await open_nats(server.url, CLUSTER, "client", announce=False)
        load = Load(store)
        try:
            await asyncio.to_thread(disk.sync)
            async with load.at_work():
                yield server, load
        finally:
            await store.close()
    finally:
        await server.stop()


def test_a_copy_shows_its_own_instant_though_another_has_the_last_one_mounted(
    old_disk: Disk, tmp_path: Path
) -> None:
    image, after, name = tmp_path / "copy.img", tmp_path / "after", "written"
    with ExitStack() as others:
        for text in ("one", "two"):
            (old_disk.folder / name).write_text(text)
            old_disk.sync()
            old_disk.copy(image)
            with mounted(image, after) as copy:
                assert (copy.folder / name).read_text() == text
                others.enter_context(own_mounts())


@contextmanager
def own_mounts() -> Iterator[None]:
    """A process that keeps all that is mounted now mounted for itself, as a sandbox or a container does."""
    command = ["unshare", "--mount", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()  # it has them
        try:
            yield
        finally:
            process.stdin.close()


async def test_an_acknowledged_submit_survives_a_power_cut_twenty_times_out_of_twenty(
    old_disk: Disk, tmp_path: Path
) -> None:
    dice = random.Random(SEED)
    settings = BrokerSettings(store_bytes=2 * STORE_BYTES)
    image = tmp_path / "copy.img"
    counts = []
    async with loaded(old_disk, settings) as (server, load):
        for _ in range(CUTS):
            await load.goes_on()
            await asyncio.sleep(dice.uniform(*BETWEEN_S))
            acknowledged = await cut(server, load, old_disk, image)
            assert await lost(image, tmp_path / "after", acknowledged, settings) == []
            counts.append(len(acknowledged))
    print(f"{CUTS} power cuts, {counts[0]} to {counts[-1]} acknowledged submits, none lost")


async def test_with_relaxed_durability_the_same_power_cut_loses_acknowledged_submits(
    old_disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "check_monitor", lambda _: None)  # it would refuse such a broker
    settings = BrokerSettings(store_bytes=2 * STORE_BYTES, synced=False)
    image = tmp_path / "copy.img"
    async with loaded(old_disk, settings) as (server, load):
        await load.goes_on()
        acknowledged = await cut(server, load, old_disk, image)
    gone = await lost(image, tmp_path / "after", acknowledged, settings)
    print(f"{len(gone)} of {len(acknowledged)} acknowledged submits lost")
    assert gone
