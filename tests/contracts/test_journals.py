"""What every store promises of journals: `mvmci.store.Journals`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from mvmci.errors import Conflict
from mvmci.store import MESSAGE_BYTES_MAX, Store
from tests.conftest import OpenStore
from tests.harness.waiting import LONG_S


async def append(
    store: Store, job: str, data: bytes, expect: int, kind: str = "run", queue: str = "q"
) -> int:
    return await store.journals.append(job, kind, queue, data, expect=expect)


async def contents(store: Store, job: str, after: int = 0) -> list[bytes]:
    return [entry.data for entry in await store.journals.read(job, after)]


async def test_a_job_that_nobody_wrote_has_no_messages(store: Store) -> None:
    assert await store.journals.read("nobody") == []
    assert [job async for job in store.journals.jobs()] == []


async def test_messages_are_read_back_in_order_by_everyone(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    seq = 0
    for number in range(5):
        seq = await append((one, two)[number % 2], "a", b"%d" % number, seq)
    assert await contents(one, "a") == await contents(two, "a") == [b"0", b"1", b"2", b"3", b"4"]


async def test_the_first_message_is_found_by_its_sequence_and_nothing_else_is(store: Store) -> None:
    first = await append(store, "a", b"1", 0, "spec")
    second = await append(store, "a", b"2", first)
    await append(store, "b", b"3", 0, "spec")
    found = await store.journals.first("a", first)
    assert found is not None
    assert (found.seq, found.data) == (first, b"1")
    assert await store.journals.first("a", second) is None, "that is not its first"
    assert await store.journals.first("nobody", first) is None
    assert await store.journals.first("a", 1_000_000) is None


async def test_append_returns_the_sequence_that_read_shows(store: Store) -> None:
    first = await append(store, "a", b"1", 0, "spec")
    second = await append(store, "a", b"2", first)
    assert [entry.seq for entry in await store.journals.read("a")] == [first, second]
    assert 0 < first < second


async def test_read_after_gives_only_what_follows(store: Store) -> None:
    first = await append(store, "a", b"1", 0)
    second = await append(store, "a", b"2", first)
    assert await contents(store, "a", first) == [b"2"]
    assert await contents(store, "a", second) == []
    assert await contents(store, "a", second + 1000) == []


@pytest.mark.parametrize("off", [-1, 1])
async def test_a_wrong_expectation_is_refused_and_nothing_is_stored(store: Store, off: int) -> None:
    first = await append(store, "a", b"1", 0)
    second = await append(store, "a", b"2", first)
    stale = first if off < 0 else second + 1
    with pytest.raises(Conflict):
        await append(store, "a", b"3", stale)
    with pytest.raises(Conflict):
        await append(store, "a", b"3", 0)
    with pytest.raises(Conflict):
        await append(store, "new", b"3", 1)
    assert await contents(store, "a") == [b"1", b"2"]
    assert await contents(store, "new") == []


async def test_an_expectation_covers_messages_of_every_kind(store: Store) -> None:
    first = await append(store, "a", b"spec", 0, "spec")
    await append(store, "a", b"cancel", first, "cancel")
    for kind in ("run", "done", "spec", "cancel"):
        with pytest.raises(Conflict):
            await append(store, "a", b"late", first, kind)


async def test_an_id_exists_once_over_all_queues(store: Store) -> None:
    await append(store, "a", b"1", 0, "spec", "q1")
    with pytest.raises(Conflict):
        await append(store, "a", b"2", 0, "spec", "q2")
    assert await contents(store, "a") == [b"1"]


async def test_of_fifty_writers_with_one_expectation_exactly_one_wins(open_store: OpenStore) -> None:
    stores = [await open_store(f"u{number}") for number in range(5)]
    seq = 0
    for turn in range(3):
        writes = [append(stores[i % 5], "a", b"%d-%d" % (turn, i), seq) for i in range(50)]
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        won = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert len(won) == 1
        assert all(isinstance(outcome, Conflict) for i, outcome in enumerate(outcomes) if i != won[0])
        seq = outcomes[won[0]]
        assert (await contents(stores[0], "a"))[turn:] == [b"%d-%d" % (turn, won[0])]


async def test_batches_that_race_for_the_same_jobs_store_each_once(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    writes = [
        append(store, f"j{i}", unit, 0) for i in range(60) for store, unit in ((one, b"1"), (two, b"2"))
    ]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    for i in range(60):
        pair = outcomes[2 * i : 2 * i + 2]
        winners = [unit for outcome, unit in zip(pair, (b"1", b"2"), strict=True) if isinstance(outcome, int)]
        assert len(winners) == 1
        assert await contents(one, f"j{i}") == winners


async def test_two_appends_of_a_job_in_one_go_are_not_both_stored(store: Store) -> None:
    others = [append(store, f"other{i}", b"x", 0) for i in range(20)]
    outcomes = await asyncio.gather(
        append(store, "a", b"1", 0), append(store, "a", b"2", 0), *others, return_exceptions=True
    )
    assert sum(isinstance(outcome, int) for outcome in outcomes[:2]) == 1
    assert len(await contents(store, "a")) == 1


async def test_appends_to_different_jobs_never_conflict(store: Store) -> None:
    async def write_all(job: str) -> None:
        seq = 0
        for number in range(5):
            seq = await append(store, job, b"%d" % number, seq)

    await asyncio.gather(*(write_all(f"j{i}") for i in range(40)))
    for i in range(40):
        assert await contents(store, f"j{i}") == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_stale_append_spoils_no_other(store: Store) -> None:
    first = await append(store, "stale", b"1", 0)
    writes = [append(store, "stale", b"2", first + 1), *(append(store, f"j{i}", b"x", 0) for i in range(30))]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert isinstance(outcomes[0], Conflict)
    assert all(isinstance(outcome, int) for outcome in outcomes[1:])


async def test_ids_that_begin_alike_are_different_jobs(store: Store) -> None:
    await append(store, "a", b"1", 0)
    await append(store, "a-b", b"2", 0)
    await append(store, "ab", b"3", 0)
    assert [await contents(store, job) for job in ("a", "a-b", "ab")] == [[b"1"], [b"2"], [b"3"]]


async def test_the_largest_message_is_kept_and_a_larger_one_is_not(store: Store) -> None:
    largest = b"x" * MESSAGE_BYTES_MAX
    first = await append(store, "a", largest, 0)
    with pytest.raises(AssertionError):
        await append(store, "a", largest + b"x", first)
    assert await contents(store, "a") == [largest]


async def test_two_thousand_messages_are_read_back_in_order(store: Store) -> None:
    seq = 0
    for number in range(2000):
        seq = await append(store, "a", b"%d" % number, seq)
        if number % 100 == 0:
            await append(store, f"other{number}", b"x", 0)
    assert await contents(store, "a") == [b"%d" % number for number in range(2000)]


async def test_a_journal_of_many_megabytes_is_read_in_pages(store: Store) -> None:
    seq = 0
    for number in range(20):
        seq = await append(store, "a", b"%d" % (number % 10) * 900_000, seq)
    assert [len(data) for data in await contents(store, "a")] == [900_000] * 20


async def test_every_job_is_listed_once(store: Store) -> None:
    for job in ("a", "b", "c"):
        seq = await append(store, job, b"1", 0, "spec")
        await append(store, job, b"2", seq, "done")
    assert sorted([job async for job in store.journals.jobs()]) == ["a", "b", "c"]


async def test_all_messages_come_with_their_job_and_in_its_order(store: Store) -> None:
    wanted: dict[str, list[bytes]] = {"a": [], "a-b": [], "b": []}
    tails = dict.fromkeys(wanted, 0)
    for number in range(30):
        for job in wanted:
            data = b"%s %d" % (job.encode(), number)
            tails[job] = await append(store, job, data, tails[job], "spec" if number == 0 else "run")
            wanted[job].append(data)
    found: dict[str, list[bytes]] = {}
    tail: dict[str, int] = {}
    async for job, entry in store.journals.all():
        found.setdefault(job, []).append(entry.data)
        tail[job] = entry.seq
    assert (found, tail) == (wanted, tails)


async def test_where_there_is_no_job_there_are_no_messages(store: Store) -> None:
    assert [job async for job, _ in store.journals.all()] == []


async def test_the_newest_jobs_come_first_and_each_with_all_its_messages(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.stores.nats.journals.WINDOW", 3)
    monkeypatch.setattr("mvmci.stores.nats.journals.WINDOW_MAX", 20)
    wanted: dict[str, list[bytes]] = {}
    tails: dict[str, int] = {}
    for number in range(40):
        for job in (f"j{number:02}", f"j{number // 2:02}", "j00"):  # long after its spec, too
            data = b"%s %d" % (job.encode(), number)
            kind = "run" if job in wanted else "spec"
            tails[job] = await append(store, job, data, tails.get(job, 0), kind)
            wanted.setdefault(job, []).append(data)
    found = [(job, [entry.data for entry in entries]) async for job, entries in store.journals.newest()]
    assert found == list(wanted.items())[::-1]


async def test_where_there_is_no_job_there_is_no_newest(store: Store) -> None:
    assert [job async for job, _ in store.journals.newest()] == []


async def follow(store: Store, job: str, count: int, after: int = 0) -> list[bytes]:
    """The first `count` messages that a follower is given."""
    found: list[bytes] = []
    async with aclosing(store.journals.follow(job, after)) as entries:
        async for entry in entries:
            found.append(entry.data)
            if len(found) == count:
                break
    return found


async def test_a_follower_gets_the_messages_that_are_there_and_those_that_come(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    seq = 0
    following = [asyncio.create_task(follow(store, "a", 40)) for store in (one, two)]
    for number in range(40):
        seq = await append(one, "a", b"%d" % number, seq)
        await append(one, f"other{number}", b"x", 0)
    for follower in following:
        assert await follower == [b"%d" % number for number in range(40)]


async def test_a_follower_begins_after_what_it_knows(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    first = await append(one, "a", b"1", 0)
    second = await append(one, "a", b"2", first)
    following = asyncio.create_task(follow(two, "a", 2, after=first))
    await append(one, "a", b"3", second)
    assert await following == [b"2", b"3"]


async def test_a_follower_hears_at_once(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmci.stores.nats.link.LOOK_EVERY_S", 10 * LONG_S)  # it has to be told
    one, two = await open_store("u1"), await open_store("u2")
    seq = 0
    for number in range(10):
        following = asyncio.create_task(follow(two, "a", 1, after=seq))
        await asyncio.sleep(0.15)  # by now it waits
        seq = await append(one, "a", b"%d" % number, seq)
        async with asyncio.timeout(LONG_S):
            assert await following == [b"%d" % number]
