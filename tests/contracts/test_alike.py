"""The same operations have the same outcomes in memory and in JetStream, whatever they are.

Hypothesis draws rows of operations; each row runs on a fresh place of either kind. Sequences are
compared by their rank, since only their order is promised.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvmci.errors import Conflict, NotFound
from mvmci.store import Delivery, Store, digest_of
from mvmci.stores.nats import remove
from tests.conftest import open_nats
from tests.harness.broker import ensure
from tests.harness.memory import Memory
from tests.harness.waiting import LONG_S

JOBS = st.sampled_from(["a", "a-b", "b"])
QUEUES = st.sampled_from(["q", "r"])
DATA = st.sampled_from([b"", b"x", b"y" * 1000])
KINDS = st.sampled_from(["spec", "run", "cancel", "done"])
BACK = st.sampled_from([0, 0, 0, 1, 2, -1])  # how far the expectation lies behind; -1: none at all
EMPTY_S = 0.05

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), JOBS, KINDS, QUEUES, DATA, BACK),
        st.tuples(st.just("read"), JOBS, st.integers(0, 3)),
        st.tuples(st.just("jobs")),
        st.tuples(st.just("put"), DATA),
        st.tuples(st.just("blob"), DATA),
        st.tuples(st.just("ready"), QUEUES, JOBS),
        st.tuples(st.just("pull"), QUEUES),
        st.tuples(st.just("ack"), st.integers(0, 3)),
    ),
    max_size=25,
)


class Player:
    """Plays operations on one store and writes down what comes of them.

    That there is no hint more only silence says. So who plays after another is told what that one found, and
    waits for as many.
    """

    def __init__(self, store: Store, hints: list[int]) -> None:
        self.store = store
        self.expected = list(hints)
        self.found: list[int] = []  # hints, at each pull
        self.seqs: dict[str, list[int]] = {}
        self.hints: list[Delivery] = []

    async def play(self, operations: list[tuple[Any, ...]]) -> list[Any]:
        return [await getattr(self, verb)(*values) for verb, *values in operations]

    async def append(self, job: str, kind: Any, queue: str, data: bytes, back: int) -> Any:
        known = [0, *self.seqs.get(job, [])]
        expect = known[max(len(known) - 1 - back, 0)] if back >= 0 else 10**9
        text = data.hex().encode()
        try:
            seq = await self.store.journals.append(job, kind, queue, text, expect=expect)
        except Conflict:
            return "conflict"
        self.seqs.setdefault(job, []).append(seq)
        return len(self.seqs[job])

    async def read(self, job: str, rank: int) -> Any:
        known = [0, *self.seqs.get(job, [])]
        entries = await self.store.journals.read(job, known[min(rank, len(known) - 1)])
        return [(known.index(entry.seq), entry.data) for entry in entries]

    async def jobs(self) -> Any:
        return sorted([job async for job in self.store.journals.jobs()])

    async def put(self, data: bytes) -> Any:
        return await self.store.blobs.put(data)

    async def blob(self, data: bytes) -> Any:
        digest = digest_of(data)
        try:
            return await self.store.blobs.has(digest), await self.store.blobs.get(digest)
        except NotFound:
            return "not found"

    async def ready(self, queue: str, job: str) -> None:
        await self.store.hints.ready(queue, job)

    async def pull(self, queue: str) -> Any:
        """All that there is, since hints of one queue come in no order."""
        found: list[Delivery] = []
        expected = self.expected.pop(0) if self.expected else 0
        while True:
            wait_s = LONG_S if len(found) < expected else EMPTY_S
            hint = await self.store.hints.pull(queue, wait_s=wait_s)
            if hint is None:
                break
            found.append(hint)
        self.found.append(len(found))
        found.sort(key=lambda hint: (hint.job, hint.spec_entry is not None))
        self.hints += found
        return [(hint.job, hint.spec_entry is not None) for hint in found]

    async def ack(self, number: int) -> None:
        if number < len(self.hints):
            await self.hints.pop(number).ack()


async def in_memory(operations: list[tuple[Any, ...]]) -> tuple[list[Any], list[int]]:
    """What came of each operation, and how many hints each pull found."""
    store = Memory().store("u1")
    player = Player(store, [])
    outcome = await player.play(operations)
    await store.close()
    return outcome, player.found


def in_jetstream(url: str) -> Callable[[list[tuple[Any, ...]], list[int]], Any]:
    async def play(operations: list[tuple[Any, ...]], hints: list[int]) -> list[Any]:
        cluster = f"t-{secrets.token_hex(4)}"
        await ensure(url, cluster, store_bytes=64 << 20)
        store = await open_nats(url, cluster, "u1")
        try:
            return await Player(store, hints).play(operations)
        finally:
            await store.close()
            await remove(url, cluster)

    return play


@pytest.mark.usefixtures("broker_url")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(operations=OPERATIONS)
def test_memory_and_jetstream_answer_alike(broker_url: str, operations: list[tuple[Any, ...]]) -> None:
    outcome, hints = asyncio.run(in_memory(operations))
    assert outcome == asyncio.run(in_jetstream(broker_url)(operations, hints))
