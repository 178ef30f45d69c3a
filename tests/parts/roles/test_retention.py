"""What retention promises: what is old goes, its id stays taken for as long again, what is named stays."""

from __future__ import annotations

import hashlib
import io
import time
from typing import BinaryIO

import pytest

from mvmci.errors import IdTaken, NotFound
from mvmci.jobs import tree
from mvmci.jobs.journal import Done, Journal, Lease, Spec
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.roles.retention import Retention
from mvmci.roles.witness import Watch
from mvmci.store import Source, Store, digest_of
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.blobs import UPLOAD_CHARS
from tests.harness.newer import NEWER, append_newer
from tests.parts.roles.conftest import Place
from tests.parts.roles.test_reconciler import append

AGE_MS = 3_600_000
NOW_MS = time.time_ns() // 1_000_000


class Clock:
    """Ahead of when the newest end was stored."""

    ended_ms = NOW_MS

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        return Clock.ended_ms + self.ahead_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def retention(place: Place, clock: Clock) -> Retention:
    cluster = await place.join("control-plane", maintains=True, listens=True)
    watch = Watch(cluster)
    await watch.look()
    return Retention(cluster, watch, lambda: AGE_MS, clock, blob_age_ms=-1)  # no blob is too young


async def spec(store: Store, job: str, **more: str | None) -> Spec:
    module = await store.blobs.put(b"module of " + job.encode())
    what = {"id": job, "queue": "default", "name": "m", "module": module, "by": "me", **more}
    return Spec(at=NOW_MS, kind="command", component=False, seed=1, **what)  # type: ignore[arg-type]


async def end(client: Cluster, job: str, at: int = NOW_MS, **more: str | None) -> Spec:
    """A job that was submitted and ended, its holder says `at` that time."""
    submitted = await spec(client.store, job, **more)
    await submit(client.store, submitted)
    lease = Lease(at=NOW_MS, epoch=1, unit="client", incarnation="i", run="r", why="first")
    journal = await load(client.store, job)
    data = journal.encode([lease, Done(at=at, status="succeeded")], "m")
    await client.store.journals.append(job, "done", "default", data, expect=journal.tail)
    Clock.ended_ms = max([stored_ms async for _, _, stored_ms in client.journals.ends()])
    return submitted


async def test_of_a_job_that_ended_long_ago_only_its_end_is_kept(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    await end(client, "old")
    clock.ahead_ms = AGE_MS - 1
    await retention.forget()
    assert (await load(client.store, "old")).state.spec is not None
    clock.ahead_ms = AGE_MS
    await retention.forget()
    journal = await load(client.store, "old")
    assert journal.state.spec is None
    assert journal.state.done is not None
    assert journal.state.corrupt is None


async def test_the_id_of_a_forgotten_job_stays_taken_for_as_long_again(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    submitted = await end(client, "old")
    clock.ahead_ms = 2 * AGE_MS - 1
    await retention.forget()
    with pytest.raises(IdTaken, match="already ended"):
        await submit(client.store, submitted)
    clock.ahead_ms = 2 * AGE_MS
    await retention.forget()
    with pytest.raises(NotFound):
        await load(client.store, "old")
    assert await submit(client.store, submitted)


@pytest.mark.parametrize("at", [0, NOW_MS + 9 * AGE_MS], ids=["long ago", "some day"])
async def test_a_holder_has_no_say_in_when_its_job_is_forgotten(
    client: Cluster, retention: Retention, clock: Clock, at: int
) -> None:
    await end(client, "mine", at=at)
    clock.ahead_ms = AGE_MS - 1
    await retention.forget()
    assert (await load(client.store, "mine")).state.spec is not None
    clock.ahead_ms = AGE_MS
    await retention.forget()
    assert (await load(client.store, "mine")).state.spec is None


async def test_a_job_that_has_not_ended_is_never_forgotten(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    await submit(client.store, await spec(client.store, "open"))
    await append(client, "open", Lease(at=1, epoch=1, unit="client", incarnation="i", run="r", why="first"))
    clock.ahead_ms = 100 * AGE_MS
    await retention.forget()
    assert (await load(client.store, "open")).state.spec is not None


async def test_a_restarted_control_plane_forgets_no_less(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    for job in ("a", "b"):
        await end(client, job)
    clock.ahead_ms = AGE_MS
    await retention.forget()
    again = Retention(retention.cluster, retention.watch, lambda: AGE_MS, clock)
    await again.forget()
    assert (await load(client.store, "a")).state.done is not None
    clock.ahead_ms = 2 * AGE_MS
    await again.forget()
    for job in ("a", "b"):
        with pytest.raises(NotFound):
            await load(client.store, job)


async def test_blobs_that_nothing_names_are_swept_and_what_a_tree_names_stays(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    blobs = client.store.blobs
    file = await blobs.put(b"a file")
    entry = tree.TreeEntry(path="a", digest=file, size=6)
    manifest = await blobs.put(tree.encode_tree(tree.tree([entry])))
    stray, empty = await blobs.put(b"of nobody"), await blobs.put(b"")
    kept = await end(client, "kept", tree=manifest)
    await retention.sweep()
    assert await blobs.missing([file, manifest, kept.module, stray, empty]) == {stray, empty}
    assert await blobs.get(file) == b"a file"
    clock.ahead_ms = 2 * AGE_MS
    await retention.forget()
    await retention.sweep()
    assert await blobs.missing([file, manifest, kept.module]) == {file, manifest, kept.module}


async def test_the_program_that_is_offered_stays_and_the_one_before_goes(
    client: Cluster, retention: Retention
) -> None:
    before, now = await client.store.blobs.put(b"a program"), await client.store.blobs.put(b"the next")
    for digest in (before, now):
        await retention.cluster.config.put(
            "program.x86_64", b'{"offer": "%s"}' % digest.encode(), expect=None
        )
    await retention.sweep()
    assert await client.store.blobs.missing([before, now]) == {before}


async def test_a_blob_that_somebody_touched_lately_is_not_swept(
    client: Cluster, retention: Retention
) -> None:
    stray = await client.store.blobs.put(b"of a submit that is on its way")
    retention.blob_age_ms = AGE_MS
    await retention.sweep()
    assert await client.store.blobs.has(stray)


async def test_a_submit_touches_the_blobs_that_it_counts_on(
    client: Cluster, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even after a sweep has found them old."""
    old = await client.store.blobs.put(b"old")
    (found,) = await retention.cluster.blobs.older_than(-1)
    monkeypatch.setattr("mvmci.stores.nats.blobs.TOUCH_AGE_MS", -1)
    assert await client.store.blobs.missing([old]) == set()
    await retention.cluster.blobs.remove(found)
    assert await client.store.blobs.get(old) == b"old"


async def test_chunks_of_which_nothing_was_told_are_swept(client: Cluster, retention: Retention) -> None:
    link, layout = client.link, client.layout
    await link.request(layout.blob_chunks("orphan"), b"half of a blob")
    await retention.sweep()
    answer = await link.api(f"STREAM.INFO.{layout.blobs}")
    assert answer["state"]["messages"] == 0


async def test_an_upload_that_was_broken_off_is_gone_as_soon_as_it_is_known_to_be(
    client: Cluster, retention: Retention
) -> None:
    async def left() -> set[str]:
        answer = await client.link.api(
            f"STREAM.INFO.{client.layout.blobs}", subjects_filter=client.layout.blob_chunks("*")
        )
        return set(answer["state"].get("subjects") or ())

    def unreadable() -> BinaryIO:
        raise OSError(5, "the uploader dies here")

    whole = await client.store.blobs.put(b"told of")
    kept = await left()
    source = Source(300_000, lambda: io.BytesIO(bytes(300_000)))
    with pytest.raises(OSError, match="dies here"):
        await client.store.blobs.put_all(
            {digest_of(bytes(300_000)): source, digest_of(b"x"): Source(1, unreadable)}
        )
    assert await left() > kept
    retention.upload_age_ms = AGE_MS
    await retention.clear_uploads()
    assert await left() > kept, "it may be under way"
    retention.upload_age_ms = -1
    await retention.clear_uploads()
    assert await left() == kept
    assert await client.store.blobs.get(whole) == b"told of"


async def test_an_upload_that_moves_keeps_what_it_sent_long_ago(
    client: Cluster, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs to an upload goes by the name of its chunks: the newest of them tells."""
    link, layout = client.link, client.layout
    retention.upload_age_ms = 0
    for number in range(3):
        await link.request(layout.blob_chunks(f"{'a' * UPLOAD_CHARS}{number:010x}"), b"x")
    ages = {f"{number:010x}": 10.0 for number in (0, 2)}
    monkeypatch.setattr(
        "mvmci.stores.nats.blobs._age_ms", lambda stored, now: ages.get(stored.subject[-10:], -1.0)
    )
    await retention.clear_uploads()
    answer = await link.api(f"STREAM.INFO.{layout.blobs}")
    assert answer["state"]["messages"] == 3


@pytest.mark.parametrize("wire", NEWER)
async def test_an_end_behind_what_a_newer_build_wrote_lets_nothing_go(
    client: Cluster, retention: Retention, clock: Clock, wire: int
) -> None:
    """Whether it is the end, only a newer build can say."""
    submitted = await spec(client.store, "job")
    await submit(client.store, submitted)
    await append_newer(client.store, "job", wire)
    there = await client.store.journals.read("job")
    journal = Journal("job")
    journal.head = hashlib.sha256(there[-1].data).hexdigest()
    data = journal.encode([Done(at=NOW_MS, status="cancelled", reason="cancelled by me")], "m")
    await client.store.journals.append("job", "end", "default", data, expect=there[-1].seq)
    Clock.ended_ms = max([stored_ms async for _, _, stored_ms in client.journals.ends()])
    for age in (1, 9):
        clock.ahead_ms = age * AGE_MS
        await retention.forget()
        assert len(await client.store.journals.read("job")) == 3


@pytest.mark.parametrize("wire", NEWER)
async def test_what_a_newer_build_wrote_is_kept_with_all_that_it_may_name(
    client: Cluster, retention: Retention, clock: Clock, wire: int
) -> None:
    unnamed = await client.store.blobs.put(b"named by a list that only a newer build can read")
    for job, kind in (("ended", "done"), ("open", "run")):
        submitted = await spec(client.store, job)
        await submit(client.store, submitted)
        await append_newer(client.store, job, wire, kind)  # type: ignore[arg-type]
    await end(client, "old")
    clock.ahead_ms = 9 * AGE_MS
    await retention.forget()
    await retention.sweep()
    for job in ("ended", "open"):
        assert len(await client.store.journals.read(job)) == 2
    assert await client.store.journals.read("old") == []
    assert await client.store.blobs.has(unnamed)
