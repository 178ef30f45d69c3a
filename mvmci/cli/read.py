"""The reading verbs: what jobs there are, how they stand, what they did, printed and left."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click
import msgspec

from mvmci.cli.complete import complete_id, complete_logging_unit, complete_queue
from mvmci.cli.options import (
    Location,
    examples,
    id_argument,
    json_option,
    make_table,
    option,
    place_options,
    print_table,
    run_async,
    spread,
)
from mvmci.cli.output import DescriptorWriter, Printer, standard_streams, tell_end, telling
from mvmci.cli.streams import STDOUT
from mvmci.config.quantity import rough_duration
from mvmci.errors import NotFound, Usage
from mvmci.jobs import job as jobs
from mvmci.jobs.job import STATUSES
from mvmci.jobs.journal import (
    BENCH_BY,
    PROOF_BY,
    AnyRecord,
    Cancel,
    Done,
    Ignored,
    Intent,
    Journal,
    Lease,
    Progress,
    Released,
    Result,
    Spec,
    State,
    status,
)
from mvmci.jobs.summary import Summary, rfc3339, summarise
from mvmci.jobs.times import PHASES, Times, in_phases, in_words
from mvmci.journals.client import until_ended
from mvmci.journals.logs import LATE_S, OutputWatch, last_attempt, late_s
from mvmci.journals.reader import load
from mvmci.journals.status import summary_of
from mvmci.store import Store, load_text
from mvmci.system.clock import wall_clock_ms
from mvmci.system.text import one_line, printable
from mvmci.trust.known import find_cluster

LIST_TITLES = ("ID", "KIND", "STATUS", "SUBMITTED", *map(str.upper, PHASES), "REASON")
TOLD_CHARS_MAX = 200
PAYLOADS_AT_ONCE = 64
FILES_AT_ONCE = 16


def _verb(work: Callable[[Store], Awaitable[int]], place: Location) -> int:
    async def main() -> int:
        async with place.open() as store:
            return await work(store)

    return run_async(main())


@click.command(
    "status",
    epilog=examples("mvmci status nightly-1", "mvmci status nightly-1 --json | jq .result"),
)
@id_argument
@place_options
@json_option
def status_verb(job: str, place: Location, as_json: bool) -> int:
    """Print the status of a job."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        summary = await summary_of(store, await load(store, job), local=place.local)
        if as_json:
            click.echo(msgspec.json.encode(summary))
            return 0
        for name, value in json.loads(msgspec.json.encode(summary)).items():
            if name == "times" and value is not None:
                value = in_words(value, _ms)
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if shown not in ("null", ""):
                click.echo(f"{name:<13} {one_line(shown)}")
        return 0

    return _verb(work, place)


@click.command("list", epilog=examples("mvmci list --status failed", "mvmci list --limit 0 --json"))
@option("--limit", type=click.IntRange(0), default=100, show_default=True, help="At most so many; 0 is all.")
@option("--all", "proofs", is_flag=True, help="Also those of `mvmci up` and `mvmci bench`.")
@option("--status", "wanted", type=click.Choice(STATUSES), help="Only jobs with this status.")
@option("--queue", envvar="MVMCI_LIST_QUEUE", shell_complete=complete_queue, help="Only jobs of this queue.")
@place_options
@json_option
def list_verb(
    limit: int, proofs: bool, wanted: str | None, queue: str | None, place: Location, as_json: bool
) -> int:
    """List jobs, newest first."""

    def fits(state: State) -> bool:
        spec = state.spec
        return (
            (proofs or spec is None or spec.by not in (PROOF_BY, BENCH_BY))
            and wanted in (None, status(state)[0])
            and queue in (None, spec and spec.queue)
        )

    async def work(store: Store) -> int:
        found, more, newer = await _newest(store, place, limit, fits)
        if as_json:
            click.echo(msgspec.json.encode(found))
        elif not found:
            click.echo("no jobs", err=True)
        else:
            print_table(make_table(LIST_TITLES, map(_cells, found)))
        if more:
            click.echo(f"the newest {limit}; there are more, and --limit 0 lists all", err=True)
        for journal in newer:
            journal.check_readable()
        return 0

    return _verb(work, place)


def _cells(one: Summary) -> Sequence[str]:
    took = one.times
    phases = {} if took is None else in_phases(msgspec.structs.asdict(took))
    if took is None or took.queue is None:  # which is known when the job has ended
        phases.pop("wait", None)
    times = (_ms(phases[one]) if one in phases else "" for one in PHASES)
    return (one.id, one.kind or "", one.status, one.submitted_at or "", *times, one.reason)


def _ms(ms: float) -> str:
    return rough_duration(ms * 1000)


async def _newest(
    store: Store, place: Location, limit: int, fits: Callable[[State], bool]
) -> tuple[list[Summary], bool, list[Journal]]:
    """The newest jobs that fit, up to `limit` (0 is all of them), whether there are more, and those of them
    that this build knows in part."""
    found: list[Summary] = []
    newer: list[Journal] = []
    some: list[Journal] = []
    more = False

    async def summarised(journal: Journal) -> Summary:
        try:
            return await summary_of(store, journal, local=place.local)
        except NotFound:  # one result that is lost must not hide the other jobs; `status` says so
            return summarise(journal, result=None, response=None)

    async with aclosing(store.journals.newest()) as jobs:
        async for job, entries in jobs:
            journal = Journal(job)
            journal.absorb(entries)
            if not fits(journal.state):
                continue
            if limit and len(found) + len(some) == limit:
                more = True
                break
            some.append(journal)
            if journal.state.newer is not None:
                newer.append(journal)
            if len(some) == PAYLOADS_AT_ONCE:
                found += await spread(summarised, some, at_once=PAYLOADS_AT_ONCE)
                some = []
    found += await spread(summarised, some, at_once=PAYLOADS_AT_ONCE)
    return sorted(found, key=lambda one: one.submitted_at or "", reverse=True), more, newer


@click.command("history", epilog=examples("mvmci history nightly-1"))
@id_argument
@place_options
@json_option
def history_verb(job: str, place: Location, as_json: bool) -> int:
    """Print the records of a job in order: who held it, what it did, how it ended."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        journal = await load(store, job)
        if as_json:
            records = [
                {"record": "ignored", **msgspec.to_builtins(record)}
                if isinstance(record, Ignored)
                else _shown(record)
                for record in _with_ignored(journal)
            ]
            click.echo(json.dumps(records))
        else:
            for record in _with_ignored(journal):
                at = (
                    rfc3339(record.at)
                    if not isinstance(record, Ignored)
                    else "-" * len("2000-01-01T00:00:00.000Z")
                )
                click.echo(f"{at:<24}  {type(record).__name__.lower():<8}  {one_line(_told(record))}")
        if journal.state.corrupt:
            click.echo(f"the rest of the journal is corrupt: {one_line(journal.state.corrupt)}", err=True)
        return 0

    return _verb(work, place)


def _shown(record: AnyRecord) -> dict[str, Any]:
    """A record as JSON, whose times have names."""
    shown = {**msgspec.to_builtins(record), "at": rfc3339(record.at)}
    if isinstance(record, Done | Released) and record.times is not None:
        shown["times"] = msgspec.structs.asdict(record.times)
    return shown


def _took(record: Done | Released) -> str:
    """Where the time of a run went, as the end of a line."""
    told = in_words(msgspec.structs.asdict(record.times or Times()), rough_duration)
    return f"  ({told})" if told else ""


def _with_ignored(journal: Journal) -> Iterator[AnyRecord | Ignored]:
    """The records in order, and between them the messages that no reader takes in."""
    ignored = deque(journal.ignored)
    for place, record in enumerate(journal.records):
        while ignored and ignored[0].after <= place:
            yield ignored.popleft()
        yield record
    yield from ignored


def _told(record: AnyRecord | Ignored) -> str:
    """One line about a record."""
    match record:
        case Ignored():
            kind, queue, unit = record.origin or ("message", "", "")
            by = f" by {unit} on {queue}" if record.origin else ""
            return f"a {kind}{by}: {record.why}"
        case Spec():
            return f"{record.kind} {record.name} by {record.by}"
        case Lease():
            return f"epoch {record.epoch}, {record.why}, {record.unit}"
        case Intent():
            from mvmci.engines.embedded.effects import show  # an engine takes long to import

            return f"{record.index}: {show(record)}" + (" (idempotent)" if record.idempotent else "")
        case Result():
            return f"{record.index}: {_answer(record)}"
        case Released():
            until = f" until {rfc3339(record.until)}" if record.until else ""
            return f"{record.why}{until}{_took(record)}"
        case Progress():
            return f"{record.done}/{record.total} {record.message}"
        case Cancel():
            return f"by {record.by}"
        case Done():
            return record.status + (f": {record.reason}" if record.reason else "") + _took(record)
        case _:
            return ""


def _answer(record: Result) -> str:
    if record.value is None:
        return f"in {record.blob}"
    fields = dict(record.value)
    kind = fields.pop("kind")
    text = " ".join(f"{name}={value!r}" for name, value in fields.items() if name != "headers")
    return f"{kind} {text}"[:TOLD_CHARS_MAX]


@click.command(
    "logs",
    epilog=examples(
        "mvmci logs nightly-1",
        "mvmci logs nightly-1 -f             until it has ended",
        "mvmci logs --unit worker-2 -f       what a unit of this machine says; supervisor starts them",
    ),
)
@click.argument("job", metavar="[ID]", required=False, shell_complete=complete_id)
@option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@option("--attempt", type=click.IntRange(1), help="An attempt of a command. By default, the last.")
@option(
    "--unit",
    metavar="NAME",
    shell_complete=complete_logging_unit,
    help="The log of this unit of `mvmci up` instead.",
)
@place_options
@click.pass_context
def logs_verb(
    ctx: click.Context,
    /,
    job: str | None,
    following: bool,
    attempt: int | None,
    unit: str | None,
    place: Location,
) -> int:
    """Print the output of a job, its stdout to stdout and its stderr to stderr."""
    if unit is not None:
        if job is not None or attempt is not None or place.local:
            raise click.UsageError("--unit goes with neither an ID nor --attempt or --local", ctx)
        for part in unit.split("@", 1):  # supervisor@HOST
            jobs.check_id(part, "unit's name")
        return run_async(_unit_log(unit, following, place))
    if job is None:
        raise click.UsageError("there is no ID, and no --unit", ctx)
    return _job_logs(jobs.check_id(job), following, attempt, place)


async def _unit_log(name: str, following: bool, place: Location) -> int:
    from mvmci.deploy.state import ClusterState

    writer, terminal = DescriptorWriter(), sys.stdout.isatty()
    async with (
        ClusterState(place.state, find_cluster(place.state, place.cluster)) as state,
        aclosing(state.runtime().log(name, follow=following)) as pieces,
    ):
        async for piece in pieces:
            shown = printable(piece.decode(errors="replace")).encode() if terminal else piece
            await writer.write(STDOUT, shown)
    return 0


def _job_logs(job: str, following: bool, attempt: int | None, place: Location) -> int:

    async def work(store: Store) -> int:
        journal = await load(store, job)
        printer = Printer(*standard_streams(), since=last_attempt(journal.state), attempt=attempt)
        if not following and not journal.state.ended:
            await printer.show(await store.logs.read(job))
        else:
            async with OutputWatch(store, job, printer) as watch:
                wait_s = late_s(journal.state, wall_clock_ms())
                if not journal.state.ended:
                    async with telling(store, journal, place):
                        await watch.until(until_ended(store, journal))
                    wait_s = LATE_S
                await watch.rest(journal.state, wait_s)
            if following:
                tell_end(journal)
        if attempt is not None and attempt > journal.state.epoch:
            click.echo(f"warning: {job} had {journal.state.epoch} attempts", err=True)
        return 0

    return _verb(work, place)


@click.command(
    "artifacts",
    epilog=examples("mvmci artifacts nightly-1", "mvmci artifacts nightly-1 --output out"),
)
@id_argument
@option("--output", type=click.Path(path_type=Path), help="Write them to this directory.")
@place_options
@json_option
def artifacts_verb(job: str, output: Path | None, place: Location, as_json: bool) -> int:
    """List the artifacts of a job; with --output, write them to a directory by their relative paths."""
    jobs.check_id(job)

    async def work(store: Store) -> int:
        journal = await load(store, job)
        done = journal.state.done
        listed = await load_text(store.blobs, done.artifacts) if done else ""
        found = msgspec.json.decode(listed or "[]", type=tuple[jobs.Artifact, ...])
        if output is not None:
            await spread(lambda one: _write(store, output, one), found, at_once=FILES_AT_ONCE)
        if as_json:
            click.echo(msgspec.json.encode(found))
        else:
            for artifact in found:
                click.echo(one_line(artifact.path))
        if not found and not as_json:
            why = "left no artifacts" if done else "has not ended"
            click.echo(f"warning: {job} {why}", err=True)
        return 0

    return _verb(work, place)


async def _write(store: Store, output: Path, artifact: jobs.Artifact) -> None:
    """Write one artifact beneath `output`, which it cannot leave."""
    from mvmci.jobs.tree import check_path

    check_path(artifact.path)
    shown = one_line(artifact.path)
    target = output / artifact.path
    try:
        if not target.parent.resolve().is_relative_to(output.resolve()):
            raise Usage(f"{target} would lie outside of {output}", hint="remove the link that leads there")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        await store.blobs.fetch(artifact.digest, target)
        umask = os.umask(0)
        os.umask(umask)
        target.chmod((0o777 if artifact.executable else 0o666) & ~umask)
    except OSError as error:
        raise Usage(f"{target} cannot be written: {error.strerror}") from None
    except NotFound as gone:
        raise NotFound(f"{shown}: {gone.message}", hint=gone.hint) from None
