"""Whatever a credential may write, it harms nothing but what is its own.

Messages by the schema and beside it, whole and damaged, on every subject that a role may publish to; while
units, jobs and verbs of others go on. `MVMCI_FUZZ` says how many (600 by default).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mvmci.cluster.identity import Identity, UnitRole
from mvmci.engines import open_embedded
from mvmci.engines.remote import Reply, RunRequest
from mvmci.engines.server import Executor, serve_requests
from mvmci.jobs.allow import Allow
from mvmci.jobs.job import ENDS
from mvmci.jobs.journal import AnyRecord, Done, Journal, Lease, status
from mvmci.journals.client import cancel_job, submit
from mvmci.journals.reader import load
from mvmci.roles.control_plane import ControlPlane
from mvmci.roles.worker import Worker
from mvmci.store import Chunk, ClusterSettings, Member
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.blobs import _Info
from mvmci.stores.nats.layout import Layout
from mvmci.system.files import write_private
from mvmci.trust.enrol.client import EnrolRequest
from mvmci.trust.permissions import permissions
from tests.harness import schema
from tests.harness.waiting import until_done, until_journal
from tests.harness.world import command_spec, script_spec
from tests.parts.trust.conftest import CLUSTER, QUEUES, STORE_BYTES, World

COUNT = int(os.environ.get("MVMCI_FUZZ", "600"))
SEED = int(os.environ.get("MVMCI_FUZZ_SEED", "1"))
ROUND = 1_000
AT_ONCE = 100
NOT_HERE = ("$JS.", f"{CLUSTER}.api.", "$KV.demo-CONFIG", f"{CLUSTER}.job.")
DRAWN = 10  # values in one example
LAYOUT = Layout(CLUSTER)
ROLES: tuple[UnitRole, ...] = ("worker", "executor", "client", "control-plane")
JUNK = ("*", ">", "A", "\u00fc", "a" * 200, "-")
VERBS = (
    "list --limit 0",
    "list --json",
    "status",
    "status --json",
    "history",
    "history --json",
    "logs",
    "artifacts",
)


def draw(strategy: schema.Strategy, count: int, number: int) -> list[Any]:
    """About `count` values."""
    found: list[Any] = []
    some = st.lists(strategy, min_size=DRAWN, max_size=DRAWN)

    @seed(number)
    @settings(
        max_examples=max(count // DRAWN, 2),
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(some)
    def collect(values: list[Any]) -> None:
        found.extend(values)

    collect()
    return found


@pytest.fixture
def synced() -> bool:
    """What is tried here is not whether it survives a power cut."""
    return False


@dataclass
class Fuzz:
    """Who writes, and about what."""

    attackers: dict[UnitRole, tuple[Identity, Cluster]]
    journals: dict[str, Journal]  # of others' jobs, as they stand
    random: random.Random
    fresh: list[str] = field(default_factory=list)  # jobs that were made up

    async def round(self, count: int, number: int) -> None:
        records = schema.values(AnyRecord) | schema.beside(AnyRecord)
        others = {
            "log": schema.values(Chunk) | schema.beside(Chunk),
            "member": schema.values(Member) | schema.beside(Member),
            "info": schema.values(_Info) | schema.beside(_Info),
            "order": schema.values(RunRequest) | schema.beside(RunRequest),
            "reply": schema.values(Reply) | schema.beside(Reply),
            "renew": schema.values(EnrolRequest) | schema.beside(EnrolRequest),
        }
        pool = await asyncio.to_thread(draw, records, count, number)
        rest = {name: await asyncio.to_thread(draw, one, count // 20, number) for name, one in others.items()}
        for place, record in enumerate(pool):
            if place % AT_ONCE == 0:
                await self._arrived()
            role = self.random.choice(ROLES)
            identity, cluster = self.attackers[role]
            allowed = permissions(LAYOUT, role, identity.unit, identity.queues).publish
            journals = [one for one in allowed if one.startswith(f"{CLUSTER}.job.")]
            ours = [one for one in allowed if not one.startswith(NOT_HERE)]
            if self.random.random() < 0.8 or not ours:
                about = self.random.choice(list(self.journals))
                subject, data = self.random.choice(journals), self._message(about, record, role)
                if self.random.random() < 0.7:
                    subject = subject.replace(".job.*.", f".job.{about}.")
            else:
                subject = self.random.choice(ours)
                data = self._damage(msgspec.json.encode(self.random.choice(rest[_kind_of(subject)])))
            await cluster.link.publish(self._literal(subject), data)
        await self._arrived()

    async def _arrived(self) -> None:
        """All that was sent is stored, or refused."""
        for role, (identity, cluster) in self.attackers.items():
            kind = {"control-plane": "done", "worker": "run"}.get(role, "cancel")
            unit = f"_{identity.unit}" if role == "control-plane" else identity.unit
            last = f"{CLUSTER}.job.last.{kind}.default.{unit}"
            await cluster.link.request(last, b"the last")

    def _message(self, about: str, record: Any, role: UnitRole) -> bytes:
        """A message of a journal, as one who knows that journal would write it, or nearly."""
        journal = self.journals[about]
        if role == "control-plane" and about == "asleep":
            journal = Journal(about)  # else it may say that time is up: that is its office
        records = [record] * self.random.choice((1, 1, 1, 2))
        if self.random.random() < 0.3:
            records.insert(0, msgspec.to_builtins(self._lease(journal, role)))
        if self.random.random() < 0.2:
            records.append(msgspec.to_builtins(Done(at=1, status=self.random.choice(ENDS))))
        return self._damage(journal.encode(records, f"fuzz{self.random.random()}"))

    def _lease(self, journal: Journal, role: UnitRole) -> Lease:
        unit = self.attackers[role][0].unit
        return Lease(at=1, epoch=journal.state.epoch + 1, unit=unit, incarnation="i", run="r", why="first")

    def _damage(self, data: bytes) -> bytes:
        how = self.random.random()
        at = self.random.randrange(len(data))
        if how < 0.1:
            return data[:at]
        if how < 0.2:
            return data[:at] + bytes([data[at] ^ self.random.randrange(1, 256)]) + data[at + 1 :]
        return self.random.randbytes(at) if how < 0.25 else data

    def _literal(self, subject: str) -> str:
        """A subject of the pattern: of another's job mostly, else of one that is made up, or of nonsense."""
        tokens = subject.split(".")
        for place, token in enumerate(tokens):
            if token in ("*", ">"):
                tokens[place] = self._token() if self.random.random() < 0.95 else self.random.choice(JUNK)
        return ".".join(tokens)

    def _token(self) -> str:
        if self.random.random() < 0.6:
            return self.random.choice(list(self.journals))
        if not self.fresh or self.random.random() < 0.2:
            self.fresh.append(f"f{self.random.randrange(10**9)}")
        return self.random.choice([*self.fresh[-20:], "default", "other"])


def _kind_of(subject: str) -> str:
    """Which of the things that are no records is written there."""
    second = subject.removeprefix(f"{CLUSTER}.").split(".")[0]
    known = {"log": "log", "engine": "order", "ping": "order", "reply": "reply", "renew": "renew"}
    return known.get(second, "member" if subject.startswith("$KV") else "info" if ".M." in subject else "log")


@asynccontextmanager
async def units(world: World, root: Path) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """A control plane, a worker a queue, and an executor."""
    async with AsyncExitStack() as stack:
        running: list[asyncio.Task[Any]] = []

        def start(main: Coroutine[Any, Any, Any], name: str) -> None:
            running.append(asyncio.create_task(main, name=name))

        await world.control_plane()
        plane = await world.open(world.unit("control-plane-2", "control-plane"), maintains=True)
        start(ControlPlane(plane).run(), "control plane")
        for name, role, queue in (
            ("worker-1", "worker", "default"),
            ("worker-2", "worker", "other"),
            ("executor-1", "executor", "default"),
        ):
            cluster = await world.open(world.unit(name, role, queue))  # type: ignore[arg-type]
            engine = open_embedded(cluster.store, root, allow=lambda: Allow(exec=("true",)), slots=2)
            stack.push_async_callback(engine.close)
            if role == "worker":
                start(Worker(cluster.store, engine, queues=(queue,), slots=2).run(), name)
            else:
                executor = Executor(engine, cluster.store, slots=2)
                start(serve_requests(executor, cluster.link, cluster.layout), name)
        try:
            yield running
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def jobs_of_others(client: Cluster) -> dict[str, Journal]:
    """One that succeeded, one that was cancelled, and one that sleeps, of the queue `other`."""
    store = client.store
    sleeps = await script_spec(store, "asleep", [{"sleep": 3_600_000}])
    for spec in (
        await command_spec(store, "ended", "hello"),
        await script_spec(store, "cancelled", []),
        sleeps,
    ):
        await submit(
            store, msgspec.structs.replace(spec, queue="other" if spec.id != "cancelled" else "nobody")
        )
    await cancel_job(store, await load(store, "cancelled"), "me")
    return {
        "ended": await until_done(store, "ended"),
        "cancelled": await until_done(store, "cancelled"),
        "asleep": await until_journal(store, "asleep", lambda journal: journal.state.released is not None),
    }


async def assert_works(client: Cluster, number: int) -> None:
    """Jobs run on each queue."""
    store = client.store
    for queue in ("default", "other"):
        spec = await command_spec(store, f"good-{queue}-{number}", "hello")
        await submit(store, msgspec.structs.replace(spec, queue=queue))
        assert status((await until_done(store, spec.id)).state)[0] == "succeeded"


async def verb(world: World, line: str) -> tuple[int, str]:
    argv = [*line.split(), "--state", str(world.folder.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mvmci",
        *argv,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert b"a bug in mvmci" not in err, err.decode()
    return process.returncode or 0, out.decode()


async def test_nothing_that_a_role_may_write_harms_what_is_anothers(world: World, host_root: Path) -> None:
    admin = await world.admin()
    await admin.config.put_settings(ClusterSettings(store_bytes=STORE_BYTES, queues=QUEUES))
    async with units(world, host_root) as running:
        before = await jobs_of_others(admin)
        names = {
            "worker": "worker-9",
            "executor": "executor-9",
            "client": "laptop",
            "control-plane": "plane-9",
        }
        attackers = {}
        for role in ROLES:
            identity = world.unit(names[role], role, *(() if role == "control-plane" else ("default",)))
            attackers[role] = identity, await world.open(identity, announce=False)
        fuzz = Fuzz(attackers, before, random.Random(SEED))
        written = stored = 0
        while written < COUNT:
            some = min(ROUND, COUNT - written)
            await fuzz.round(some, SEED + written)
            written += some
            stored = (await admin.link.api(f"STREAM.INFO.{LAYOUT.jobs}"))["state"]["last_seq"]
            assert stored > written // 2, "they do not arrive"
            for task in running:
                assert not task.done(), (task.get_name(), task.exception())
            for job, journal in before.items():
                now = await load(admin.store, job)
                assert (now.records, status(now.state)) == (journal.records, status(journal.state)), job
            await assert_works(admin, written)
        assert len([job async for job, _ in admin.store.journals.newest()]) >= len(before)
        write_private(world.folder / "client.json", msgspec.json.encode(world.authority.admin(world.base)))
        ids = ["ended", "asleep", *fuzz.fresh[:3]]
        lines = [
            line
            for verb in VERBS
            for line in ([verb] if "list" in verb else [f"{verb} {job}" for job in ids])
        ]
        for line in lines:
            code, out = await verb(world, line)
            assert code in (0, 2), (line, code)
            assert "\x1b" not in out
