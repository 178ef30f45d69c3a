"""The tools of one engine: made when they are needed, and made anew when they are gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mvmci.engines.embedded.host import Host
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Spec
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import ForkServer
from tests.harness import guests
from tests.harness.memory import Memory
from tests.harness.waiting import LONG_S


@pytest.fixture
async def host(root: Path) -> AsyncIterator[Host]:
    made = Host(store=Memory().store("w"), root=root, allow=Allow)
    yield made
    await made.close()


async def spec_of(host: Host, wasm: bytes) -> Spec:
    module = await host.store.blobs.put(wasm)
    return Spec(
        at=1,
        id="j",
        queue="default",
        kind="command",
        module=module,
        name="c",
        component=False,
        seed=1,
        by="t",
    )


async def kill(forkserver: ForkServer) -> None:
    """Kill the zygote, as the kernel does when memory is short, and wait until that is known."""
    child = await forkserver.fork(Profile(name="workflow", uid=forkserver.slot_uid(0)))
    os.kill(forkserver._process.pid, signal.SIGKILL)
    async with asyncio.timeout(LONG_S):
        await child.wait()


async def test_a_fork_server_that_died_is_replaced_for_the_next_job(host: Host) -> None:
    await host.compiled(await spec_of(host, guests.command("(call $exit (i32.const 1))")))
    for get in (host.guests, host.programs):
        forkserver = await get()
        await kill(forkserver)
        assert not forkserver.alive
        assert (await get()).alive
    path = await host.compiled(await spec_of(host, guests.command("(call $exit (i32.const 2))")))
    assert (host.root / path).exists(), "the code cache forks from the new one"
