"""What every store promises of hints: `mvmci.store.Hints`."""

from __future__ import annotations

import asyncio
import time

import pytest

from mvmci.store import Delivery, Store
from tests.conftest import OpenStore
from tests.harness.waiting import LONG_S

LAPSE_S = 2.0
NEVER_S = 0.3  # so long nothing comes

# A folder has none: with no cluster there is nobody to tell.
pytestmark = pytest.mark.parametrize("place", ["memory", "jetstream"], indirect=True)


@pytest.fixture
def hint_lapse_s() -> float:
    return LAPSE_S


async def submit(store: Store, job: str, queue: str = "q") -> None:
    await store.journals.append(job, "spec", queue, b"spec", expect=0)


async def pull(store: Store, queue: str = "q") -> Delivery:
    hint = await store.hints.pull(queue, wait_s=LONG_S)
    assert hint is not None
    return hint


async def nothing_comes(store: Store, queue: str = "q", wait_s: float = NEVER_S) -> bool:
    return await store.hints.pull(queue, wait_s=wait_s) is None


def now_ms() -> int:
    return int(time.time() * 1000)


async def test_an_empty_queue_gives_none_after_the_wait(store: Store) -> None:
    assert await nothing_comes(store)


async def test_a_new_spec_is_a_fresh_hint(store: Store) -> None:
    await submit(store, "a")
    hint = await pull(store)
    assert hint.job == "a"
    assert [hint.spec_entry] == await store.journals.read("a")
    await hint.ack()
    assert await nothing_comes(store)


async def test_only_a_spec_is_a_hint(store: Store) -> None:
    seq = await store.journals.append("a", "run", "q", b"x", expect=0)
    await store.journals.append("a", "done", "q", b"x", expect=seq)
    assert await nothing_comes(store)


async def test_a_ready_is_a_hint_that_is_not_fresh(store: Store) -> None:
    await store.hints.ready("q", "a")
    hint = await pull(store)
    assert (hint.job, hint.spec_entry is not None) == ("a", False)


async def test_a_pull_that_waits_gets_what_comes(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    waiting = asyncio.create_task(pull(one))
    await asyncio.sleep(0.1)
    await submit(two, "a")
    assert (await waiting).job == "a"


async def test_a_hint_goes_to_one_puller(open_store: OpenStore) -> None:
    stores = [await open_store(f"u{i}") for i in range(3)]
    for i in range(30):
        await submit(stores[0], f"j{i}")
    hints = await asyncio.gather(*(pull(stores[i % 3]) for i in range(30)))
    assert sorted(hint.job for hint in hints) == sorted(f"j{i}" for i in range(30))
    assert all(hint.spec_entry is not None for hint in hints)


async def test_queues_are_apart(store: Store) -> None:
    await submit(store, "a", "q1")
    await store.hints.ready("q1", "b")
    assert await nothing_comes(store, "q2")
    assert {(await pull(store, "q1")).job, (await pull(store, "q1")).job} == {"a", "b"}


async def test_a_hint_that_is_not_acknowledged_comes_again_and_is_not_fresh(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await submit(one, "a")
    assert (await pull(one)).spec_entry is not None
    again = await pull(two)
    assert (again.job, again.spec_entry is not None) == ("a", False)


async def test_a_hint_that_is_kept_does_not_come_again(store: Store) -> None:
    await submit(store, "a")
    hint = await pull(store)
    until = time.monotonic() + 1.5 * LAPSE_S
    while time.monotonic() < until:
        await hint.keep()
        assert await nothing_comes(store, wait_s=LAPSE_S / 8)
    assert (await pull(store)).job == "a"  # once nobody keeps it


async def test_a_stale_acknowledgement_is_harmless(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await submit(one, "a")
    stale = await pull(one)
    current = await pull(two)
    await stale.ack()
    await current.keep()
    await current.ack()
    await stale.ack()
    await submit(one, "b")
    assert (await pull(one)).job == "b"


async def test_a_newer_ready_replaces_an_older_one(store: Store) -> None:
    for _ in range(3):
        await store.hints.ready("q", "a")
    await (await pull(store)).ack()
    assert await nothing_comes(store)


async def test_a_ready_during_the_work_outlives_its_acknowledgement(store: Store) -> None:
    await store.hints.ready("q", "a")
    hint = await pull(store)
    await store.hints.ready("q", "a")
    await hint.ack()
    assert (await pull(store)).job == "a"


async def test_a_timer_says_ready_at_its_time_and_not_before(store: Store) -> None:
    at = now_ms() + 1500
    await store.hints.timer("q", "a", at)
    hint = await pull(store)
    assert now_ms() >= at
    assert (hint.job, hint.spec_entry is not None) == ("a", False)
    await hint.ack()
    assert await nothing_comes(store)


async def test_a_timer_in_the_past_says_ready_at_once(store: Store) -> None:
    await store.hints.timer("q", "a", now_ms() - 60_000)
    assert (await pull(store)).job == "a"


@pytest.mark.parametrize("first", [-3_600_000, 3_600_000])
async def test_a_newer_timer_replaces_an_older_one(store: Store, first: int) -> None:
    if first < 0:
        await store.hints.timer("q", "a", now_ms() + 1000)
        await store.hints.timer("q", "a", now_ms() + 3_600_000)
        assert await nothing_comes(store, wait_s=2.5)
    else:
        await store.hints.timer("q", "a", now_ms() + 3_600_000)
        await store.hints.timer("q", "a", now_ms() - 1000)
        assert (await pull(store)).job == "a"


async def test_a_pull_that_was_cancelled_loses_no_hint(store: Store) -> None:
    waiting = [asyncio.create_task(pull(store)) for _ in range(5)]
    await asyncio.sleep(0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await submit(store, "a")
    assert (await pull(store)).job == "a"


async def test_a_hint_that_is_put_off_comes_again_then_and_not_before(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await one.hints.ready("q", "a")
    await (await pull(one)).redeliver(1.5)
    assert await nothing_comes(two)
    assert (await pull(two)).job == "a"
