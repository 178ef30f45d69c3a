"""What a client does with jobs: an id exists once, a cancel once, and who waits hears of the end."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from mvmci.errors import Conflict, IdTaken, NoAnswer, StoreUnavailable
from mvmci.jobs.journal import AnyRecord, Cancel, Done, Entry, Journal, Lease, Progress, Spec, kind_of, status
from mvmci.journals.client import cancel_job, submit, until_ended
from mvmci.journals.reader import load
from mvmci.store import Store
from tests.conftest import OpenStore, Place


def spec(job: str = "j", **changes: Any) -> Spec:
    asked = Spec(
        at=1,
        id=job,
        queue="default",
        kind="command",
        module="sha256:" + "0" * 64,
        name="m.wasm",
        component=False,
        seed=1,
        by="me",
    )
    return msgspec.structs.replace(asked, **changes)


async def test_the_same_request_again_is_accepted_and_written_once(store: Store) -> None:
    assert await submit(store, spec())
    assert not await submit(store, spec(at=2, by="you", seed=2))
    journal = await load(store, "j")
    assert journal.records == [spec()]


@pytest.mark.parametrize("changes", [{"args": ("x",)}, {"queue": "other"}, {"kind": "workflow"}])
async def test_another_request_under_the_same_id_is_refused(store: Store, changes: dict[str, Any]) -> None:
    await submit(store, spec())
    with pytest.raises(IdTaken, match="taken by another job"):
        await submit(store, spec(**changes))


async def test_of_many_that_submit_the_same_id_at_once_one_is_new(open_store: OpenStore) -> None:
    stores = [await open_store(f"u{n}") for n in range(5)]
    new = await asyncio.gather(*(submit(store, spec(by=f"u{n}")) for n, store in enumerate(stores)))
    assert sum(new) == 1


async def test_the_tombstone_of_a_job_keeps_its_id(place: Place, store: Store) -> None:
    if place.kind != "jetstream":
        pytest.skip("only a cluster forgets jobs: elsewhere a first message that is no spec is corrupt")
    await submit(store, spec("other"))  # the sequence is the stream's: what was purged stood before
    ended = Journal("j").encode([lease(), Done(at=1, status="succeeded")], "m")
    await store.journals.append("j", "done", "default", ended, expect=0)
    with pytest.raises(IdTaken, match="has already ended"):
        await submit(store, spec())


@pytest.mark.parametrize("landed", [True, False])
async def test_a_submit_without_an_answer_is_sent_again_and_exists_once(store: Store, landed: bool) -> None:
    deaf = Losing(store, landed=landed)
    assert await submit(dataclasses.replace(store, journals=deaf), spec())
    assert deaf.asked == (1 if landed else 2)
    assert (await load(store, "j")).records == [spec()]


# ---- The end of a job: waiting for it, asking for it


def lease(epoch: int = 1) -> Lease:
    return Lease(at=1, epoch=epoch, unit="u1", incarnation="i", run=f"r{epoch}", why="first")


async def write(store: Store, journal: Journal, *records: AnyRecord) -> None:
    """Append `records` as a holder would."""
    message_id = secrets.token_hex(4)
    data = journal.encode(records, message_id)
    seq = await store.journals.append(journal.job, kind_of(records), "default", data, expect=journal.tail)
    journal.absorb([Entry(seq=seq, data=data)])


class Losing:
    """Journals that lose the answer to the first append, and maybe the append."""

    def __init__(self, store: Store, *, landed: bool) -> None:
        self.asked = 0
        self._store = store
        self._landed = landed

    async def append(self, *args: Any, **options: Any) -> int:
        self.asked += 1
        if self.asked == 1 and not self._landed:
            raise NoAnswer("lost")
        seq = await self._store.journals.append(*args, **options)
        if self.asked == 1:
            raise NoAnswer("lost")
        return seq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store.journals, name)


async def test_a_cancel_ends_a_job_at_once_that_nobody_holds(store: Store) -> None:
    await submit(store, spec())
    journal = await load(store, "j")
    assert await cancel_job(store, journal, "me")
    assert status(journal.state) == status((await load(store, "j")).state) == ("cancelled", "cancelled by me")


async def test_a_cancel_of_a_held_job_stands_in_its_journal_for_the_holder(store: Store) -> None:
    await submit(store, spec())
    journal = await load(store, "j")
    await write(store, journal, lease())
    assert await cancel_job(store, await load(store, "j"), "me")
    found = (await load(store, "j")).state
    assert (status(found)[0], found.cancel is not None) == ("running", True)


@pytest.mark.parametrize("held", [False, True])
async def test_a_second_cancel_writes_nothing(store: Store, held: bool) -> None:
    await submit(store, spec())
    if held:
        await write(store, await load(store, "j"), lease())
    assert await cancel_job(store, await load(store, "j"), "me")
    assert not await cancel_job(store, await load(store, "j"), "you")
    assert [type(record) for record in (await load(store, "j")).records].count(Cancel) == 1


async def test_a_cancel_of_an_ended_job_writes_nothing(store: Store) -> None:
    await submit(store, spec())
    old = await load(store, "j")
    journal = await load(store, "j")
    await write(store, journal, lease(), Done(at=1, status="succeeded"))
    assert not await cancel_job(store, old, "me")
    assert status(old.state)[0] == "succeeded"
    assert (await load(store, "j")).tail == journal.tail


async def test_a_cancel_goes_behind_whatever_was_written_meanwhile(store: Store) -> None:
    await submit(store, spec())
    old = await load(store, "j")
    journal = await load(store, "j")
    await write(store, journal, lease())
    await write(store, journal, Progress(at=1, done=1, total=2, message=""))
    assert await cancel_job(store, old, "me")
    found = await load(store, "j")
    assert (found.state.corrupt, type(found.records[-1])) == (None, Cancel)


async def test_a_cancel_gets_in_between_the_messages_of_a_busy_holder(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await submit(one, spec())
    journal = await load(one, "j")
    await write(one, journal, lease())

    async def work() -> None:
        for number in itertools.count():
            await write(one, journal, Progress(at=1, done=number, total=0, message=""))
            await asyncio.sleep(0.003)  # an effect that is quick

    working = asyncio.create_task(work())
    try:
        async with asyncio.timeout(20):
            assert await cancel_job(two, await load(two, "j"), "me")
        with pytest.raises(Conflict):
            await working
    finally:
        working.cancel()


@pytest.mark.parametrize("landed", [True, False])
async def test_a_cancel_without_an_answer_is_sent_again_and_exists_once(store: Store, landed: bool) -> None:
    await submit(store, spec())
    losing = Losing(store, landed=landed)
    assert await cancel_job(dataclasses.replace(store, journals=losing), await load(store, "j"), "me")
    assert losing.asked == (1 if landed else 2)
    assert [type(record) for record in (await load(store, "j")).records] == [Spec, Cancel]


async def test_of_many_that_cancel_at_once_one_has_asked(open_store: OpenStore) -> None:
    stores = [await open_store(f"u{n}") for n in range(5)]
    await submit(stores[0], spec())
    journals = [await load(store, "j") for store in stores]
    pairs = zip(stores, journals, strict=True)
    asked = await asyncio.gather(*(cancel_job(store, journal, "me") for store, journal in pairs))
    assert sum(asked) == 1
    assert all(journal.state.cancel is not None for journal in journals)


async def test_who_waits_hears_of_the_end(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await submit(one, spec())
    waiting = await load(two, "j")
    ending = asyncio.create_task(until_ended(two, waiting))
    journal = await load(one, "j")
    await write(one, journal, lease())
    await write(one, journal, Progress(at=1, done=1, total=2, message=""))
    await asyncio.sleep(0.2)
    assert not ending.done()
    await write(one, journal, Done(at=1, status="failed", reason="exit"))
    async with asyncio.timeout(20):
        await ending
    assert (status(waiting.state), waiting.records) == (("failed", "exit"), journal.records)


async def test_who_waits_for_an_ended_job_does_not_wait(store: Store) -> None:
    await submit(store, spec())
    journal = await load(store, "j")
    await write(store, journal, lease(), Done(at=1, status="succeeded"))
    await until_ended(store, await load(store, "j"))


async def test_who_waits_goes_on_waiting_while_the_store_is_away(store: Store) -> None:
    class Away:
        """Journals whose followers are cut off, and whose readers have to ask twice."""

        cut = 0

        async def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
            self.cut += 1
            if self.cut < 4:
                raise StoreUnavailable("away")
            async for entry in store.journals.follow(job, after):
                yield entry

        async def read(self, job: str, after: int = 0) -> list[Entry]:
            self.cut += 1
            if self.cut % 3 != 1:
                raise StoreUnavailable("away")
            return await store.journals.read(job, after)

    await submit(store, spec())
    waiting, away = await load(store, "j"), Away()
    ending = asyncio.create_task(until_ended(dataclasses.replace(store, journals=away), waiting))
    journal = await load(store, "j")
    await write(store, journal, lease(), Done(at=1, status="succeeded"))
    async with asyncio.timeout(20):
        await ending
    assert away.cut > 3
    assert status(waiting.state)[0] == "succeeded"
