"""A crash at every append, then another holder: the same outcome, and no effect too many.

The guest is real, its effects are real, and the process that dies is one whose store stops answering
in the middle of things while its slots are killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.engines.embedded.engine import Embedded
from mvmci.engines.embedded.host import Host
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import AnyRecord, Journal, Result, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.store import Store, load_text
from tests.harness.memory import Memory
from tests.harness.world import Counting, Crashed, Mortal, Suspicious, Where, mortal, script_spec

APPENDS_MAX = 40
EFFECTS = 8

AT_MOST_ONCE = ("GET /a", "POST /b")


def steps(url: str) -> list[dict[str, Any]]:
    """Every kind of effect, at most once and idempotent, close together and apart."""
    return [
        {"random": True},
        {"http": {"method": "GET", "url": f"{url}/a"}},
        {"log": "after a"},
        {"http": {"method": "PUT", "url": f"{url}/i", "idempotent": True}},
        {"exec": {"argv": ["tee", "-a", "notes"], "stdin": "one\n"}},
        {"progress": [1, 2, "half"]},
        {"sleep": 20},
        {"exec": {"argv": ["tee", "-a", "notes"], "stdin": "two\n", "idempotent": True}},
        {"respond": {"early": True}},
        {"http": {"method": "POST", "url": f"{url}/b", "body": "x"}},
        {"exec": {"argv": ["cat", "notes"], "idempotent": True}},
        {"random": True},
        {"sleep": 0},
    ]


@pytest.fixture
async def server() -> AsyncIterator[Counting]:
    async with Counting().serve() as server:
        yield server


def engine(store: Store, host_root: Path, server: Counting) -> Embedded:
    allow = Allow(http=(f"{server.url}/*",), exec=("tee", "cat"))
    return Embedded(Host(store=store, root=host_root, allow=lambda: allow), slots=1)


async def run_to_the_end(store: Store, host_root: Path, server: Counting) -> None:
    it = engine(store, host_root, server)
    try:
        while (await it.run("j")).kind != "ended":
            pass
    finally:
        await it.close()


async def crash_once(
    host_root: Path, server: Counting, where: Where, when: str
) -> tuple[Journal, Store, Mortal]:
    """Run the script; its first holder dies at the append that `where` names, a second one ends it."""
    memory = Memory()
    first, journals = mortal(memory.store("w1"), where, when)
    logs = Suspicious(first)
    first = dataclasses.replace(first, logs=logs)
    second = memory.store("w2")
    await submit(second, await script_spec(second, "j", steps(server.url)))
    it = engine(first, host_root, server)
    with contextlib.suppress(Crashed):
        await it.run("j", spec_entry=(await second.journals.read("j"))[0])
    await it.close()
    await first.close()
    assert not logs.too_early, "output came before its cause was on disk"
    if journals.crashed:
        await run_to_the_end(second, host_root, server)
    return await load(second, "j"), second, journals


async def outcome(journal: Journal, store: Store) -> list[Any]:
    assert status(journal.state) == ("succeeded", "")
    assert journal.state.done is not None
    results: list[Any] = msgspec.json.decode(await load_text(store.blobs, journal.state.done.result))
    for result in results:
        if isinstance(result, dict):
            result.pop("headers", None)
    return results


def check_effects(server: Counting) -> None:
    for name in AT_MOST_ONCE:
        assert server.counts[name] <= 1, f"{name} happened {server.counts[name]} times"
    assert server.counts["PUT /i"] >= 1
    assert len(server.keys["PUT /i"]) == 1, "an idempotent effect had two keys"


def check_results(got: list[Any], expected: list[Any]) -> None:
    """Each result is the expected one, or says that nobody knows; and the files fit what was told."""
    interrupted = {"error": "interrupted", "text": ""}
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if index not in (1, 4, 9) or one != interrupted:
            if index == 10 and got[4] == interrupted:
                other = {**other, "stdout": "two\n"}  # the interrupted program's file is not there
            if index == 7 and got[4] == interrupted:
                other = {**other, "stdout": "two\n"}
            assert one == other, f"step {index}"


async def check_output(journal: Journal, store: Store) -> None:
    chunks = await store.logs.read("j")
    assert b"".join(chunk.data for chunk in chunks[:1]) == b"after a\n"
    assert {chunk.number for chunk in chunks} == {0}, "a replay repeats the numbers"


async def check_crash(host_root: Path, where: Where, when: str, expected: list[Any]) -> tuple[Journal, bool]:
    """Crash there, resume, and hold the outcome against `expected`; whether there was a crash at all."""
    async with Counting().serve() as server:
        journal, store, journals = await crash_once(host_root, server, where, when)
        check_effects(server)
        check_results(await outcome(journal, store), expected)
        await check_output(journal, store)
        assert journal.state.response is not None
        return journal, journals.crashed


async def undisturbed(host_root: Path) -> list[Any]:
    async with Counting().serve() as server:
        journal, store, _ = await crash_once(host_root, server, lambda number, records: False, "after")
        assert all(server.counts[name] == 1 for name in (*AT_MOST_ONCE, "PUT /i"))
        return await outcome(journal, store)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_after_a_crash_at_any_append_another_holder_comes_to_the_same_outcome(
    host_root: Path, when: str
) -> None:
    expected = await undisturbed(host_root)
    for at in range(1, APPENDS_MAX):
        _, crashed = await check_crash(host_root, lambda number, records, at=at: number == at, when, expected)
        if not crashed:
            break
    else:
        raise AssertionError("the script never ran to its end without a crash")


async def test_after_a_crash_between_an_effect_and_its_record_another_holder_goes_on(host_root: Path) -> None:
    expected = await undisturbed(host_root)
    for index in range(EFFECTS):
        _, crashed = await check_crash(
            host_root, lambda number, records, index=index: has_result(records, index), "before", expected
        )
        assert crashed


def has_result(records: Sequence[AnyRecord], index: int) -> bool:
    return any(isinstance(record, Result) and record.index == index for record in records)
