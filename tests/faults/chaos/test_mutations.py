"""The rules that carry the promises, each taken out: the judge of the chaos runs must find the fault.

Each scene drives the one fault that its rules guard against, step by step and without luck: a holder
that falls silent in the middle of an effect, an answer that is lost, a write that is lost, a worker that
dies. With all rules in place every scene must come out clean; without one of its rules it must not.

What single holders do under every order of faults is in tests/faults/test_holder.py, a crash at every
write in test_crash_everywhere.py. Here are whole workers on a broker, and what is outside of it counts.
"""

from __future__ import annotations

import asyncio
import compileall
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import Entry, Intent, Journal, Message, Result, Verdict, verdict
from mvmci.journals import holder, writer
from mvmci.journals.reader import load, read_on
from mvmci.roles import worker
from mvmci.stores.nats.append import Append
from tests.faults.chaos import without
from tests.faults.chaos.crew import LAPSE_S, Crew, crew
from tests.faults.chaos.outside import again, once
from tests.harness.waiting import LONG_S, until_journal
from tests.model.log import Believing

JOB = "j"
NOT_ENDED, NEVER_S = "it has not ended", 10.0  # what is longer on its way than that does not come

Patch = pytest.MonkeyPatch


@pytest.fixture
async def team(broker_url: str, host_root: Path, monkeypatch: Patch) -> AsyncIterator[Crew]:
    monkeypatch.setattr(worker, "KEEP_EVERY_S", LAPSE_S / 4)
    # A holder looks every second, and then waits with its writes: here it is to be in the middle of one.
    monkeypatch.setattr(holder, "WATCH_EVERY_S", LONG_S)
    async with crew(broker_url, host_root) as found:
        yield found


# ---- the scenes


async def a_holder_falls_silent(team: Crew) -> None:
    """It is in the middle of an effect when another takes over, and then it writes what it had to write."""
    outside = team.outside
    its_effect, their_effect = outside.hold(f"/{JOB}/once/1"), outside.hold(f"/{JOB}/once/3")
    await team.reconciler()
    silent = await team.worker("w1")
    await team.submit(
        JOB,
        [
            once(outside, JOB, 0),
            once(outside, JOB, 1),
            again(outside, JOB, 2),
            once(outside, JOB, 3),
            once(outside, JOB, 4),
        ],
    )
    await its_effect.arrived.wait()
    silent.proxy.hole()
    its_effect.may_go.set()
    await silent.proxy.until_held(f".job.{JOB}.run.")
    await team.worker("w2")
    await their_effect.arrived.wait()
    silent.proxy.heal()

    async def went_on() -> bool:
        journal = await load(team.client.store, JOB)
        return len(outside.asked[f"/{JOB}/once/3"]) > 1 or journal.state.corrupt is not None

    await team.slip(went_on)
    their_effect.may_go.set()


async def an_answer_is_lost(team: Crew) -> None:
    """The write landed, and its writer never hears of it."""
    outside = team.outside
    gate = outside.hold(f"/{JOB}/once/0")
    hand = await team.worker("w1")
    await team.submit(JOB, [once(outside, JOB, number) for number in range(4)])
    await gate.arrived.wait()
    hand.proxy.deafen()
    gate.may_go.set()
    await team.until(JOB, lambda journal: any(isinstance(one, Result) for one in journal.records))
    hand.proxy.cut()
    hand.proxy.heal()


async def a_write_is_lost_and_then_its_writer(team: Crew) -> None:
    """What it was about to do may be done once, by whoever comes next."""
    outside = team.outside
    gate = outside.hold(f"/{JOB}/once/0")
    await team.reconciler()
    hand = await team.worker("w1")
    await team.submit(JOB, [once(outside, JOB, number) for number in range(4)])
    await gate.arrived.wait()
    # Without a rule the effect may come before its intent: whose answer is not what is to be lost.
    await until_journal(hand.cluster.store, JOB, lambda journal: journal.state.lease)
    await hand.cluster.store.journals.read(JOB)  # by the same line, on which that answer went before
    hand.proxy.hole()
    gate.may_go.set()
    await hand.proxy.until_held(f".job.{JOB}.run.")
    hand.proxy.cut()
    await team.slip(lambda: outside.asked[f"/{JOB}/once/1"])
    await team.worker("w2")


async def a_worker_dies_and_nobody_reconciles(team: Crew) -> None:
    """Its hint alone brings the job to another."""
    outside = team.outside
    gate = outside.hold(f"/{JOB}/once/0")
    hand = await team.worker("w1")
    await team.submit(JOB, [once(outside, JOB, 0), again(outside, JOB, 1)])
    await gate.arrived.wait()
    hand.proxy.hole()
    await team.worker("w2")


# ---- the rules, taken out


def without_compare_and_set(patch: Patch) -> None:
    patch.setattr(Append, "headers", {})


def without_fencing(patch: Patch) -> None:
    def ignorant(journal: Journal, news: Any, **ours: Any) -> Verdict:
        found = verdict(journal, news, **ours)
        return "retry" if found == "fenced" and journal.state.corrupt is None else found

    patch.setattr(holder, "verdict", ignorant)
    patch.setattr(Journal, "judge", Believing.judge)  # which else ignores what a deposed holder writes


def sending_again_without_looking(patch: Patch) -> None:
    """Where the tail is, it still asks; whether it has its own message there, it does not."""

    async def blind(*args: Any) -> list[Message]:
        await read_on(*args)
        return []

    patch.setattr(writer, "read_on", blind)


def counting_silence_as_success(patch: Patch) -> None:
    append = writer.Writer._append

    async def hopeful(self: writer.Writer, records: Any, message_id: str) -> Message:
        data = self.journal.encode(records, message_id)
        try:
            return await append(self, records, message_id)
        except StoreUnavailable:  # the next writes find no broker at all
            (message,) = self.journal.absorb([Entry(seq=self.journal.tail + 1, data=data)])
            return message

    patch.setattr(writer.Writer, "_append", hopeful)


def beginning_before_the_intent_is_on_disk(patch: Patch) -> None:
    write = holder.Holder.write

    async def hasty(self: holder.Holder, *records: Any) -> None:
        if records and isinstance(records[-1], Intent):
            for record in records:
                await self.add(record)
        else:
            await write(self, *records)

    patch.setattr(holder.Holder, "write", hasty)


def acknowledging_before_the_end(patch: Patch) -> None:
    run = worker.Worker._run

    async def hasty(self: worker.Worker, hint: Any, *more: Any) -> None:
        await hint.ack()
        await run(self, hint, *more)

    patch.setattr(worker.Worker, "_run", hasty)


Scene = Callable[[Crew], Awaitable[None]]
SCENES: list[Scene] = [
    a_holder_falls_silent,
    an_answer_is_lost,
    a_write_is_lost_and_then_its_writer,
    a_worker_dies_and_nobody_reconciles,
]
FOUND: list[tuple[Callable[[Patch], None], Scene, str]] = [
    (without_compare_and_set, a_holder_falls_silent, "corrupt"),
    (without_fencing, a_holder_falls_silent, "happened 2 times"),
    (sending_again_without_looking, an_answer_is_lost, "stands there twice"),
    (counting_silence_as_success, a_write_is_lost_and_then_its_writer, "happened 2 times"),
    (beginning_before_the_intent_is_on_disk, a_write_is_lost_and_then_its_writer, "happened 2 times"),
    (acknowledging_before_the_end, a_worker_dies_and_nobody_reconciles, NOT_ENDED),
]


@pytest.mark.parametrize("rule", without.RULES)
def test_each_rule_can_be_taken_out_of_the_program(rule: str, tmp_path: Path) -> None:
    """For a chaos run without it, which takes too long to be here (see `without`)."""
    package = without.write(rule, tmp_path)
    assert compileall.compile_dir(package, quiet=1)


async def play(team: Crew, scene: Scene, within_s: float = LONG_S) -> list[str]:
    async with asyncio.timeout(LONG_S):
        await scene(team)
    return await team.judge(within_s)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_with_every_rule_in_place_nothing_is_lost_and_nothing_happens_twice(
    team: Crew, scene: Scene
) -> None:
    assert await play(team, scene) == []


@pytest.mark.parametrize(("rule", "scene", "words"), FOUND, ids=[rule.__name__ for rule, _, _ in FOUND])
async def test_without_one_of_the_rules_the_fault_is_found(
    team: Crew, monkeypatch: Patch, rule: Callable[[Patch], None], scene: Scene, words: str
) -> None:
    rule(monkeypatch)
    team.slip_s = LONG_S  # it happens, as late as it may be
    faults = await play(team, scene, NEVER_S if words == NOT_ENDED else LONG_S)
    print(*faults, sep="\n")
    assert any(words in fault for fault in faults)
