"""What every store promises of presence: `mvmci.store.Presence`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from mvmci.jobs.journal import Lease
from mvmci.store import Presence, Store, copies
from mvmci.wire import WIRE
from tests.conftest import LISTENING, PLACES, OpenStore, Place
from tests.harness.waiting import until_true

GONE_S = 1.0

pytestmark = pytest.mark.parametrize("place", [*PLACES, LISTENING], indirect=True)


@pytest.fixture
def gone_s() -> float:
    return GONE_S


def lease(holder: Presence, epoch: int = 1, run: str = "r") -> Lease:
    return Lease(at=1, epoch=epoch, unit=holder.unit, incarnation=holder.incarnation, run=run, why="first")


async def stays(question: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        if not await question():
            return False
        await asyncio.sleep(0.05)
    return True


async def units(store: Store) -> set[str]:
    return {member.unit for member in await store.presence.members()}


async def test_each_opening_is_another_incarnation(open_store: OpenStore) -> None:
    one, again = await open_store("u1"), await open_store("u1")
    assert one.presence.unit == again.presence.unit == "u1"
    assert one.presence.incarnation != again.presence.incarnation


async def test_who_is_there_is_listed(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")

    async def both_are_listed() -> bool:
        return await units(one) == await units(two) == {"u1", "u2"}

    await until_true(both_are_listed)


async def test_who_left_is_listed_no_more(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await two.close()

    async def only_one_is_listed() -> bool:
        return await units(one) == {"u1"}

    await until_true(only_one_is_listed)


async def test_what_a_unit_claims_is_listed_until_it_drops_it(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")

    async def holds() -> tuple[str, ...]:
        return next((member.holds for member in await two.presence.members() if member.unit == "u1"), ())

    async def claimed() -> bool:
        return await holds() == ("a@3",)

    async def dropped() -> bool:
        return await holds() == ()

    await one.presence.add_job("a", 3)
    await until_true(claimed)
    await one.presence.remove_job("a")
    await until_true(dropped)


async def test_a_unit_is_found_as_it_says_itself_until_it_has_left(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    incarnation = two.presence.incarnation

    async def found() -> bool:
        member = await one.presence.find("u2", incarnation)
        return member is not None and (member.unit, member.holds) == ("u2", ("a@3",))

    async def gone() -> bool:
        return await one.presence.find("u2", incarnation) is None

    await two.presence.add_job("a", 3)
    await until_true(found)
    assert await stays(found, 2.5 * GONE_S)
    await two.close()
    await until_true(gone)


async def test_a_unit_that_nobody_ever_heard_of_is_not_found_in_the_end(open_store: OpenStore) -> None:
    reader = await open_store("u2")

    async def gone() -> bool:
        return await reader.presence.find("u1", "ghost") is None

    await until_true(gone)


async def test_a_holder_is_live_for_as_long_as_it_claims(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await one.presence.add_job("a", 1)

    async def live() -> bool:
        return await two.presence.live("a", lease(one.presence))

    assert await stays(live, 2.5 * GONE_S)
    assert await one.presence.live("a", lease(one.presence))


async def test_a_holder_that_dropped_the_job_is_not_live(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await one.presence.add_job("a", 1)
    await one.presence.remove_job("a")

    async def gone() -> bool:
        return not await two.presence.live("a", lease(one.presence))

    await until_true(gone)
    assert not await one.presence.live("a", lease(one.presence))


async def test_a_holder_that_left_is_not_live(open_store: OpenStore) -> None:
    one, two = await open_store("u1"), await open_store("u2")
    await one.presence.add_job("a", 1)
    assert await two.presence.live("a", lease(one.presence))
    await one.close()

    async def gone() -> bool:
        return not await two.presence.live("a", lease(one.presence))

    await until_true(gone)


async def test_a_holder_that_nobody_ever_heard_of_is_not_live_in_the_end(open_store: OpenStore) -> None:
    reader = await open_store("u2")
    ghost = Lease(at=1, epoch=1, unit="u1", incarnation="ghost", run="r", why="first")

    async def gone() -> bool:
        return not await reader.presence.live("a", ghost)

    await until_true(gone)


async def test_an_older_epoch_of_a_live_holder_is_not_live(open_store: OpenStore) -> None:
    one = await open_store("u1")
    await one.presence.add_job("a", 2)
    assert await one.presence.live("a", lease(one.presence, epoch=2))
    assert not await one.presence.live("a", lease(one.presence, epoch=1))


async def test_who_runs_beside_itself_is_told_apart_and_who_was_started_again_is_not(
    open_store: OpenStore, place: Place
) -> None:
    if "jetstream" not in place.kind:
        pytest.skip("nobody else can be there under the same identity")
    reader = await open_store("u2")

    async def there() -> set[str]:
        return {one.incarnation for one in await reader.presence.members() if one.unit == "u1"}

    before = await open_store("u1")
    before.presence._announcer.cancel()  # type: ignore[attr-defined] (it dies, and says nothing)
    now = await open_store("u1")
    only_now = {now.presence.incarnation}

    async def it_alone() -> bool:
        return await there() == only_now

    await until_true(it_alone)
    assert await stays(it_alone, 1.5 * GONE_S)
    copy = await open_store("u1")

    async def both() -> bool:
        return await there() == only_now | {copy.presence.incarnation}

    await until_true(both)
    assert await stays(both, GONE_S)
    assert list(copies(await reader.presence.members())) == ["u1"]


WORDS = {
    "of a newer level": {"wire": WIRE + 1, "holds": [], "about": {"wire": WIRE + 1, "role": "worker"}},
    "of a much newer one": {"wire": WIRE + 98, "holds": {"in": "another form"}, "about": ["of another kind"]},
}


@pytest.mark.parametrize("said", WORDS.values(), ids=list(WORDS))
async def test_a_unit_whose_words_are_not_understood_is_there_and_may_hold_any_job(
    place: Place, said: dict[str, object]
) -> None:
    if place.kind != "jetstream":
        pytest.skip("nobody of another build is there")
    one, two = await place.store("u1"), await place.store("u2")
    link, layout = two.presence._link, two.presence._layout  # type: ignore[attr-defined]
    word = msgspec.json.encode({"unit": "u9", "incarnation": "i9"} | said)
    theirs = Lease(at=1, epoch=1, unit="u9", incarnation="i9", run="r", why="first")
    spoken = asyncio.create_task(_say(link, layout.member("u9", "i9"), word))

    async def listed() -> bool:
        found = [one for one in await one.presence.members() if one.unit == "u9"]
        return [(one.about.state, one.is_readable) for one in found] == [("newer", False)]

    await until_true(listed)
    assert await stays(lambda: one.presence.live("a", theirs), 2 * GONE_S)
    spoken.cancel()

    async def gone() -> bool:
        return not await one.presence.live("a", theirs)

    await until_true(gone)


async def _say(link: Any, subject: str, word: bytes) -> None:
    while True:
        await link.request(subject, word)
        await asyncio.sleep(GONE_S / 4)
