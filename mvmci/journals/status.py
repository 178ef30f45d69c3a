"""How a job stands, as far as that can be seen from a store: its summary, and why it does not go on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mvmci.jobs.journal import Journal
from mvmci.jobs.summary import Summary, payloads, summarise
from mvmci.store import Member, Store, load_text


async def summary_of(store: Store, journal: Journal, *, local: bool = False) -> Summary:
    """The summary of a job, its payloads read from where they lie, and why it does not go on.

    `local` says that it is a job of `mvmci run`. Raises NotFound for a payload that is gone.
    """
    result, response = [_json(await load_text(store.blobs, payload)) for payload in payloads(journal)]
    summary = summarise(journal, result=result, response=response)
    reason = await _why(store, journal, summary, local) or summary.reason
    return msgspec.structs.replace(summary, reason=reason)


def _json(text: str) -> str:
    """A payload as a value of JSON, which it is unless its holder wrote something else."""
    try:
        if text:
            msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.encode(text).decode()
    return text


async def reason_of(store: Store, journal: Journal, *, local: bool) -> str:
    """Why a job that has not ended does not go on; empty where it does."""
    return await _why(store, journal, summarise(journal, result=None, response=None), local)


async def _why(store: Store, journal: Journal, summary: Summary, local: bool) -> str:
    """Why a job that has not ended does not go on, as far as that can be seen from here."""
    if journal.state.newer is not None:
        return journal.state.newer
    lease = journal.state.lease
    if summary.status == "running" and lease is not None:
        if await store.presence.live(journal.job, lease):
            return "" if local else _told(journal.job, await store.presence.members())
        if local:
            return f"its process is gone; `mvmci run --id {journal.job} …` goes on"
        return f"{lease.unit} is gone; another worker takes it"
    if summary.status == "queued" and not local:
        return waiting(journal.job, summary.queue or "", await store.presence.members())
    return ""


def _told(job: str, members: Sequence[Member]) -> str:
    """What whoever has the job in hand says that it waits for."""
    return next((f"waiting: {one.waits[job]}" for one in members if job in one.waits), "")


def waiting(job: str, queue: str, members: Sequence[Member]) -> str:
    """Why `job`, of `queue`, has not begun or does not go on; empty if a worker has room for it."""
    if told := _told(job, members):
        return told
    workers = [one for one in members if one.about.role == "worker" and queue in one.about.queues]
    ready = [one for one in workers if one.about.state == "ready"]
    if not workers:
        return f"waiting: no worker takes from queue {queue}"
    if not ready:
        return "waiting: workers draining"
    if all(max(len(one.holds), len(one.keeps)) >= one.about.slots for one in ready):
        return "waiting: workers busy"
    return ""
