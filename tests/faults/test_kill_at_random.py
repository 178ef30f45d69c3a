"""kill -9 at random instants, on JetStream: whoever comes next ends the jobs, and nothing happens twice."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from pathlib import Path

import pytest

from mvmci.jobs.job import Limits
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.stores.nats import remove
from tests.conftest import open_nats
from tests.faults.test_crash_everywhere import outcome
from tests.harness.broker import ensure
from tests.harness.waiting import LONG_S
from tests.harness.world import Counting, script_spec

JOBS = 4
KILLS = 8
ROUNDS = 20
LIVES_S = (0.0, 0.4)  # how long a process lives after it did something that the server saw
STORE_BYTES = 512 << 20


def steps(url: str, job: str) -> list[dict[str, object]]:
    """Rounds of an effect at most once and an idempotent one, short pauses between them."""
    return [
        step
        for n in range(ROUNDS)
        for step in (
            {"http": {"method": "POST", "url": f"{url}/{job}/once/{n}"}},
            {"http": {"method": "PUT", "url": f"{url}/{job}/again/{n}", "idempotent": True}},
            {"sleep": 20},
            {"exec": {"argv": ["tee", "-a", "notes"], "stdin": f"{n}\n", "idempotent": True}},
        )
    ]


@pytest.mark.parametrize("seed", [1])
async def test_jobs_whose_holders_are_killed_at_random_end_once_and_repeat_no_effect(
    broker_url: str, host_root: Path, seed: int
) -> None:
    dice = random.Random(seed)
    cluster = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, cluster, store_bytes=STORE_BYTES)
    store = await open_nats(broker_url, cluster, "client")
    jobs = [f"j{n}" for n in range(JOBS)]
    async with Counting().serve() as server:
        for job in jobs:
            await submit(
                store,
                await script_spec(store, job, steps(server.url, job), limits=Limits(attempts=1_000)),
            )

        async def start(unit: str, *jobs: str) -> asyncio.subprocess.Process:
            arguments = (broker_url, cluster, unit, str(host_root), server.url, *jobs)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.faults.runner", *arguments, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            await process.stdout.readline()
            return process

        for n in range(KILLS):
            server.asked.clear()
            process = await start(f"w{n}", *jobs)
            ended = asyncio.create_task(process.wait())
            asked = asyncio.create_task(server.asked.wait())
            await asyncio.wait([ended, asked], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([ended], timeout=dice.uniform(*LIVES_S))
            asked.cancel()
            if not ended.done():
                process.kill()
            await process.communicate()
        process = await start(f"w{KILLS}", *jobs)
        await asyncio.wait_for(process.communicate(), LONG_S)
        assert process.returncode == 0

    holders = interrupted = 0
    for job in jobs:
        journal = await load(store, job)
        results = await outcome(journal, store)
        holders += journal.state.epoch
        interrupted += sum(result == {"error": "interrupted", "text": ""} for result in results[::4])
        assert [result["status"] for result in results[1::4]] == [200] * ROUNDS
        assert results[-1]["stdout"] == f"{ROUNDS - 1}\n"
    print(f"{holders} holders, {interrupted} effects interrupted")
    assert holders > len(jobs), "nothing was killed in the middle of anything"
    for name, count in server.counts.items():
        if "/once/" in name:
            assert count == 1
        else:
            assert len(server.keys[name]) == 1
    assert sum("/once/" in name for name in server.counts) >= ROUNDS * JOBS - interrupted
    await store.close()
    await remove(broker_url, cluster)
