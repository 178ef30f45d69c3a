"""What the client that makes load counts of jobs that were not taken, and of those that have not ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mvmci.bench import client
from mvmci.bench.client import Client
from mvmci.errors import NoAnswer, StoreFull


class Source:
    """Jobs that are nothing but their ids."""

    def next(self, job: str, at_ms: int) -> Any:
        return SimpleNamespace(id=job)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of a store in which there is room for one job, and no end to read."""
    taken: list[str] = []

    async def submit(store: object, spec: Any) -> bool:
        if taken:
            raise StoreFull("the store is full")
        taken.append(spec.id)
        return True

    async def read(self: Client) -> None:
        pass

    monkeypatch.setattr(client, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(client, "submit", submit)
    monkeypatch.setattr(Client, "read", read)
    cluster: Any = SimpleNamespace(store=None)
    return Client(cluster)


async def taken(store: object, spec: Any) -> bool:
    return True


async def test_a_job_for_which_there_was_no_room_is_told_once_and_is_not_lost(counting: Client) -> None:
    for _ in range(3):
        counting.begin(Source(), lambda _: None)
    with pytest.raises(StoreFull):
        await counting.settle(1.0)
    counting.check()
    assert (counting.open, await counting.count()) == (1, (1, 0, 1, 0, 0))


async def test_what_has_not_ended_when_a_run_is_cut_is_open_and_not_lost(
    counting: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [counting.begin(Source(), lambda _: None) for _ in range(2)]

    async def read(self: Client) -> None:
        """The end of one of two."""
        self._ended += several[0].id in self._unread
        self._unread.discard(several[0].id)

    monkeypatch.setattr(client, "submit", taken)
    monkeypatch.setattr(Client, "read", read)
    assert await counting.count_what_there_is(0.01) == (2, 1, 0, 0, 1)

    async def away(self: Client) -> None:
        raise NoAnswer("the broker does not answer")

    monkeypatch.setattr(Client, "read", away)
    assert await counting.count_what_there_is(0.01) == (2, 1, 0, 0, 1)
