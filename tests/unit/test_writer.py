"""The writer over a store that does as it is told: stores, refuses, loses answers, lets writes land late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from mvmci.errors import Conflict, NoAnswer, StoreFull, StoreUnavailable
from mvmci.jobs.journal import AnyRecord, Cancel, Done, Entry, Journal, Lease, Message, Progress, Spec
from mvmci.journals import reader, writer
from mvmci.journals.writer import Writer
from mvmci.store import Store
from tests.harness.waiting import LONG_S

SPEC = Spec(at=1, id="j", queue="q", kind="command", module="m", name="m", component=False, seed=1, by="t")
HELD = Lease(at=2, epoch=1, unit="u", incarnation="i", run="r", why="first")
LEASE = Lease(at=2, epoch=2, unit="u", incarnation="i", run="r2", why="recovered")
OURS = Progress(at=3, done=1, total=2, message="ours")
MORE = Progress(at=4, done=2, total=2, message="ours")
THEIRS = Cancel(at=3, by="somebody else")


class Scripted:
    """One journal, whose appends and reads do in turn what the script says, and then what they should.

    An append: `refused` for lack of room, `unsent`, `dropped` without a word, `lost` is its answer only,
    `late` it lands at the next read, `theirs` somebody else was first. A read: `away`.
    """

    def __init__(self, appends: Sequence[str] = (), reads: Sequence[str] = ()) -> None:
        self.entries: list[Entry] = []
        self.calls: list[str] = []
        self.may_delay: list[bool] = []
        self._appends, self._reads = iter(appends), iter(reads)
        self._late: list[tuple[bytes, int]] = []
        self.unit = "u"
        self._append(SPEC)
        self._append(HELD)

    @property
    def store(self) -> Store:
        return Store(*cast("Any", [self, None, None, None, self, None]))

    def journal(self) -> Journal:
        journal = Journal("j")
        journal.absorb(self.entries)
        assert journal.state.corrupt is None
        return journal

    def _append(self, record: AnyRecord) -> None:
        data = self.journal().encode([record], f"other-{len(self.entries)}")
        self.entries.append(Entry(seq=len(self.entries) + 1, data=data))

    def _take(self, data: bytes, expect: int) -> int:
        if expect != len(self.entries):
            raise Conflict("it is not the last")
        self.entries.append(Entry(seq=expect + 1, data=data))
        return expect + 1

    async def append(
        self, job: str, kind: str, queue: str, data: bytes, *, expect: int, may_delay: bool = False, **_: Any
    ) -> int:
        assert (job, queue) == ("j", "q")
        self.calls.append("append")
        self.may_delay.append(may_delay)
        what = next(self._appends, "")
        if what == "refused":
            raise StoreFull("there is no room")
        if what == "unsent":
            raise StoreUnavailable("there is no connection")
        if what == "late":
            self._late.append((data, expect))
        if what in ("late", "dropped"):
            raise NoAnswer(what)
        if what == "theirs":
            self._append(THEIRS)
        seq = self._take(data, expect)
        if what == "lost":
            raise NoAnswer(what)
        return seq

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        self.calls.append("read")
        if next(self._reads, "") == "away":
            raise StoreUnavailable("the store is away")
        found = self.entries[after:]
        for data, expect in self._late:
            try:
                self._take(data, expect)
            except Conflict:
                pass
        self._late.clear()
        return found


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(reader, "ASK_AGAIN_S", 0.0)


def once(journal: Journal, *records: AnyRecord) -> Any:
    """What is wanted until it stands there."""
    return lambda: () if all(record in journal.records for record in records) else records


async def write(store: Scripted, **options: Any) -> tuple[bool, Journal]:
    journal = store.journal()
    options = {"give_up_s": LONG_S} | options
    return await Writer(store.store, journal, "q").write(once(journal, OURS), **options), journal


def written(store: Scripted) -> list[AnyRecord]:
    """What stands in the store behind the spec and the lease."""
    return store.journal().records[2:]


async def test_what_the_store_takes_is_written_with_one_append_and_no_read() -> None:
    store = Scripted()
    ours, journal = await write(store)
    assert (ours, store.calls, written(store)) == (True, ["append"], [OURS])
    assert (journal.tail, journal.head) == (store.journal().tail, store.journal().head)


async def test_of_nothing_nothing_is_written() -> None:
    store = Scripted()
    journal = store.journal()
    assert not await Writer(store.store, journal, "q").write(lambda: (), give_up_s=LONG_S)
    assert store.calls == []


@pytest.mark.parametrize(
    ("appends", "calls"),
    [
        (["lost"], ["append", "read"]),
        (["dropped"], ["append", "read", "append"]),
        (["unsent"], ["append", "read", "append"]),
        (["late"], ["append", "read", "append", "read"]),
        (["late", "late"], ["append", "read", "append", "read"]),
        (["dropped", "lost"], ["append", "read", "append", "read"]),
        (["late", "refused"], ["append", "read", "append", "read"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
async def test_after_silence_the_journal_tells_and_the_message_stands_there_once(
    appends: list[str], calls: list[str]
) -> None:
    store = Scripted(appends)
    ours, _ = await write(store)
    assert (ours, store.calls, written(store)) == (True, calls, [OURS])


async def test_an_append_that_was_refused_goes_behind_what_was_first() -> None:
    store = Scripted(["theirs"])
    ours, _ = await write(store)
    assert (ours, store.calls, written(store)) == (True, ["append", "read", "append"], [THEIRS, OURS])


async def test_who_wants_nothing_more_after_reading_writes_nothing_more() -> None:
    """As one that ends a job unless anybody writes to it meanwhile, and another that finds it asked for."""
    store = Scripted(["theirs"])
    journal = store.journal()
    wanted = lambda: () if journal.state.cancel is not None else (OURS,)  # noqa: E731
    assert not await Writer(store.store, journal, "q").write(wanted, give_up_s=LONG_S)
    assert (store.calls, written(store)) == (["append", "read"], [THEIRS])


async def test_the_same_record_in_the_message_of_another_is_not_ours() -> None:
    store = Scripted()
    journal = store.journal()
    store._append(OURS)
    assert not await Writer(store.store, journal, "q").write(once(journal, OURS), give_up_s=LONG_S)
    assert written(store) == [OURS]


async def test_all_that_is_taken_in_is_heard_of_once_in_order_before_the_next_try() -> None:
    store = Scripted(["theirs", "dropped", "lost"])
    journal = store.journal()
    heard: list[list[AnyRecord]] = []

    def absorbed(news: Sequence[Message], message_id: str) -> None:
        assert message_id
        assert [record for message in news for record in message.records] == journal.records[len(seen) :]
        seen[:] = journal.records
        heard.append([record for message in news for record in message.records])

    seen = list(journal.records)
    await Writer(store.store, journal, "q", absorbed).write(once(journal, OURS), give_up_s=LONG_S)
    assert heard == [[THEIRS], [], [OURS]]


async def test_who_may_not_go_on_after_what_was_read_stops_the_write_though_it_stands_there() -> None:
    """Its message landed and a newer lease behind it: the first question comes first."""

    class Deposed(Exception):
        pass

    def absorbed(news: Sequence[Message], message_id: str) -> None:
        if any(isinstance(record, Lease) for message in news for record in message.records):
            raise Deposed

    store = Scripted(["lost"])
    journal, read = store.journal(), store.read

    async def read_late(job: str, after: int = 0) -> list[Entry]:
        store._append(LEASE)
        return await read(job, after)

    store.read = read_late  # type: ignore[method-assign]
    with pytest.raises(Deposed):
        await Writer(store.store, journal, "q", absorbed).write(once(journal, OURS), give_up_s=LONG_S)
    assert store.calls == ["append", "read"]


async def test_what_is_wanted_may_shrink_to_what_has_not_landed() -> None:
    """A message whose writer was cancelled landed meanwhile, with a part of what is to be written now."""
    store = Scripted()
    journal = store.journal()
    store._append(OURS)
    wanted = lambda: tuple(one for one in (OURS, MORE) if one not in journal.records)  # noqa: E731
    assert await Writer(store.store, journal, "q").write(wanted, give_up_s=LONG_S)
    assert written(store) == [OURS, MORE]


async def test_a_store_without_room_is_told_of_at_once_where_nothing_can_have_landed() -> None:
    store = Scripted(["refused"])
    with pytest.raises(StoreFull):
        await write(store)
    assert (store.calls, written(store)) == (["append"], [])


async def test_a_store_without_room_is_waited_for_by_who_has_to_write() -> None:
    store = Scripted(["refused", "refused"])
    ours, _ = await write(store, waits_for_room=True)
    assert (ours, written(store)) == (True, [OURS])


async def test_a_store_that_does_not_answer_reads_is_read_until_it_does() -> None:
    store = Scripted(["lost"], ["away", "away"])
    ours, _ = await write(store)
    assert (ours, store.calls, written(store)) == (True, ["append", "read", "read", "read"], [OURS])


@pytest.mark.parametrize(("appends", "calls"), [(["dropped"] * 9, 2), (["theirs"] * 9, 2), (["unsent"], 2)])
async def test_after_its_time_nobody_tries_again(appends: list[str], calls: int) -> None:
    """Time is up at once: one try, and one look at what became of it."""
    store = Scripted(appends)
    with pytest.raises(StoreUnavailable, match="took no record of j"):
        await write(store, give_up_s=-1.0)
    assert len(store.calls) == calls
    assert OURS not in written(store)


async def test_what_the_last_look_finds_counts_though_the_time_is_up() -> None:
    store = Scripted(["lost"])
    ours, _ = await write(store, give_up_s=-1.0)
    assert (ours, written(store)) == (True, [OURS])


async def test_a_store_that_stays_away_is_no_success() -> None:
    store = Scripted(["lost"], ["away"] * 9)
    with pytest.raises(StoreUnavailable, match="away"):
        await write(store, give_up_s=-1.0)


async def test_to_a_journal_that_is_corrupt_nothing_is_written() -> None:
    store = Scripted(["theirs"])
    journal = store.journal()
    read = store.read

    async def damaged(job: str, after: int = 0) -> list[Entry]:
        return [Entry(seq=one.seq, data=one.data + b"!") for one in await read(job, after)]

    store.read = damaged  # type: ignore[method-assign]
    assert not await Writer(store.store, journal, "q").write(once(journal, OURS), give_up_s=LONG_S)
    assert (store.calls, journal.state.corrupt is not None) == (["append", "read"], True)


async def test_only_the_end_of_a_short_job_may_be_delayed() -> None:
    store = Scripted()
    journal = store.journal()
    one = Writer(store.store, journal, "q")
    done = Done(at=4, status="succeeded")
    for records in ([LEASE], [OURS], [done]):
        await one.write(once(journal, *records), give_up_s=LONG_S)
    assert store.may_delay == [False, False, False]
    store = Scripted()
    journal = store.journal()
    await Writer(store.store, journal, "q").write(once(journal, LEASE, done), give_up_s=LONG_S)
    assert store.may_delay == [True]
