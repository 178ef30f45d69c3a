"""What must be true of every job that was accepted, whatever was done to the cluster meanwhile.

    it has ended, once, in a way that it may; its journal is one chain of records that fit each other
    no at-most-once effect was seen twice outside, and no idempotent one under two keys
    every result of an effect is what the server outside saw of it

A fault is a sentence. The same judge sits over the real cluster and over the runs from which a rule was
taken out: where it finds nothing, nothing was to be found.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvmci.errors import NotFound
from mvmci.jobs.journal import AnyRecord, Done, Intent, Journal, Lease, Released, Result, Spec, status
from mvmci.journals.reader import load
from mvmci.store import Store, load_text
from tests.faults.chaos.outside import Outside, Steps, path_of

LOOK_S = 0.1
AT_ONCE = 64
SEEN_ONCE_AT_MOST = ("interrupted", "lost", "timed-out")  # it may have happened, or may happen yet


@dataclass(frozen=True)
class Job:
    """A job as it was submitted. `steps` are those of a workflow; `ends` begins how it may end."""

    id: str
    steps: Steps | None = None
    ends: tuple[str, ...] = ("succeeded",)


async def until_ended(store: Store, jobs: Collection[str], within_s: float) -> dict[str, Journal]:
    """The journals of `jobs`, once each has its last record, or as they are when the time is up."""
    found: dict[str, Journal] = {}
    turns = asyncio.Semaphore(AT_ONCE)

    async def follow(job: str) -> None:
        while True:
            async with turns:
                found[job] = await _load(store, job)
            state = found[job].state
            if state.done is not None or state.corrupt is not None:
                return
            await asyncio.sleep(LOOK_S)

    following = [asyncio.ensure_future(follow(job)) for job in jobs]
    done, late = await asyncio.wait(following, timeout=within_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
    return found


async def _load(store: Store, job: str) -> Journal:
    try:
        return await load(store, job)
    except NotFound:
        return Journal(job)


async def results_of(store: Store, journal: Journal) -> list[Any]:
    """What a workflow that succeeded returned."""
    assert journal.state.done is not None
    found: list[Any] = json.loads(await load_text(store.blobs, journal.state.done.result))
    return found


async def judge(store: Store, jobs: Sequence[Job], outside: Outside, within_s: float) -> list[str]:
    """The faults of `jobs`, which have `within_s` to end."""
    journals = await until_ended(store, [job.id for job in jobs], within_s)
    faults: list[str] = []
    for job in jobs:
        journal = journals[job.id]
        faults += (f"{job.id}: {fault}" for fault in of_journal(job, journal))
        results = None
        if job.steps is not None and status(journal.state)[0] == "succeeded":
            results = await results_of(store, journal)
        faults += (f"{job.id}: {fault}" for fault in of_effects(job, results, outside))
    return faults


def of_journal(job: Job, journal: Journal) -> Iterator[str]:
    """What is wrong with the journal alone."""
    records, state = journal.records, journal.state
    if not records:
        yield "it was accepted, and is not there"
        return
    if state.corrupt is not None:
        yield f"corrupt: {state.corrupt}"
    if state.done is None:
        yield f"it has not ended: {status(state)}"
    elif not f"{state.done.status}: {state.done.reason}".startswith(job.ends):
        yield f"it ended as {status(state)}"
    ends = sum(isinstance(record, Done) for record in records)
    if ends > 1 or (ends and not isinstance(records[-1], Done)):
        yield "something follows its end"
    if sum(isinstance(record, Spec) for record in records) != 1:
        yield "it has not exactly one spec"
    yield from _order(records)


def _order(records: Sequence[AnyRecord]) -> Iterator[str]:
    """Epochs count up by one, effects too, and each result comes once, behind its intent."""
    epoch = intents = 0
    answered: set[int] = set()
    held = False
    for record in records:
        match record:
            case Lease():
                if record.epoch != epoch + 1:
                    yield f"epoch {record.epoch} follows epoch {epoch}"
                epoch, held = record.epoch, True
            case Intent():
                if record.index != intents:
                    yield f"intent {record.index} stands where intent {intents} should"
                intents = max(intents, record.index + 1)
            case Result():
                if record.index >= intents:
                    yield f"result {record.index} stands before its intent"
                if record.index in answered:
                    yield f"result {record.index} stands there twice"
                answered.add(record.index)
            case Released():
                held = False
            case _:
                continue
        if not held and not isinstance(record, Released):
            yield f"{type(record).__name__.lower()} stands where nobody holds the job"


def of_effects(job: Job, results: Sequence[Any] | None, outside: Outside) -> Iterator[str]:
    """What the server outside saw and should not have, or did not see and should have."""
    for index, step in enumerate(job.steps or ()):
        if "http" not in step:
            continue
        path = path_of(step)
        asked = outside.asked.get(path, [])
        if step["http"].get("idempotent"):
            keys = {one.key for one in asked}
            if len(keys) > 1 or None in keys:
                yield f"the idempotent effect {path} came under {len(keys)} keys"
        elif len(asked) > 1:
            yield f"the effect {path} happened {len(asked)} times"
        if results is not None:
            idempotent = step["http"].get("idempotent", False)
            yield from _agreement(path, results[index], [one.number for one in asked], idempotent)


def _agreement(
    path: str, result: Mapping[str, Any], numbers: Sequence[int], idempotent: bool
) -> Iterator[str]:
    """Whether what a workflow was told of an effect fits what was seen of it."""
    if "error" not in result:
        if result["status"] != 200 or int(result["body"] or 0) not in numbers:
            yield f"{path} returned {result['body']!r}, and the server gave {numbers}"
    elif result["error"] == "failed" and numbers and not idempotent:
        yield f"{path} is said not to have happened, and did"
    elif result["error"] not in (*SEEN_ONCE_AT_MOST, "failed"):
        yield f"{path} came to {result}"
