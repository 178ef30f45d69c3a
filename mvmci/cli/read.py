"""The reading verbs: what jobs there are, how they stand, what they did, printed and left."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import click
import msgspec

from mvmci import job as jobs
from mvmci.cli.options import (
    examples,
    id_argument,
    json_option,
    local_option,
    open_store,
    option,
    run_async,
    state_option,
)
from mvmci.cli.output import Printer, follow, last_attempt, standard_streams, stop
from mvmci.errors import NotFound, Usage
from mvmci.holder import load
from mvmci.job import STATUSES
from mvmci.journal import AnyRecord, Cancel, Done, Intent, Journal, Lease, Progress, Released, Result, Spec
from mvmci.replay import show
from mvmci.store import Store, load_text
from mvmci.summary import Summary, payloads, rfc3339, summarise

LOOK_S = 0.5  # how often `logs -f` looks whether the job has ended
TOLD_CHARS_MAX = 200


def _verb(work: Callable[[Store], Awaitable[int]], local: bool, state: Path) -> int:
    async def main() -> int:
        async with open_store(state, local=local) as store:
            return await work(store)

    return run_async(main())


async def summary_of(store: Store, journal: Journal) -> Summary:
    """The summary of a job, its payloads read from where they lie."""
    result, response = [await load_text(store.blobs, payload) for payload in payloads(journal)]
    summary = summarise(journal, result=result, response=response)
    lease = journal.state.lease
    if (
        summary.status == "running"
        and lease is not None
        and not await store.presence.live(journal.job, lease)
    ):
        gone = f"its process is gone; `mvmci run --id {journal.job} …` goes on"
        return msgspec.structs.replace(summary, reason=gone)
    return summary


@click.command(
    "status",
    epilog=examples("mvmci status nightly-1 --local", "mvmci status nightly-1 --local --json | jq .result"),
)
@id_argument
@local_option
@json_option
@state_option
def status_verb(job: str, local: bool, as_json: bool, state: Path) -> int:
    """How a job stands."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        summary = await summary_of(store, await load(store, job))
        if as_json:
            click.echo(msgspec.json.encode(summary))
            return 0
        for name, value in json.loads(msgspec.json.encode(summary)).items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if shown not in ("null", ""):
                click.echo(f"{name:<13} {shown}")
        return 0

    return _verb(work, local, state)


@click.command(
    "list", epilog=examples("mvmci list --local --status failed", "mvmci list --local --limit 0 --json")
)
@option("--limit", type=click.IntRange(0), default=100, show_default=True, help="How many; 0 is all.")
@option("--status", "wanted", type=click.Choice(STATUSES), help="Only jobs that stand so.")
@option("--queue", help="Only jobs of this queue.")
@local_option
@json_option
@state_option
def list_verb(
    limit: int, wanted: str | None, queue: str | None, local: bool, as_json: bool, state: Path
) -> int:
    """The jobs that there are, newest first."""

    async def work(store: Store) -> int:
        journals = []
        async for job in store.journals.jobs():
            with suppress(NotFound):  # a submit that never came to its first message
                journals.append(await load(store, job))
        journals.sort(key=_submitted_at, reverse=True)
        found = []
        for journal in journals:
            try:
                summary = await summary_of(store, journal)
            except NotFound:  # one result that is lost must not hide the other jobs; `status` says so
                summary = summarise(journal, result=None, response=None)
            if wanted in (None, summary.status) and queue in (None, summary.queue):
                found.append(summary)
            if limit and len(found) == limit:
                break
        if as_json:
            click.echo(msgspec.json.encode(found))
        elif not found:
            click.echo("no jobs", err=True)
        else:
            _table(found)
        return 0

    return _verb(work, local, state)


def _submitted_at(journal: Journal) -> int:
    return journal.state.spec.at if journal.state.spec else 0


def _table(summaries: list[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("ID", "KIND", "STATUS", "SUBMITTED", "REASON"):
        table.add_column(title, overflow="fold")
    for one in summaries:
        table.add_row(one.id, one.kind or "", one.status, one.submitted_at or "", one.reason)
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


@click.command("history", epilog=examples("mvmci history nightly-1 --local"))
@id_argument
@local_option
@json_option
@state_option
def history_verb(job: str, local: bool, as_json: bool, state: Path) -> int:
    """The records of a job, in order: who held it, what it did, how it ended."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        journal = await load(store, job)
        if as_json:
            records = [
                {**msgspec.to_builtins(record), "at": rfc3339(record.at)} for record in journal.records
            ]
            click.echo(json.dumps(records))
        else:
            for record in journal.records:
                told = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in _told(record))
                click.echo(f"{rfc3339(record.at)}  {type(record).__name__.lower():<8}  {told}")
        if journal.state.corrupt:
            click.echo(f"the rest cannot be trusted: {journal.state.corrupt}", err=True)
        return 0

    return _verb(work, local, state)


def _told(record: AnyRecord) -> str:
    """One line about a record."""
    match record:
        case Spec():
            return f"{record.kind} {record.name} by {record.by}"
        case Lease():
            return f"epoch {record.epoch}, {record.why}, {record.unit}"
        case Intent():
            what = show(record.request) if record.request else record.kind
            return f"{record.index}: {what}" + (" (idempotent)" if record.idempotent else "")
        case Result():
            return f"{record.index}: {_answer(record)}"
        case Released():
            return f"{record.why}" + (f" until {rfc3339(record.until)}" if record.until else "")
        case Progress():
            return f"{record.done}/{record.total} {record.message}"
        case Cancel():
            return f"by {record.by}"
        case Done():
            return record.status + (f": {record.reason}" if record.reason else "")
        case _:
            return ""


def _answer(record: Result) -> str:
    if record.value is None:
        return f"in {record.blob}"
    fields = msgspec.to_builtins(record.value)
    kind = fields.pop("kind")
    text = " ".join(f"{name}={value!r}" for name, value in fields.items() if name != "headers")
    return f"{kind} {text}"[:TOLD_CHARS_MAX]


@click.command(
    "logs",
    epilog=examples(
        "mvmci logs nightly-1 --local", "mvmci logs nightly-1 --local -f      until it has ended"
    ),
)
@id_argument
@option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@option("--attempt", type=click.IntRange(1), help="A command's attempt; the last one if absent.")
@local_option
@state_option
def logs_verb(job: str, following: bool, attempt: int | None, local: bool, state: Path) -> int:
    """What a job printed: the guest's bytes, its two streams onto ours."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        journal = await load(store, job)
        since = last_attempt(journal.state) if attempt is None else attempt
        printer = Printer(*standard_streams(), since=since)
        if following:
            watching = asyncio.create_task(follow(store, job, printer))
            try:
                while not journal.state.ended and not watching.done():
                    await asyncio.wait([watching], timeout=LOOK_S)
                    journal.absorb(await store.journals.read(job, after=journal.tail))
            finally:
                await stop(watching)
        chunks = await store.logs.read(job)
        await printer.show(chunk for chunk in chunks if attempt in (None, chunk.attempt))
        if attempt is None:
            printer.warn(journal.state)
        elif attempt > journal.state.epoch:
            click.echo(f"warning: {job} had {journal.state.epoch} attempts", err=True)
        return 0

    return _verb(work, local, state)


@click.command(
    "artifacts",
    epilog=examples("mvmci artifacts nightly-1 --local", "mvmci artifacts nightly-1 --local --output out"),
)
@id_argument
@option("--output", type=click.Path(path_type=Path), help="Write them beneath this directory.")
@local_option
@json_option
@state_option
def artifacts_verb(job: str, output: Path | None, local: bool, as_json: bool, state: Path) -> int:
    """The files that a job left; with --output, written to a directory by their relative paths."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        journal = await load(store, job)
        done = journal.state.done
        listed = await load_text(store.blobs, done.artifacts) if done else ""
        found = msgspec.json.decode(listed or "[]", type=tuple[jobs.Artifact, ...])
        if output is not None:
            for artifact in found:
                await _write(store, output, artifact)
        if as_json:
            click.echo(msgspec.json.encode(found))
        else:
            for artifact in found:
                click.echo(artifact.path)
        if not found and not as_json:
            why = "left no artifacts" if done else "has not ended"
            click.echo(f"warning: {job} {why}", err=True)
        return 0

    return _verb(work, local, state)


async def _write(store: Store, output: Path, artifact: jobs.Artifact) -> None:
    """Write one artifact beneath `output`, which it cannot leave."""
    from mvmci.tree import check_path

    check_path(artifact.path)
    target = output / artifact.path
    try:
        if not target.parent.resolve().is_relative_to(output.resolve()):
            raise Usage(f"{target} would lie outside of {output}", hint="remove the link that leads there")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        await store.blobs.fetch(artifact.digest, target)
    except OSError as error:
        raise Usage(f"{target} cannot be written: {error.strerror}") from None
    except NotFound as gone:
        raise NotFound(f"{artifact.path}: {gone.message}", hint=gone.hint) from None
