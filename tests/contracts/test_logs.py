"""What every store promises of logs: `mvmci.store.Logs`."""

from __future__ import annotations

import asyncio

from mvmci.store import CHUNK_BYTES_MAX, Chunk, Store
from tests.conftest import OpenStore
from tests.harness.waiting import LONG_S


def chunk(number: int, data: bytes = b"", attempt: int = 0) -> Chunk:
    return Chunk(attempt=attempt, number=number, stream="stdout", data=data or b"%d\n" % number, at=1)


async def take(store: Store, job: str, count: int) -> list[Chunk]:
    """The first `count` chunks that a follower gets."""
    chunks: list[Chunk] = []
    follower = store.logs.follow(job)
    async with asyncio.timeout(LONG_S):
        async for one in follower:
            chunks.append(one)
            if len(chunks) == count:
                break
    await follower.aclose()
    return chunks


async def test_a_job_that_printed_nothing_has_no_log(store: Store) -> None:
    assert await store.logs.read("a") == []


async def test_chunks_are_read_in_the_order_of_their_arrival(store: Store) -> None:
    await store.logs.append("a", "q", [chunk(0), chunk(1)])
    await store.logs.append("b", "q", [chunk(7)])
    await store.logs.append("a", "q", [chunk(0, attempt=2)])
    assert await store.logs.read("a") == [chunk(0), chunk(1), chunk(0, attempt=2)]


async def test_any_bytes_come_back(store: Store) -> None:
    wild = [chunk(0, bytes(range(256))), chunk(1, b"\n\r\n"), chunk(2, b"\xff" * CHUNK_BYTES_MAX)]
    await store.logs.append("a", "q", wild)
    assert await store.logs.read("a") == wild


async def test_no_chunks_are_no_harm(store: Store) -> None:
    await store.logs.append("a", "q", [])
    assert await store.logs.read("a") == []


async def test_a_follower_gets_what_is_there_and_what_comes(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await one.logs.append("a", "q", [chunk(0), chunk(1)])
    following = asyncio.create_task(take(two, "a", 4))
    await asyncio.sleep(0.1)
    await one.logs.append("a", "q", [chunk(2)])
    await one.logs.append("a", "q", [chunk(3)])
    assert await following == [chunk(number) for number in range(4)]


async def test_followers_miss_nothing_and_repeat_nothing_while_it_is_written(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    following = [asyncio.create_task(take(store, "a", 300)) for store in (one, two, two)]
    for start in range(0, 300, 3):
        await one.logs.append("a", "q", [chunk(number) for number in range(start, start + 3)])
        if start % 30 == 0:
            following.append(asyncio.create_task(take(two, "a", 300)))
    for follower in following:
        assert [one.number for one in await follower] == list(range(300))
