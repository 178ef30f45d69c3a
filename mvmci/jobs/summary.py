"""What `status` and `list` say of a job, folded from its journal. The keys are promised to scripts."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from mvmci.jobs.job import Kind, Payload, Status
from mvmci.jobs.journal import Journal, status


class ProgressSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How far a workflow says that it is."""

    done: int
    total: int
    message: str


class TimesSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of all runs went, in ms: see `mvmci.jobs.times`. `queue` is for jobs that have ended."""

    queue: float | None
    order: float
    way: float
    slot: float
    compile: float
    layout: float
    guest: float
    effects: float
    writes: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Times are RFC 3339 UTC with milliseconds; `result` and `response` are JSON values."""

    id: str
    queue: str | None
    kind: Kind | None
    status: Status
    reason: str
    attempts: int
    epoch: int
    worker: str | None
    executor: str | None
    exit_code: int | None
    result: msgspec.Raw | None
    response: msgspec.Raw | None
    progress: ProgressSummary | None
    submitted_at: str | None
    started_at: str | None
    ended_at: str | None
    times: TimesSummary | None


def rfc3339(ms: int | None) -> str | None:
    """Milliseconds since 1970 as text."""
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def summarise(journal: Journal, *, result: str | None, response: str | None) -> Summary:
    """The summary of a job; `result` and `response` are the texts of its payloads, read from their place."""
    state = journal.state
    spec, lease, done = state.spec, state.lease, state.done
    name, reason = status(state)
    ended_at = done.at if done else state.cancel.at if state.ended and state.cancel else None
    progress = state.progress
    return Summary(
        id=journal.job,
        queue=spec.queue if spec else None,
        kind=spec.kind if spec else None,
        status=name,
        reason=reason,
        attempts=state.attempts,
        epoch=state.epoch,
        worker=(lease.worker or lease.unit) if lease else None,
        executor=lease.unit if lease else None,
        exit_code=done.exit_code if done else None,
        result=msgspec.Raw(result.encode()) if result else None,
        response=msgspec.Raw(response.encode()) if response else None,
        progress=ProgressSummary(done=progress.done, total=progress.total, message=progress.message)
        if progress
        else None,
        submitted_at=rfc3339(spec.at if spec else None),
        started_at=rfc3339(state.started_at),
        ended_at=rfc3339(ended_at),
        times=_times(journal) if state.times.total else None,
    )


def _times(journal: Journal) -> TimesSummary:
    us, queued = msgspec.structs.asdict(journal.state.times), journal.queued_us
    parts = {part: each / 1000 for part, each in us.items()}
    return TimesSummary(queue=None if queued is None else queued / 1000, **parts)


def payloads(journal: Journal) -> tuple[Payload, Payload]:
    """Where the result and the early response of a job lie."""
    done, response = journal.state.done, journal.state.response
    return (done.result if done else Payload()), response or Payload()
