"""What each credential may do, tried with a plain client on everything that it may not.

The subjects that are tried are written down here, and taken from what every *other* role may do: what is
nobody's own is tried as well.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from mvmci.jobs.journal import Lease
from mvmci.roles.control_plane import ControlPlane
from mvmci.store import About, Chunk, ClusterSettings, Member
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from mvmci.trust.enrol.client import renew
from mvmci.trust.permissions import Grantee, inbox, permissions
from tests.harness.waiting import LONG_S
from tests.parts.trust.conftest import CLUSTER, World

LAYOUT = Layout(CLUSTER)
ROLES: tuple[Grantee, ...] = (*(role for kind in get_args(Grantee) for role in get_args(kind)),)
WORKER = permissions(LAYOUT, "worker", "worker-1", ["default"])
STREAMS = (LAYOUT.jobs, LAYOUT.hints, LAYOUT.logs, LAYOUT.blobs, LAYOUT.members, LAYOUT.config)
CONSUMERS = ("spec-default", "ready-default", "spec-other", "ready-other", "mine")


def words(text: str) -> list[str]:
    return text.split()


# What a client of JetStream can ask, all of it: `s` is a stream, `c` a consumer.
JETSTREAM = words(
    """
    INFO ACCOUNT.PURGE.A META.LEADER.STEPDOWN SERVER.REMOVE ACCOUNT.STREAM.MOVE.A.s
    ACCOUNT.STREAM.CANCEL_MOVE.A.s STREAM.CREATE.s STREAM.UPDATE.s STREAM.NAMES STREAM.LIST
    STREAM.INFO.s STREAM.DELETE.s STREAM.PURGE.s STREAM.SNAPSHOT.s STREAM.RESTORE.s STREAM.MSG.DELETE.s
    STREAM.MSG.GET.s STREAM.PEER.REMOVE.s STREAM.LEADER.STEPDOWN.s STREAM.TEMPLATE.CREATE.s DIRECT.GET.s
    DIRECT.GET.s.demo.job.j1.spec.default.laptop DIRECT.GET.s.demo.job.j1.spec.other.laptop
    CONSUMER.CREATE.s CONSUMER.CREATE.s.c CONSUMER.CREATE.s.c.demo.job.j1.spec.other.laptop
    CONSUMER.DURABLE.CREATE.s.c
    CONSUMER.NAMES.s CONSUMER.LIST.s CONSUMER.INFO.s.c CONSUMER.DELETE.s.c CONSUMER.MSG.NEXT.s.c
    CONSUMER.PAUSE.s.c CONSUMER.RESET.s.c CONSUMER.UNPIN.s.c CONSUMER.LEADER.STEPDOWN.s.c
    """
)

# What is ours: jobs, hints, logs, settings, presence, enrolment; of others, and of this worker itself.
OURS = words(
    """
    demo.job.j1.spec.default.worker-1 demo.job.j1.spec.other.worker-1 demo.job.j1.spec.default
    demo.job.j1.cancel.default.worker-1 demo.job.j1.cancel.other.worker-1 demo.job.j1.cancel.default
    demo.job.j1.run.other.worker-1 demo.job.j1.run.default.worker-2 demo.job.j1.run.default
    demo.job.j1.done.other.worker-1 demo.job.j1.done.default.worker-2 demo.job.j1.done.default
    demo.job.j1.run.default.worker-1.x demo.job.j1.run demo.job.j1
    demo.log.j1.other demo.log.j1.default.x demo.ready.other.j1 demo.timer.other.j1 demo.enrol.t1
    demo.renew.worker-2 demo.renew.worker-1.x other.job.j1.run.default.worker-1 other.log.j1.default
    $KV.demo-MEMBERS.worker-2 $KV.demo-MEMBERS.worker-2.x $KV.demo-MEMBERS.worker-1
    demo.measure demo.measured.worker-2.x demo.measured.worker-1 demo.ping.worker-2.x demo.engine.worker-2.x
    $KV.demo-MEMBERS.control-plane-1.x $KV.demo-CONFIG.settings
    $KV.demo-CONFIG.unit.worker-1 $KV.demo-CONFIG.ticket.t1 $KV.demo-CONFIG.drain.worker-1
    $KV.other-CONFIG.settings $O.other.C.x $O.other.M.x _INBOX.worker.worker-2.x
    _INBOX.worker.worker-1.x _INBOX.admin.a.x _INBOX.x _R_.x $SYS.REQ.CLAIMS.UPDATE
    $SYS.REQ.SERVER.PING.VARZ $SYS.REQ.ACCOUNT.A.CLAIMS.LOOKUP $SYS.REQ.USER.INFO $JS.FLOW.x
    $JS.EVENT.ADVISORY.x $JS.ACK.demo-JOBS.spec-other.1.1.1.1.0 $JS.ACK.demo-HINTS.ready-other.1.1.1.1.0
    $JS.ACK.demo-JOBS.mine.1.1.1.1.0 $JS.ACK.demo-LOGS.spec-default.1.1.1.1.0 $JS.SNAPSHOT.ACK.x
    $JS.FC.x $SRV.PING anything
    """
)

HEARD = words(
    """
    > * demo.> demo.job.> demo.job.*.spec.default.* demo.job.j1.spec.default.laptop demo.job.j1.> demo.log.>
    demo.log.j1.* demo.ready.> demo.ready.default.* demo.timer.> demo.enrol.* demo.enrol.t1 demo.renew.*
    demo.renew.worker-1 _INBOX.> _INBOX.worker.> _INBOX.worker.worker-2.> _INBOX.worker.worker-11.>
    _INBOX.*.worker-1.> _INBOX.admin.> _INBOX.client.> _INBOX.bootstrap.> $KV.> $KV.demo-CONFIG.>
    $KV.demo-CONFIG.* $KV.demo-CONFIG.unit.* $KV.*.* $KV.demo-CONFIG.ticket.* $KV.demo-CONFIG.drain.*
    $KV.demo-CONFIG.drain.worker-2 $KV.demo-MEMBERS.> $KV.demo-MEMBERS.* $KV.demo-MEMBERS.worker-2
    $KV.demo-MEMBERS.*.* $KV.demo-MEMBERS.worker-1.* demo.ping.> demo.engine.>
    demo.measured.> demo.measured.*.* demo.measured.worker-1.* demo.measure.>
    $O.> $O.demo-BLOBS.C.* $O.demo-BLOBS.M.* $JS.>
    $JS.API.> $JS.API.DIRECT.GET.* $JS.ACK.> $JS.EVENT.ADVISORY.> $SYS.> $SYS.REQ.> _R_.> other.>
    anything
    """
)

# All that a worker of queue `default` may ask JetStream.
WORKERS_QUESTIONS = words(
    """
    $JS.API.DIRECT.GET.demo-JOBS $JS.API.DIRECT.GET.demo-LOGS $JS.API.DIRECT.GET.OBJ_demo-BLOBS
    $JS.API.DIRECT.GET.KV_demo-MEMBERS $JS.API.DIRECT.GET.KV_demo-CONFIG
    $JS.API.CONSUMER.MSG.NEXT.demo-JOBS.spec-default $JS.API.CONSUMER.MSG.NEXT.demo-HINTS.ready-default
    """
)


def covers(pattern: str, subject: str) -> bool:
    """Whether everything that `subject` matches is matched by `pattern`."""
    for of, one in itertools.zip_longest(pattern.split("."), subject.split(".")):
        if of == ">" and one is not None:
            return True
        if of is None or one is None or one == ">" or (of != "*" and of != one):
            return False
    return True


def may(allowed: Iterable[str], subject: str) -> bool:
    return any(covers(pattern, subject) for pattern in allowed)


def asked(verb: str) -> set[str]:
    """The subjects of a question to JetStream, for every stream and consumer."""
    found = set()
    for stream, consumer in itertools.product(STREAMS, CONSUMERS):
        parts = [{"s": stream, "c": consumer}.get(part, part) for part in verb.split(".")]
        found.add("$JS.API." + ".".join(parts))
    return found


def concrete(pattern: str) -> set[str]:
    """Subjects that fit a pattern, with what is this worker's and what is not."""
    choices = [
        {"*": ("j1", "default", "other", "worker-2"), ">": ("a", "other.b")}.get(part, (part,))
        for part in pattern.split(".")
    ]
    return {".".join(parts) for parts in itertools.product(*choices)}


def of_others() -> set[str]:
    """What other roles, other units and workers of other queues may publish."""
    found: set[str] = set()
    for role in ROLES:
        for unit, queues in (("worker-1", ("other",)), ("worker-2", ("default",))):
            for pattern in permissions(LAYOUT, role, unit, queues).publish:
                found |= concrete(pattern)
    return found


async def states(cluster: Cluster) -> dict[str, Any]:
    """What the streams hold, presence aside."""
    found = {}
    for stream in STREAMS:
        if stream != LAYOUT.members:
            state = (await cluster.link.api(f"STREAM.INFO.{stream}"))["state"]
            found[stream] = (state["messages"], state["last_seq"], state["consumer_count"])
    return found


async def test_a_worker_is_refused_everything_that_it_does_not_need(world: World, plain: Any) -> None:
    admin = await world.admin()
    before = await states(admin)
    worker = await plain(world.unit("worker-1", "worker", "default").login)
    tried = {*OURS, *of_others(), *(subject for verb in JETSTREAM for subject in asked(verb))}
    forbidden = {subject for subject in tried if not may(WORKER.publish, subject)}
    assert len(forbidden) > 500
    assert {*OURS} <= forbidden
    assert {subject for verb in JETSTREAM for subject in asked(verb)} - forbidden == {*WORKERS_QUESTIONS}
    assert await worker.refusals(publish=sorted(forbidden)) == forbidden
    assert await worker.refusals(subscribe=HEARD) == {*HEARD}
    assert await states(admin) == before


async def test_a_worker_cannot_answer_in_the_control_planes_place(world: World, plain: Any) -> None:
    worker = await plain(world.unit("worker-1", "worker", "default").login)
    for subject in ("demo.enrol.*", "demo.renew.*"):
        await worker.client.subscribe(subject, queue="control-plane")
    await worker.client.flush()
    await worker.client.flush()
    assert sum("permissions violation" in line for line in worker.reply) == 2


async def test_a_worker_cannot_speak_for_another(world: World) -> None:
    """It may only write under its own name; what it writes there counts for itself alone."""
    liar = await world.open(world.unit("worker-1", "worker", "default"))
    other = await world.open(world.unit("worker-2", "worker", "default"))
    reader = await world.open(world.unit("laptop", "client"), announce=False)

    async def there() -> set[str]:
        await reader.store.logs.read("j1")  # what was said before has been heard
        await asyncio.sleep(0.05)
        return {one.unit for one in await reader.store.presence.members()}

    async with asyncio.timeout(LONG_S):
        while await there() < {"worker-1", "worker-2"}:
            pass
    await asyncio.sleep(0.3)  # they say it twice at first, and then once a second
    victim = other.store.presence.incarnation
    await liar.link.request(LAYOUT.member("worker-1", victim))  # it leaves, by that
    for name in ("worker-2", "worker-3"):
        member = Member(unit=name, incarnation=victim, holds=("j1@1",))
        await liar.link.request(LAYOUT.member("worker-1", victim), msgspec.json.encode(member))
    late = await world.open(world.unit("control-plane-1", "control-plane"), maintains=True)
    assert await there() == {"worker-1", "worker-2", "control-plane-1"}
    assert {one.unit for one in await late.store.presence.members()} >= {"worker-1", "worker-2"}
    lease = Lease(at=1, epoch=1, unit="worker-2", incarnation=victim, run="r", why="first")
    assert await late.store.presence.live("j1", lease)
    assert await reader.store.presence.find("worker-2", victim) is not None


@pytest.mark.parametrize("role", ["client", "executor", "bootstrap", "system"])
async def test_no_other_role_may_do_more_than_its_list(world: World, plain: Any, role: Any) -> None:
    allowed = permissions(LAYOUT, role, "u1", ["default"] if role == "executor" else [])
    if role == "system":
        login = world.authority.system_login(world.base)
    elif role == "bootstrap":
        login = world.authority.ticket("worker", ["default"], world.base, 60).login
        allowed = permissions(LAYOUT, role, login.inbox.split(".")[2])
    else:
        login = world.unit("u1", role, *(["default"] if role == "executor" else [])).login
    one = await plain(login)
    tried = {*OURS, *of_others(), *(subject for verb in JETSTREAM for subject in asked(verb))}
    forbidden = {subject for subject in tried if not may(allowed.publish, subject)}
    assert await one.refusals(publish=sorted(forbidden)) == forbidden
    closed = {subject for subject in HEARD if not may(allowed.subscribe, subject)}
    assert await one.refusals(subscribe=sorted(closed)) == closed


@pytest.mark.parametrize("role", ROLES)
def test_only_the_control_plane_and_an_administrator_may_administer(role: Grantee) -> None:
    allowed = permissions(LAYOUT, role, "u1", ["default"]).publish
    reads = ("STREAM.INFO", "STREAM.NAMES", "INFO", "DIRECT.GET.s", "CONSUMER.MSG.NEXT")
    changes = [verb for verb in JETSTREAM if not verb.startswith(reads)]
    can = {verb for verb in changes for subject in asked(verb) if may(allowed, subject)}
    assert bool(can) == (role in ("control-plane", "admin"))


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_listen_in_anothers_inbox(role: Grantee) -> None:
    for other in ROLES:
        for unit in ("u1", "u2", "u11"):
            if (other, unit) != (role, "u1"):
                listened = f"{inbox(other, unit)}.x"
                assert not may(permissions(LAYOUT, role, "u1", ["default"]).subscribe, listened)


@pytest.mark.parametrize("role", ROLES)
def test_a_list_is_never_empty_for_then_everything_would_be_allowed(role: Grantee) -> None:
    granted = permissions(LAYOUT, role, "u1", ["default"])
    assert granted.publish and granted.subscribe
    assert not {">", "*", "$JS.API.>", f"{CLUSTER}.>"} & {*granted.publish, *granted.subscribe}


# What each of them needs.


@pytest.fixture
def violations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the broker refuses any of our own connections."""
    found: list[str] = []
    failed = Link._failed

    async def hear(link: Link, error: Exception) -> None:
        if "permissions violation" in str(error):
            found.append(f"{link._name}: {error}")
        await failed(link, error)

    monkeypatch.setattr(Link, "_failed", hear)
    return found


async def test_a_worker_can_do_all_of_its_work(world: World, tmp_path: Path, violations: list[str]) -> None:
    """A job's way through a worker: hint, journal, output, blobs, presence, timer, end, acknowledgement."""
    await world.control_plane()
    client = await world.open(world.unit("laptop", "client"), announce=False)
    identity = world.unit("worker-1", "worker", "default")
    worker = await world.open(identity)
    store = worker.store
    blob = await client.store.blobs.put(b"module")
    seq = await client.store.journals.append("j1", "spec", "default", b"spec", expect=0)

    hint = await store.hints.pull("default", wait_s=LONG_S)
    assert hint is not None and hint.job == "j1"
    await store.presence.describe(About(role="worker", slots=1))
    await store.presence.add_hint("j1")
    await store.presence.add_job("j1", 1)
    assert [entry.data for entry in await store.journals.read("j1")] == [b"spec"]
    assert await store.blobs.get(blob) == b"module"
    lease = Lease(at=1, epoch=1, unit="u", incarnation="i", run="r", why="first")
    assert await store.presence.live("j1", lease)
    seq = await store.journals.append("j1", "run", "default", b"run", expect=seq)
    await asyncio.gather(
        *(store.journals.append(f"b{number}", "run", "default", b"x", expect=0) for number in range(20))
    )  # as an atomic batch
    await store.logs.append("j1", "default", [Chunk(attempt=0, number=0, stream="stdout", data=b"x", at=1)])
    (tmp_path / "artifact").write_bytes(b"a" * 300_000)
    artifact = await store.blobs.put_file(tmp_path / "artifact")
    assert await store.blobs.has(artifact)
    await store.blobs.fetch(artifact, tmp_path / "copy")
    await hint.keep()
    await store.hints.timer("default", "j1", 0)
    await store.hints.ready("default", "j1")
    again = await store.hints.pull("default", wait_s=LONG_S)
    assert again is not None
    await store.journals.append("j1", "done", "default", b"done", expect=seq)
    await hint.ack()
    await again.redeliver(0)
    await store.presence.remove_job("j1")
    assert await worker.config.get("settings") is None
    for key in ("settings", "drain.worker-1"):
        await (await worker.config.watch(key, lambda _: None))()
    await renew(worker.link, identity, tmp_path / "identity.json")

    assert len(await client.store.logs.read("j1")) == 1
    assert violations == []


async def test_a_client_can_do_all_of_its_work(world: World, violations: list[str]) -> None:
    client = await world.open(world.unit("laptop", "client"), announce=False)
    store = client.store
    await store.journals.append("j1", "spec", "other", b"spec", expect=0)
    await store.journals.append("j1", "cancel", "other", b"cancel", expect=1)
    await asyncio.gather(
        *(store.journals.append(f"b{number}", "spec", "default", b"x", expect=0) for number in range(20))
    )
    assert len([job async for job in store.journals.jobs()]) == 21
    assert len([entry async for _, entry in store.journals.all()]) == 22
    async for entry in store.journals.follow("j1"):
        if entry.data == b"cancel":
            break
    digest = await store.blobs.put(b"x" * 300_000)
    assert await store.blobs.missing([digest]) == set()
    assert len(await store.blobs.get(digest)) == 300_000
    assert await store.presence.members() == []
    async with asyncio.timeout(LONG_S):
        following = asyncio.ensure_future(anext(store.logs.follow("j1")))
        worker = await world.open(world.unit("worker-1", "worker", "other"))
        chunk = Chunk(attempt=0, number=0, stream="stdout", data=b"x", at=1)
        await worker.store.logs.append("j1", "other", [chunk])
        assert (await following).data == b"x"
    assert violations == []


async def test_a_client_of_some_queues_may_submit_to_no_other(world: World, plain: Any) -> None:
    client = await plain(world.unit("laptop", "client", "default").login)
    others = {"demo.job.j1.spec.other.laptop", "demo.job.j1.cancel.other.laptop"}
    assert await client.refusals(publish=[*others, "demo.job.j1.spec.default.laptop"]) == others


async def test_nobody_writes_in_the_name_of_another(world: World, plain: Any) -> None:
    client = await plain(world.unit("laptop", "client", "default").login)
    forged = {"demo.job.j1.spec.default.desktop", "demo.job.j1.cancel.default.desktop"}
    assert await client.refusals(publish=[*forged, "demo.job.j1.spec.default.laptop"]) == forged


async def test_a_control_plane_can_do_all_of_its_work(world: World, violations: list[str]) -> None:
    """From nothing: it makes what is missing, says `ready`, ends what was cancelled, forgets what is old."""
    admin = await world.admin()
    settings = ClusterSettings(store_bytes=256 << 20, jobs_ms=1)
    await admin.config.put("settings", msgspec.json.encode(settings))
    await admin.link.api(f"STREAM.DELETE.{LAYOUT.hints}")
    identity = world.unit("control-plane-1", "control-plane")
    cluster = await world.open(identity, maintains=True)
    plane = ControlPlane(cluster)
    running = asyncio.create_task(plane.run())
    await world.control_plane("control-plane-2")
    await renew(cluster.link, identity, world.folder / "identity.json")
    client = await world.open(world.unit("laptop", "client"), announce=False)
    await client.store.blobs.put(b"x")
    async with asyncio.timeout(LONG_S):
        while LAYOUT.hints not in (await admin.link.api("STREAM.NAMES"))["streams"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await plane.retention.forget()
    plane.retention.blob_age_ms = 0
    await plane.retention.sweep()
    await plane.reconciler.look()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert violations == []
