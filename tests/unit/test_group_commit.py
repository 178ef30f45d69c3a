"""Appends go at once, unless they are ends of short jobs that come so fast that a batch of them pays."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest

from mvmci.stores.nats import append
from mvmci.stores.nats.append import HOLD_MANY, Append, GroupCommit
from mvmci.stores.nats.link import Link
from mvmci.stores.nats.parser import Incoming

MANY_IN_HAND = 1_000


class FakeLink:
    """Answers everything at once, and remembers how large each commit was."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._open = 0
        self._seq = itertools.count(1)

    def expect(self) -> tuple[str, asyncio.Future[Incoming]]:
        return "inbox", asyncio.get_running_loop().create_future()

    async def publish(self, subject: str, data: bytes, *, headers: dict[str, str], reply: str) -> None:
        self._open += 1
        next(self._seq)
        if "Nats-Batch-Commit" in headers:
            self.sent.append(self._open)
            self._open = 0

    async def answer(self, answer: asyncio.Future[Incoming]) -> Incoming:
        return Incoming(subject="", data=b'{"seq": %d}' % (next(self._seq) - 1))

    async def request(self, subject: str, data: bytes, *, headers: dict[str, str]) -> dict[str, Any]:
        self.sent.append(1)
        return {"seq": next(self._seq)}


class Load:
    """A writer with many jobs in hand, whose ends have come fast for a while."""

    def __init__(self) -> None:
        self.link = FakeLink()
        self.in_hand = MANY_IN_HAND
        self.commit = GroupCommit(cast(Link, self.link), lambda: self.in_hand)
        self._number = itertools.count()

    def append(self, *, may_delay: bool = True) -> asyncio.Task[int]:
        job = f"j{next(self._number)}"
        return asyncio.create_task(self.commit.append(Append(job, job, job, b"", 1, may_delay)))

    async def sent(self) -> list[int]:
        """The sizes of what was sent since this was last asked, once nothing moves any more."""
        for _ in range(10):
            await asyncio.sleep(0)
        sent, self.link.sent = self.link.sent, []
        return sent


@pytest.fixture
async def load() -> Load:
    """One whose ends come without any pause, by its clock."""
    load = Load()
    load.commit._clock = lambda: 0.0
    await asyncio.gather(*(load.append() for _ in range(200)))
    await load.sent()
    return load


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """From now on nothing is sent because it has waited for long: the machine may be busy."""
    monkeypatch.setattr(append, "HOLD_S", 1_000.0)


async def test_an_end_goes_at_once_where_ends_are_rare() -> None:
    load = Load()
    end = load.append()
    assert await load.sent() == [1]
    await end


async def test_under_load_ends_wait_for_each_other_until_there_are_many(load: Load, patient: None) -> None:
    ends = [load.append() for _ in range(HOLD_MANY - 1)]
    assert await load.sent() == []
    ends.append(load.append())
    assert await load.sent() == [HOLD_MANY]
    await asyncio.gather(*ends)


async def test_no_end_waits_for_long(load: Load) -> None:
    await load.append()
    assert await load.sent() == [1]


async def test_what_somebody_waits_for_goes_at_once_and_takes_the_ends_along(
    load: Load, patient: None
) -> None:
    ends = [load.append() for _ in range(20)]
    assert await load.sent() == []
    await load.append(may_delay=False)
    assert await load.sent() == [21]
    await asyncio.gather(*ends)


async def test_the_last_jobs_in_hand_wait_for_nobody(load: Load) -> None:
    load.in_hand = 20
    ends = [load.append() for _ in range(20)]
    assert await load.sent() == [20]
    await asyncio.gather(*ends)


async def test_closing_fails_what_still_waits(load: Load, patient: None) -> None:
    end = load.append()
    assert await load.sent() == []
    await load.commit.close()
    assert await asyncio.gather(end, return_exceptions=True) != [None]
    assert isinstance(end.exception(), Exception)
