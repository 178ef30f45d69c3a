"""What is said of a job that does not go on."""

from __future__ import annotations

from mvmci.jobs.journal import Journal, Lease
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.journals.status import reason_of
from mvmci.journals.writer import Writer
from mvmci.wire import WIRE
from tests.harness.memory import Memory
from tests.harness.newer import append_newer
from tests.harness.world import command_spec


async def test_a_job_that_is_held_and_waits_says_for_what() -> None:
    """Also one that was taken over: its lease is written before its code is made."""
    store = Memory().store("u1")
    presence = store.presence
    await submit(store, await command_spec(store, "j", "hello"))
    journal = await load(store, "j")
    lease = Lease(at=1, epoch=1, unit="u1", incarnation=presence.incarnation, run="r", why="first")
    await presence.add_job("j", 1)
    await Writer(store, journal, "default").write(
        lambda: () if journal.state.lease else (lease,), give_up_s=1.0
    )
    assert await reason_of(store, journal, local=False) == ""
    await presence.explain("j", "compiling hello.wasm, once on this host")
    assert await reason_of(store, journal, local=False) == "waiting: compiling hello.wasm, once on this host"
    await presence.explain("j", "")
    assert await reason_of(store, journal, local=False) == ""


async def test_a_job_that_a_newer_build_wrote_to_says_so_and_nothing_else() -> None:
    store = Memory().store("u1")
    await submit(store, await command_spec(store, "j", "hello"))
    await append_newer(store, "j", WIRE + 1)
    journal = Journal("j")
    journal.absorb(await store.journals.read("j"))
    assert "of j is newer than this mvmci" in await reason_of(store, journal, local=False)
