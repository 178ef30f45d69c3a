"""Holders on stores that fail: answers lost, writes that land late, others that write in between.

Every store is wrapped so that a plan decides what happens at each append. After each run the journal
must show one lease a run, no record twice, nothing of a holder after it was fenced, and only
`cancelled` after a cancel; and no output may have been published before its cause was on disk.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mvmci.errors import Conflict, Fenced, NoAnswer
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Entry,
    Intent,
    Journal,
    Lease,
    MessageKind,
    Released,
    Result,
    Spec,
    kind_of,
)
from mvmci.jobs.times import Stopwatch
from mvmci.journals import writer
from mvmci.journals.holder import Cancelled, Holder, Reread
from mvmci.journals.reader import load
from mvmci.store import Chunk, Store
from tests.conftest import Place, open_nats
from tests.harness.broker import Broker, ensure
from tests.harness.memory import Memory
from tests.harness.waiting import LONG_S

JOB = "job"
WRITES = 4
FAULTS = ("lost", "dropped", "late", "cancel", "foreign", "both")
FAULTS_MAX = 3
ATTEMPTS = range(1, 6)  # at which a fault may strike; refused writes are attempted again
KILL_AFTER = 60

Plan = dict[int, str]


@dataclass
class FaultyJournals:
    """Journals that do to each append what `plan` says for its number."""

    store: Store
    plan: Plan
    attempts: int = 0
    late: list[tuple[MessageKind, bytes, int]] = field(default_factory=list)
    answered: list[bytes] = field(default_factory=list)  # messages whose writer heard that they are on disk

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        """Late writes land after the reader has looked."""
        entries = await self.store.journals.read(job, after)
        for kind, data, expect in self.late:
            try:
                await self.store.journals.append(job, kind, "q", data, expect=expect)
            except Conflict:
                pass
        self.late.clear()
        return entries

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        self.attempts += 1
        fault = self.plan.get(self.attempts)
        if fault in ("cancel", "both"):
            await write_as_other(self.store, Cancel(at=5, by="user"))
        if fault in ("foreign", "both"):
            await write_as_other(self.store, foreign_lease((await load(self.store, job)).state.epoch + 1))
        if fault == "old":
            await write_as_other(self.store, Result(at=5, index=0))
        if fault == "dropped":
            raise NoAnswer("dropped")
        if fault == "late":
            self.late.append((kind, data, expect))
            raise NoAnswer("late")
        seq = await self.store.journals.append(job, kind, queue, data, expect=expect)
        if fault == "lost":
            raise NoAnswer("lost")
        self.answered.append(data)
        return seq

    def jobs(self) -> AsyncIterator[str]:
        return self.store.journals.jobs()


@dataclass
class WatchedLogs:
    """Logs that see whether the cause of each chunk, which is its data, is on disk."""

    store: Store
    printed: list[str] = field(default_factory=list)
    too_early: list[str] = field(default_factory=list)

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        on_disk = {name(record) for record in (await load(self.store, job)).records}
        for chunk in chunks:
            self.printed.append(chunk.data.decode())
            if chunk.data.decode() not in on_disk:
                self.too_early.append(chunk.data.decode())
        await self.store.logs.append(job, queue, chunks)

    async def read(self, job: str) -> list[Chunk]:
        return await self.store.logs.read(job)

    def follow(self, job: str) -> AsyncIterator[Chunk]:
        return self.store.logs.follow(job)


def name(record: AnyRecord) -> str:
    return f"{type(record).__name__} {getattr(record, 'index', '')}".strip()


def spec(job: str = JOB) -> Spec:
    digest = "sha256:" + "0" * 64
    return Spec(
        at=1, id=job, queue="q", kind="workflow", module=digest, name="m", component=True, seed=1, by="t"
    )


def my_lease(epoch: int = 1, run: str = "mine") -> Lease:
    why = "first" if epoch == 1 else "recovered"
    return Lease(at=2, epoch=epoch, unit="u1", incarnation="i1", run=run, why=why)


def foreign_lease(epoch: int) -> Lease:
    return Lease(at=6, epoch=epoch, unit="u1", incarnation="i2", run="foreign", why="recovered")


def intent(index: int) -> Intent:
    return Intent(at=3, index=index, kind="http", digest=f"{index}")


def result(index: int) -> Result:
    return Result(at=4, index=index)


async def write_as_other(store: Store, *records: AnyRecord) -> None:
    """Append as a client or another holder would, which looks first whether the job has ended."""
    journal = Journal(JOB)
    journal.absorb(await store.journals.read(JOB))
    if journal.state.ended:
        return
    data = journal.encode(records, f"other-{journal.tail}")
    await store.journals.append(JOB, kind_of(records), "q", data, expect=journal.tail)


async def script(run: Holder) -> str:
    """Three effects and an end, four writes, each followed by output that it causes."""
    try:
        await run.write(intent(0))
        await printing(run, 0, "Intent 0")
        for index in (1, 2):
            await run.add(result(index - 1))
            await printing(run, 2 * index - 1, f"Result {index - 1}")
            await run.write(intent(index))
            await printing(run, 2 * index, f"Intent {index}")
        await run.add(result(2))
        await printing(run, 5, "Result 2")
        await run.finish(Done(at=9, status="succeeded"))
    except Cancelled:
        try:
            await run.finish(Done(at=9, status="cancelled"))
        except Fenced:
            return "fenced"
        return "cancelled"
    except Fenced:
        return "fenced"
    except Reread:
        return "reread"
    return "succeeded"


async def printing(run: Holder, number: int, cause: str) -> None:
    await run.print(Chunk(attempt=1, number=number, stream="stdout", data=cause.encode(), at=1))


@dataclass
class Ran:
    outcome: str
    records: list[AnyRecord]
    journals: FaultyJournals
    logs: WatchedLogs


async def run_with(store: Store, plan: Plan, *before: AnyRecord, epoch: int = 1) -> Ran:
    """Run the script over `store` with the faults of `plan`, and look at what it left."""
    await write_as_other(store, spec())
    for record in before:
        await write_as_other(store, record)
    journals, logs = FaultyJournals(store, plan), WatchedLogs(store)
    faulty = replace(store, journals=journals, logs=logs)
    run = Holder(faulty, await load(store, JOB), my_lease(epoch), Stopwatch(time.monotonic_ns))
    try:
        async with asyncio.timeout(LONG_S):
            outcome = await script(run)
    finally:
        await run.close()
    await journals.read(JOB)  # what was late lands now at the latest
    journal = await load(store, JOB)
    assert journal.state.corrupt is None
    return Ran(outcome, journal.records, journals, logs)


def check(ran: Ran) -> None:
    """The promises that hold whatever failed."""
    records = ran.records
    own = [record for record in records if getattr(record, "run", "mine") == "mine"]
    names = [name(record) for record in own if not isinstance(record, Cancel)]
    assert len(names) == len(set(names)), f"a record is there twice: {names}"
    after_fence = itertools.dropwhile(lambda record: getattr(record, "run", "") != "foreign", records)
    assert all(isinstance(record, Cancel) for record in list(after_fence)[1:])
    after_cancel = list(itertools.dropwhile(lambda record: not isinstance(record, Cancel), records))[1:]
    for record in after_cancel:
        assert isinstance(record, Cancel | Done | Lease | Result)
        assert not isinstance(record, Done) or record.status == "cancelled"
    assert ran.logs.too_early == []
    assert len(ran.logs.printed) == len(set(ran.logs.printed))
    _check_outcome(ran, names)


def _check_outcome(ran: Ran, names: list[str]) -> None:
    foreign = any(getattr(record, "run", "") == "foreign" for record in ran.records)
    cancelled = any(isinstance(record, Cancel) for record in ran.records)
    done = [record for record in ran.records if isinstance(record, Done)]
    if foreign or ran.outcome == "reread":
        assert ran.outcome in ("fenced", "reread")
        assert not done
    elif cancelled:
        leased = "Lease" in names
        assert ran.outcome == ("cancelled" if leased else "fenced")
        assert [record.status for record in done] == (["cancelled"] if leased else [])
    else:
        assert ran.outcome == "succeeded"
        assert names == [
            "Spec",
            "Lease",
            *(f"{kind} {i}" for i in range(3) for kind in ("Intent", "Result")),
            "Done",
        ]
        assert len(ran.logs.printed) == 6


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_PAUSES_S", (0.0,))


def plans(faults_max: int) -> Iterable[Plan]:
    for count in range(faults_max + 1):
        for where in itertools.combinations(ATTEMPTS, count):
            for what in itertools.product(FAULTS, repeat=count):
                yield dict(zip(where, what, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("attempt", range(1, WRITES + 1))
async def test_any_one_fault_at_any_write_keeps_every_promise(place: Place, fault: str, attempt: int) -> None:
    ran = await run_with(await place.store("u1"), {attempt: fault})
    assert ran.journals.attempts >= attempt
    check(ran)


async def test_up_to_three_faults_in_any_order_keep_every_promise() -> None:
    ended: dict[str, int] = {}
    for plan in plans(FAULTS_MAX):
        store = Memory().store("u1")
        try:
            ran = await run_with(store, plan)
            check(ran)
        except BaseException as broken:
            broken.add_note(f"with {plan}")
            raise
        ended[ran.outcome] = ended.get(ran.outcome, 0) + 1
        await store.close()
    assert set(ended) == {"succeeded", "cancelled", "fenced"}


async def test_a_write_whose_answer_was_lost_is_not_written_again(store: Store) -> None:
    ran = await run_with(store, dict.fromkeys(range(1, WRITES + 1), "lost"))
    assert (ran.outcome, ran.journals.attempts) == ("succeeded", WRITES)
    check(ran)


async def test_a_write_that_lands_after_the_reader_looked_is_not_stored_twice(store: Store) -> None:
    ran = await run_with(store, {1: "late", 3: "late"})
    assert ran.outcome == "succeeded"
    check(ran)


async def test_a_fenced_holder_never_writes_again(store: Store) -> None:
    ran = await run_with(store, {2: "foreign"})
    assert (ran.outcome, ran.journals.attempts) == ("fenced", 2)
    assert isinstance(ran.records[-1], Lease)
    assert ran.records[-1].run == "foreign"


async def test_a_holder_whose_own_write_landed_before_it_was_fenced_is_still_fenced(store: Store) -> None:
    """Its message is there and a newer lease too: the second question must not be asked first."""
    await write_as_other(store, spec())
    journals = FaultyJournals(store, {2: "lost"})
    run = Holder(
        replace(store, journals=journals), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    await run.write(intent(0))
    read = journals.read

    async def read_late(job: str, after: int = 0) -> list[Entry]:
        await write_as_other(store, foreign_lease(2))
        return await read(job, after)

    journals.read = read_late  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        await run.write(result(0), intent(1))
    await run.close()


async def test_a_holder_whose_own_write_landed_before_another_ended_the_job_writes_nothing_more(
    store: Store,
) -> None:
    """It was taken for dead, and so a control plane wrote the end that a cancel asked for."""
    await write_as_other(store, spec())
    journals = FaultyJournals(store, {1: "lost"})
    run = Holder(
        replace(store, journals=journals), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    read = journals.read

    async def read_late(job: str, after: int = 0) -> list[Entry]:
        await write_as_other(store, Cancel(at=5, by="user"))
        await write_as_other(store, Done(at=6, status="cancelled"))
        return await read(job, after)

    journals.read = read_late  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        await run.write(intent(0))
    await run.close()
    assert (await load(store, JOB)).state.corrupt is None


async def test_after_a_cancel_the_only_end_is_cancelled(store: Store) -> None:
    ran = await run_with(store, {WRITES: "cancel"})
    assert ran.outcome == "cancelled"
    assert [record.status for record in ran.records if isinstance(record, Done)] == ["cancelled"]


async def test_a_cancel_before_the_lease_is_the_end(store: Store) -> None:
    ran = await run_with(store, {1: "cancel"})
    assert ran.outcome == "fenced"
    assert [name(record) for record in ran.records] == ["Spec", "Cancel"]


async def test_a_lease_refused_because_something_was_recorded_means_reading_afresh(store: Store) -> None:
    """The dead holder's last result landed late: whoever replays without it would ask again."""
    before = (Lease(at=1, epoch=1, unit="u1", incarnation="i0", run="old", why="first"), intent(0))
    ran = await run_with(store, {1: "old"}, *before, epoch=2)
    assert (ran.outcome, ran.journals.attempts) == ("reread", 1)
    assert not any(record.run == "mine" for record in ran.records if isinstance(record, Lease))


async def test_output_waits_for_what_was_recorded_before_it(store: Store) -> None:
    """Nothing is printed while the write that carries its cause has no answer."""
    await write_as_other(store, spec())
    journals, logs = FaultyJournals(store, {}), WatchedLogs(store)
    run = Holder(
        replace(store, journals=journals, logs=logs),
        await load(store, JOB),
        my_lease(),
        Stopwatch(time.monotonic_ns),
    )
    await run.write(intent(0))
    await run.add(result(0), within_s=LONG_S)
    await printing(run, 0, "Result 0")
    assert logs.printed == []
    await run.write(intent(1))
    assert (logs.printed, logs.too_early) == (["Result 0"], [])
    await run.close()


class Stuck:
    """Journals whose append lands and whose answer never comes, once `stuck` is set."""

    def __init__(self, store: Store) -> None:
        self._journals = store.journals
        self.stuck = False
        self.landed = asyncio.Event()

    async def append(self, *args: Any, **options: Any) -> int:
        seq = await self._journals.append(*args, **options)
        if self.stuck:
            self.landed.set()
            await asyncio.Event().wait()
        return seq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journals, name)


async def cancelled_in(writing: Coroutine[Any, Any, None], journals: Stuck) -> None:
    """Cancel a write after it landed and before its writer knows."""
    journals.stuck = True
    task = asyncio.create_task(writing)
    await journals.landed.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    journals.stuck = False


@pytest.mark.parametrize("looks", [True, False])
async def test_what_landed_for_a_writer_that_was_cancelled_is_not_written_again(
    store: Store, looks: bool
) -> None:
    await write_as_other(store, spec())
    journals = Stuck(store)
    run = Holder(
        replace(store, journals=journals), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    await run.write(intent(0))
    await run.add(result(0), within_s=LONG_S)
    await cancelled_in(run.write(intent(1)), journals)
    if looks:
        await run._look()
    await run.finish(Done(at=9, status="timed_out"))
    await run.close()
    records = (await load(store, JOB)).records
    assert [name(record) for record in records] == [
        "Spec",
        "Lease",
        "Intent 0",
        "Result 0",
        "Intent 1",
        "Done",
    ]


@pytest.mark.parametrize("looks", [True, False])
async def test_nothing_follows_an_end_whose_writer_was_cancelled(store: Store, looks: bool) -> None:
    await write_as_other(store, spec())
    journals = Stuck(store)
    run = Holder(
        replace(store, journals=journals), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    await cancelled_in(run.finish(Done(at=9, status="succeeded")), journals)
    with suppress(Fenced):
        if looks:
            await run._look()
        await run.finish(Released(at=9, why="drain"))
    await run.close()
    assert [name(record) for record in (await load(store, JOB)).records] == ["Spec", "Lease", "Done"]


async def test_letting_go_forgets_an_effect_that_never_began(store: Store) -> None:
    await write_as_other(store, spec())
    run = Holder(store, await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns))
    await run.write(intent(0))
    await run.add(result(0), within_s=LONG_S)
    await run.add(intent(1), within_s=LONG_S)
    await run.finish(Released(at=9, why="drain"))
    await run.close()
    records = (await load(store, JOB)).records
    assert [name(record) for record in records][3:] == ["Result 0", "Released"]


async def test_a_run_may_be_closed_as_a_write_of_its_own_is_about_to_begin(store: Store) -> None:
    """What was begun in the background and never had its turn is let go without a word."""
    await write_as_other(store, spec())
    run = Holder(store, await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns))
    await run.write(intent(0))
    run._flush()
    await run.close()
    gc.collect()  # a coroutine that nobody awaited fails this test by its warning


async def test_output_that_the_store_does_not_take_is_tried_again_and_ends_no_job(store: Store) -> None:
    class Refusing:
        refusals = 2

        async def append(self, *args: Any) -> None:
            if self.refusals:
                self.refusals -= 1
                raise NoAnswer("lost")
            await store.logs.append(*args)

    await write_as_other(store, spec())
    run = Holder(
        replace(store, logs=Refusing()), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    await run.write()
    await printing(run, 0, "first")
    await printing(run, 1, "second")
    await run.finish(Done(at=9, status="succeeded"))
    await run.close()
    assert [chunk.data for chunk in await store.logs.read(JOB)] == [b"first", b"second"]


async def test_a_broker_killed_in_the_middle_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    """Ten holders write twenty messages each while the broker is killed with -9 and started again."""
    broker = Broker(tmp_path / "broker")
    await broker.start()
    await ensure(broker.url, "demo", store_bytes=1 << 30)
    store = await open_nats(broker.url, "demo", "u1")
    acknowledged: dict[str, list[int]] = {f"j{i}": [] for i in range(10)}
    enough = asyncio.Event()

    async def work(job: str) -> None:
        journal = Journal(job)
        data = journal.encode([spec(job)], "spec")
        journal.absorb(
            [
                Entry(
                    seq=await store.journals.append(job, "spec", "q", data, expect=0),
                    data=data,
                )
            ]
        )
        run = Holder(store, journal, my_lease(run=job), Stopwatch(time.monotonic_ns))
        for index in range(20):
            await run.write(intent(index))
            acknowledged[job].append(index)
            if sum(map(len, acknowledged.values())) >= KILL_AFTER:
                enough.set()
        await run.finish(Done(at=9, status="succeeded"))
        await run.close()

    try:
        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
            for job in acknowledged:
                tasks.create_task(work(job))
            await enough.wait()
            await broker.kill()
            before = {job: list(indices) for job, indices in acknowledged.items()}
            assert sum(map(len, before.values())) < 200
            await broker.start()
        for job, indices in acknowledged.items():
            journal = await load(store, job)
            assert journal.state.corrupt is None
            written = [record.index for record in journal.records if isinstance(record, Intent)]
            assert written == indices == list(range(20))
            assert sum(isinstance(record, Lease) for record in journal.records) == 1
            assert journal.state.done is not None
    finally:
        await store.close()
        await broker.stop()


@pytest.mark.parametrize("last", [Result(at=4, index=0), Released(at=9, why="drain")])
async def test_a_write_that_waited_for_a_look_which_finds_a_newer_holder_is_not_made(
    store: Store, last: Result | Released
) -> None:
    """The look takes in the newer lease; the write behind it would fit the tail, and must not be made."""
    await write_as_other(store, spec())
    journals = FaultyJournals(store, {})
    run = Holder(
        replace(store, journals=journals), await load(store, JOB), my_lease(), Stopwatch(time.monotonic_ns)
    )
    await run.write(intent(0))
    await write_as_other(store, foreign_lease(2))
    look = asyncio.create_task(run._look())
    await asyncio.sleep(0)
    writing = run.finish(last) if isinstance(last, Released) else run.write(last)
    for refused in (look, writing):
        with pytest.raises(Fenced):
            await refused
    await run.close()
    assert journals.attempts == 1
    assert isinstance((await load(store, JOB)).records[-1], Lease)


async def test_a_lease_that_waited_for_a_look_which_finds_records_is_not_written(store: Store) -> None:
    await write_as_other(store, spec())
    journals = FaultyJournals(store, {})
    run = Holder(
        replace(store, journals=journals),
        await load(store, JOB),
        my_lease(epoch=2),
        Stopwatch(time.monotonic_ns),
    )
    await write_as_other(store, foreign_lease(1))
    look = asyncio.create_task(run._look())
    await asyncio.sleep(0)
    for refused in (look, run.write(intent(0))):
        with pytest.raises(Reread):
            await refused
    await run.close()
    assert journals.attempts == 0
