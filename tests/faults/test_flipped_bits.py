"""One bit of the broker's store is turned, at many places: every job is there, or the loss is said.

`MVMCI_FLIPS` and `MVMCI_FLIP_JOBS` say how many places, and in a store with how many jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.broker import BrokerSettings
from mvmci.deploy.recover import Missing, missing, read_damage
from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import Done, Journal, Lease
from mvmci.journals.client import submit
from mvmci.roles.broker import FOLDER, check
from mvmci.roles.witness import FILE, Watch
from mvmci.stores.nats import Cluster, dial_cluster
from tests.harness.broker import Broker, ensure
from tests.parts.roles.test_retention import spec

FLIPS = int(os.environ.get("MVMCI_FLIPS", "8"))
JOBS = int(os.environ.get("MVMCI_FLIP_JOBS", "60"))
SEED = int(os.environ.get("MVMCI_FLIP_SEED", "1"))
AT_ONCE = 200
STORE = BrokerSettings(store_bytes=1 << 30)


async def fill(cluster: Cluster) -> None:
    """`JOBS` jobs, of which nine in ten have ended."""
    first = await spec(cluster.store, "job-0")
    done = (Lease(at=1, epoch=1, unit="plane", incarnation="i", run="r", why="first"),)

    async def one(number: int) -> None:
        journal = Journal(f"job-{number}")
        await submit(cluster.store, msgspec.structs.replace(first, id=journal.job))
        if number % 10:
            journal.absorb(await cluster.store.journals.read(journal.job))
            data = journal.encode([*done, Done(at=1, status="succeeded")], "m")
            await cluster.store.journals.append(journal.job, "done", "default", data, expect=journal.tail)

    for start in range(0, JOBS, AT_ONCE):
        await asyncio.gather(*map(one, range(start, min(start + AT_ONCE, JOBS))))


async def whole(cluster: Cluster) -> set[str]:
    """The jobs whose journals are as they were written."""
    journals: dict[str, Journal] = {}
    async for job, entry in cluster.store.journals.all():
        journals.setdefault(job, Journal(job)).absorb([entry])
    return {
        job
        for job, one in journals.items()
        if one.state.corrupt is None
        and one.state.spec is not None
        and one.state.ended == bool(int(job.partition("-")[2]) % 10)
    }


async def looked(broker: Broker, witness: Path) -> tuple[Watch, set[str], Missing | None]:
    """What a control plane says that comes to it, which jobs are whole, and what `recover` would tell."""
    await broker.start()
    cluster = await dial_cluster(broker.url, "demo", "plane", maintains=True)
    try:
        watch = Watch(cluster, witness)
        with contextlib.suppress(StoreUnavailable):
            await watch.look()
        await ensure(broker.url, "demo", store_bytes=STORE.store_bytes)
        await watch.look()
        return watch, await whole(cluster), await missing(cluster, read_damage(broker.folder.parent))
    finally:
        await cluster.close()


def flip(folder: Path, draw: random.Random) -> str:
    """Turn one bit of all that the broker keeps of journals and configuration."""
    files = [
        file
        for name in ("demo-JOBS", "KV_demo-CONFIG", "OBJ_demo-BLOBS")
        for file in sorted((folder / "store" / "jetstream" / "$G" / "streams" / name).rglob("*"))
        if file.is_file() and file.stat().st_size
    ]
    (file,) = draw.choices(files, [file.stat().st_size + 500 for file in files])
    data = bytearray(file.read_bytes())
    bit = draw.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"{file.relative_to(folder)} bit {bit}"


@dataclass
class Stopped:
    """A broker that was filled and stopped, and the witness of what it had."""

    folder: Path
    witness: Path

    async def after(
        self, damage: Callable[[Path], object], copy: Path
    ) -> tuple[Watch, set[str], Missing | None]:
        """How a copy of it comes up that was damaged."""
        shutil.copytree(self.folder, copy)
        shutil.copy(self.witness, copy / FILE)
        damage(copy)
        check(copy)
        broken = Broker(copy, STORE)
        try:
            return await looked(broken, copy / FILE)
        finally:
            await broken.kill()
            shutil.rmtree(copy)


async def stopped(folder: Path, stop: str) -> Stopped:
    broker, witness = Broker(folder / "broker", STORE), folder / FILE
    await broker.start()
    await ensure(broker.url, "demo", store_bytes=STORE.store_bytes)
    cluster = await dial_cluster(broker.url, "demo", "plane", announce=False)
    await fill(cluster)
    await Watch(cluster, witness).look()
    await cluster.close()
    await getattr(broker, stop)()
    return Stopped(broker.folder, witness)


@pytest.mark.parametrize("stop", ["stop", "kill"])
async def test_a_bit_that_is_turned_in_the_store_costs_no_job_in_silence(tmp_path: Path, stop: str) -> None:
    store, draw, ends = await stopped(tmp_path, stop), random.Random(SEED), Counter[str]()
    for number in range(FLIPS):
        where: list[str] = []
        watch, jobs, _ = await store.after(
            lambda copy, where=where: where.append(flip(copy, draw)),  # type: ignore[misc]
            tmp_path / f"copy-{number}" / FOLDER,
        )
        assert watch.loss is not None or len(jobs) == JOBS, where
        ends["said" if watch.loss is not None else "whole"] += 1
        if watch.loss is not None:
            print(where, len(jobs), watch.loss.what)
    print(stop, ends)


def streams(copy: Path) -> Path:
    return copy / "store" / "jetstream" / "$G" / "streams"


def overwrite(file: Path, at: int, data: bytes) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {  # and how many jobs it may cost at the most
    "zeros in the middle": (
        lambda copy: overwrite(streams(copy) / "demo-JOBS/msgs/1.blk", 9_000, bytes(64)),
        1,
    ),
    "a page": (lambda copy: overwrite(streams(copy) / "demo-JOBS/msgs/1.blk", 8_192, b"x" * 4_096), 9),
    "half of a block": (lambda copy: os.truncate(streams(copy) / "demo-JOBS/msgs/1.blk", 20_000), JOBS),
    "no block": (lambda copy: (streams(copy) / "demo-JOBS/msgs/1.blk").unlink(), JOBS),
    "no stream": (lambda copy: shutil.rmtree(streams(copy) / "demo-JOBS"), JOBS),
    "what a stream is": (
        lambda copy: overwrite(streams(copy) / "demo-JOBS/meta.inf", 20, b"garbage garbage"),
        JOBS,
    ),
    "the hash of what it is": (
        lambda copy: overwrite(streams(copy) / "demo-JOBS/meta.sum", 0, b"00ff" * 4),
        0,
    ),
    "what the server remembers": (
        lambda copy: overwrite(streams(copy) / "demo-JOBS/msgs/index.db", 20, b"garbage garbage"),
        0,
    ),
    "configuration": (
        lambda copy: overwrite(streams(copy) / "KV_demo-CONFIG/msgs/1.blk", 100, b"garbage garbage"),
        JOBS,
    ),
    "no configuration": (lambda copy: shutil.rmtree(streams(copy) / "KV_demo-CONFIG"), JOBS),
    "no store": (lambda copy: shutil.rmtree(copy / "store"), JOBS),
}


async def test_damage_costs_what_it_covers_and_is_said(tmp_path: Path) -> None:
    store = await stopped(tmp_path, "stop")
    for name, (damage, cost) in DAMAGES.items():
        watch, jobs, told = await store.after(damage, tmp_path / "copy" / FOLDER)
        assert len(jobs) >= JOBS - cost, name
        assert watch.loss is not None or len(jobs) == JOBS, name
        if cost not in (0, JOBS):
            assert told is not None
            assert len(told.gaps) == 1, name
            assert told.jobs or told.damaged, name  # of several that lie together, the first has a name
