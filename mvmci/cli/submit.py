"""`mvmci submit`, `wait` and `cancel`: jobs for a cluster.

What is submitted was read and found good before. A job that was accepted is never lost, whatever
becomes of us: Ctrl-C leaves it running, and a broker that is away is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from mvmci.cli.complete import complete_file, complete_id
from mvmci.cli.options import (
    Duration,
    Interrupted,
    Location,
    cluster_option,
    examples,
    json_option,
    option,
    place_options,
    run_async,
    spread,
    state_option,
)
from mvmci.cli.output import Printer, report, standard_streams, tell_end, telling
from mvmci.cli.request import RequestFiles, job_options, who
from mvmci.config.quantity import format_duration
from mvmci.errors import IdTaken, MvmciError, NotYet, StoreFull, StoreUnavailable
from mvmci.jobs.job import check_id
from mvmci.jobs.journal import Journal, status
from mvmci.journals.client import cancel_job, mint_id, submit, until_ended
from mvmci.journals.logs import OutputWatch, last_attempt
from mvmci.journals.reader import load
from mvmci.journals.request import JobRequest
from mvmci.journals.status import summary_of
from mvmci.store import Store

if TYPE_CHECKING:
    from mvmci.cli.batch import BatchLine

SUBMITS_AT_ONCE = 512  # as many as two batches of a group commit hold
JOURNALS_AT_ONCE = 64
WAITS_AT_ONCE = 32  # journals that are followed: all of them have to end anyway
NAMED_MAX = 20  # ids in one sentence


@click.command(
    "submit",
    epilog=examples(
        "mvmci submit tool.wasm --dir . -- --flag",
        "mvmci submit lint.wasm --dir . --artifact 'report/*.json' --wait",
        """mvmci submit flow.wasm --id nightly-1 --input '{"build": 7}'""",
        "mvmci submit --batch jobs.jsonl > ids",
        """echo '{"module": "tool.wasm", "args": ["one"]}' | mvmci submit --batch -""",
    ),
)
@click.argument("module", metavar="[MODULE]", default="", shell_complete=complete_file)
@click.argument("args", metavar="[-- ARG]...", nargs=-1)
@job_options
@option("--wait", is_flag=True, help="Print its output, and exit when it has ended.")
@option(
    "--batch",
    metavar="FILE|-",
    shell_complete=complete_file,
    help="Submit many jobs: one JSON object a line, with the options as keys.",
)
@json_option
@cluster_option
@state_option
@click.pass_context
def submit_verb(
    ctx: click.Context,
    /,
    state: Path,
    cluster: str | None,
    wait: bool,
    batch: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Submit MODULE to a cluster and print the job's id.

    With --wait, prints what the job prints and exits with 0, with 1 if it failed, 124 if it timed out.
    With --batch, the other options hold for each line that does not say otherwise.
    """
    place = Location(state, cluster=cluster)
    if batch is not None:
        return _submit_batch(ctx, place, batch, wait, as_json, options)
    if not options["module"]:
        raise click.UsageError("there is no MODULE, and no --batch", ctx)
    files = RequestFiles(state)
    checked = files.check(msgspec.convert(options, JobRequest))
    job = checked.request.id or mint_id()
    sent = accepted = False

    async def main() -> int:
        nonlocal sent, accepted
        async with place.open() as store:
            await place.written(files.keep(store))
            spec = await place.written(files.spec(checked, job, store))
            sent = True
            await place.written(submit(store, spec))
            accepted = True
            if wait:
                click.echo(job, err=True)
                return await _see(store, job, place, as_json)
        click.echo(msgspec.json.encode([job]) if as_json else job)
        return 0

    try:
        return run_async(main())
    except Interrupted as interrupted:
        if accepted:
            _tell_that_it_goes_on([job], place)
        elif sent:
            click.echo(f"interrupted; it is unknown whether {job} was accepted", err=True)
        else:
            click.echo(f"interrupted; {job} was not submitted", err=True)
        return interrupted.exit_code


async def _see(store: Store, job: str, place: Location, as_json: bool) -> int:
    """Pass on what the job prints until it has ended, and say how."""
    journal = await load(store, job)
    printer = Printer(*standard_streams(all_on_stderr=as_json), since=last_attempt(journal.state))
    async with OutputWatch(store, job, printer) as watch, telling(store, journal, place):
        await watch.until(until_ended(store, journal))
        await watch.rest(journal.state)
    return await report(store, journal, place, as_json=as_json)


def _tell_that_it_goes_on(ids: Sequence[str], place: Location) -> None:
    named = _named(ids)
    follow = place.verb(f"logs {named} -f") if len(ids) == 1 else place.verb(f"wait {named}")
    click.echo(f"interrupted; {named} goes on: {follow} follows it,", err=True)
    click.echo(f"{place.verb(f'cancel {named}')} ends it", err=True)


def _named(ids: Sequence[str]) -> str:
    more = f" … and {len(ids) - NAMED_MAX} more" if len(ids) > NAMED_MAX else ""
    return " ".join(ids[:NAMED_MAX]) + more


# ---- Many at once


def _submit_batch(
    ctx: click.Context, place: Location, batch: str, wait: bool, as_json: bool, options: dict[str, Any]
) -> int:
    from mvmci.cli.batch import read_batch

    if any(options[name] for name in ("module", "args", "id", "stdin")):
        raise click.UsageError("with --batch, the lines name module, arguments, id and stdin", ctx)
    if wait:
        raise click.UsageError("--batch does not wait: give the ids that it prints to `mvmci wait`", ctx)
    files = RequestFiles(place.state)
    lines = read_batch(batch, msgspec.convert({**options, "module": ""}, JobRequest), files)
    sending = Sending(lines, files)
    try:
        run_async(_send(sending, place, as_json))
    except Interrupted as interrupted:
        click.echo(f"interrupted; {sending.failure or 'all were accepted'}", err=True)
        return interrupted.exit_code
    if sending.failure is not None:
        raise sending.failure
    return 0


async def _send(sending: Sending, place: Location, as_json: bool) -> None:
    async with place.open() as store:
        try:
            await place.written(sending.send(store))
        finally:
            there = [job for job in sending.ids if job in sending.accepted]
            if as_json:
                click.echo(msgspec.json.encode(there))
            elif there:
                click.echo("\n".join(there))


class Sending:
    """A batch that is being submitted, and what became of each job. `accepted` and the others hold ids."""

    def __init__(self, lines: Sequence[BatchLine], files: RequestFiles) -> None:
        self.ids = [line.checked.request.id or mint_id() for line in lines]
        self.accepted: set[str] = set()
        self._lines = lines
        self._files = files
        self._unknown: dict[str, None] = {}  # sent, and no answer yet
        self._refused: list[str] = []  # sentences
        self._away: StoreUnavailable | None = None

    async def send(self, store: Store) -> None:
        """Submit all, many at once; once the store fails, no more are begun."""
        await self._files.keep(store)

        async def one(line: BatchLine, job: str) -> None:
            if self._away is not None:
                return
            try:
                spec = await self._files.spec(line.checked, job, store)
                self._unknown[job] = None
                await submit(store, spec)
                self.accepted.add(job)
            except IdTaken as taken:
                self._refused.append(f"{line.where}: {taken.message}")
            except StoreUnavailable as away:
                self._away = away
                if not isinstance(away, StoreFull):
                    return
            self._unknown.pop(job, None)

        pairs = list(zip(self._lines, self.ids, strict=True))
        await spread(lambda pair: one(*pair), pairs, at_once=SUBMITS_AT_ONCE)

    @property
    def failure(self) -> MvmciError | None:
        """What to say of the jobs that were not accepted."""
        unsent = len(self.ids) - len(self.accepted) - len(self._refused) - len(self._unknown)
        said = list(self._refused)
        if self._unknown:
            said.append(f"it is unknown whether these were accepted: {' '.join(self._unknown)}")
        if unsent:
            why = f": {self._away.message}" if self._away is not None else ""
            said.append(f"{unsent} of {len(self.ids)} were not submitted{why}")
        if self._unknown or unsent:
            hint = "give each line an `id`: then it is safe to submit the same file again"
            return StoreUnavailable("\n".join(said), hint=hint)
        return IdTaken("\n".join(said), hint="choose other ids") if said else None


# ---- wait, cancel


ids_argument = click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_id)


@click.command(
    "wait", epilog=examples("mvmci wait nightly-1", "mvmci wait nightly-1 nightly-2 --timeout 10m")
)
@ids_argument
@option(
    "--timeout",
    type=Duration(),
    envvar="MVMCI_WAIT_TIMEOUT",
    help="How long to wait; the jobs go on. By default, for ever.",
)
@place_options
@json_option
def wait_verb(ids: tuple[str, ...], timeout: int | None, place: Location, as_json: bool) -> int:
    """Wait until all these jobs have ended.

    Exits with 0 if all succeeded, with 1 if one failed or was cancelled, 124 if the time of one was up
    or that of the waiting, 125 if we failed.
    """
    _check_ids(ids)

    async def main() -> int:
        async with place.open() as store:
            journals = await _load_all(store, ids)
            await _all_end(store, journals, timeout, place)
            if as_json:
                await _print_summaries(store, journals, place)
            return max(tell_end(journal) for journal in journals)

    try:
        return run_async(main())
    except Interrupted as interrupted:
        _tell_that_it_goes_on(ids, place)
        return interrupted.exit_code


async def _all_end(
    store: Store, journals: Sequence[Journal], timeout_ms: int | None, place: Location
) -> None:
    """Raises NotYet."""
    try:
        async with asyncio.timeout(timeout_ms / 1000 if timeout_ms is not None else None):
            await spread(lambda journal: until_ended(store, journal), journals, at_once=WAITS_AT_ONCE)
    except TimeoutError:
        assert timeout_ms is not None
        named = _named([journal.job for journal in journals if not journal.state.ended])
        raise NotYet(
            f"after {format_duration(timeout_ms)}, {named} has not ended",
            hint=f"it goes on; {place.verb(f'wait {named}')} waits again",
        ) from None


@click.command("cancel", epilog=examples("mvmci cancel nightly-1", "mvmci cancel nightly-1 nightly-2 --json"))
@ids_argument
@place_options
@json_option
def cancel_verb(ids: tuple[str, ...], place: Location, as_json: bool) -> int:
    """Cancel jobs: one that has not begun ends at once, a running one within two seconds.

    A native program that it runs is told to end, with SIGTERM, and killed ten seconds later.
    """
    _check_ids(ids)

    async def main() -> int:
        async with place.open() as store:
            journals = await _load_all(store, ids)
            by = who()

            async def one(journal: Journal) -> None:
                await cancel_job(store, journal, by)

            await spread(one, journals, at_once=JOURNALS_AT_ONCE)
            for journal in journals:
                click.echo(f"{journal.job} {_after_cancel(journal)}", err=True)
            if as_json:
                await _print_summaries(store, journals, place)
        return 0

    return run_async(main())


def _after_cancel(journal: Journal) -> str:
    name, _ = status(journal.state)
    if journal.state.done is not None or journal.state.corrupt is not None:
        return f"had already ended: {name}"
    return "is cancelled" if journal.state.ended else "is running, and ends within seconds"


def _check_ids(ids: Sequence[str]) -> None:
    for job in ids:
        check_id(job)


async def _load_all(store: Store, ids: Sequence[str]) -> list[Journal]:
    """The journals of `ids`, each once. Raises NotFound."""
    return await spread(lambda job: load(store, job), list(dict.fromkeys(ids)), at_once=JOURNALS_AT_ONCE)


async def _print_summaries(store: Store, journals: Sequence[Journal], place: Location) -> None:
    summaries = await spread(
        lambda journal: summary_of(store, journal, local=place.local), journals, at_once=JOURNALS_AT_ONCE
    )
    click.echo(msgspec.json.encode(summaries))
