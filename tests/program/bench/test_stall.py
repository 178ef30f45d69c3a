"""Coordinated omission, shown: a worker stands still for a while, and only an open loop tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence

import pytest

from mvmci.bench.client import Client
from mvmci.bench.load import closed, open_loop
from mvmci.bench.profiles import PROFILES, prepare
from tests.harness.cluster import Cluster

STALL_S = 2.0  # less than makes a worker be given up
AFTER_S, SECONDS = 2.0, 8.0
RATE = 100
ENOUGH = 2000  # jobs, for those open in the stall, and in two such pauses of the machine, to be less than 1 %


@pytest.fixture(scope="module")
def access() -> str:
    return "workers: {count: 1, slots: 2}\n"


@contextlib.asynccontextmanager
async def stalled(pid: int) -> AsyncIterator[None]:
    """It stops in the middle of what is done meanwhile."""

    async def stall() -> None:
        await asyncio.sleep(AFTER_S)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(STALL_S)
        finally:
            os.kill(pid, signal.SIGCONT)

    stalling = asyncio.create_task(stall())
    try:
        yield
    finally:
        await stalling


def p99_ms(samples_us: Sequence[int]) -> float:
    return sorted(samples_us)[int(len(samples_us) * 0.99)] / 1000


async def test_a_stall_shows_from_the_planned_moments_and_not_in_a_closed_loop(
    loaded: Cluster, client: Client
) -> None:
    pid = loaded.pids()["worker-1"]
    assert pid is not None
    light = await prepare(PROFILES["light"], client)
    async with closed(client, light, 5) as loop:
        await loop.window(1.0)
        async with stalled(pid):
            before = [*(await loop.window(SECONDS)).samples_us]
        while len(before) < ENOUGH:
            before += (await loop.window(1.0)).samples_us
    async with stalled(pid):
        after = (await open_loop(client, light, RATE, SECONDS, seed=1)).samples_us
    print(
        f"p99 of a closed loop {p99_ms(before):.0f} ms, from the plan of an open one {p99_ms(after):.0f} ms"
    )
    assert max(before) > 1_000_000  # it was there
    assert p99_ms(after) >= 1000
    assert p99_ms(after) >= 3 * p99_ms(before)
    assert sum(us > 500_000 for us in after) > RATE * STALL_S / 4
