"""`mvmci run` and `mvmci replay`: a job on this machine, with no cluster.

`run` is submit, engine and wait in one process, on a store in the state directory. Everything that it
does is in the journal, so the same command with the same `--id` goes on after a crash.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from mvmci.cli.complete import complete_file
from mvmci.cli.options import (
    HOST_FOLDER,
    Interrupted,
    Location,
    examples,
    id_argument,
    json_option,
    make_state,
    open_local,
    option,
    place_options,
    run_async,
    state_option,
)
from mvmci.cli.output import Printer, report, standard_streams
from mvmci.cli.request import RequestFiles, job_options
from mvmci.engine import Engine
from mvmci.engines import open_embedded
from mvmci.errors import EXIT_FAILED, LockHeld, Nondeterminism
from mvmci.jobs import job as jobs
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Entry
from mvmci.journals.client import mint_id, submit
from mvmci.journals.logs import OutputWatch
from mvmci.journals.reader import load
from mvmci.journals.request import CheckedRequest, JobRequest
from mvmci.store import Store
from mvmci.system.clock import wall_clock_ms
from mvmci.trust.known import LOCAL_FOLDER


@click.command(
    "run",
    epilog=examples(
        "mvmci run tool.wasm -- --version",
        "mvmci run lint.wasm --dir . --artifact 'report/*.json' -- --strict",
        """mvmci run flow.wasm --input '{"build": 7}' --allow-http 'https://api.example.com/*'""",
        "mvmci run flow.wasm --id nightly-1 --input @build.json",
        "echo hello | mvmci run cat.wasm --stdin -",
    ),
)
@click.argument("module", metavar="MODULE", shell_complete=complete_file)
@click.argument("args", metavar="[-- ARG]...", nargs=-1)
@job_options
@option("--allow-http", metavar="URL", multiple=True, help="URLs that a workflow may request; * matches.")
@option("--allow-exec", metavar="NAME", multiple=True, help="Programs that a workflow may run.")
@json_option
@state_option
def run_verb(
    state: Path, as_json: bool, allow_http: tuple[str, ...], allow_exec: tuple[str, ...], **options: Any
) -> int:
    """Run MODULE to its end on this machine, and print what it prints.

    Exits with 0, with 1 if the job failed, 124 if it timed out. After a crash, or Ctrl-C, the same
    command with --id resumes it.
    """
    files = RequestFiles(state)
    checked = files.check(msgspec.convert(options, JobRequest))
    allow = Allow(http=allow_http, exec=allow_exec)
    job = checked.request.id or mint_id()
    try:
        return run_async(_run(files, checked, job, allow, state, as_json))
    except Interrupted as interrupted:
        minted = [] if checked.request.id else ["--id", job]
        again = ["mvmci", "run", *minted, *sys.argv[2:]]
        click.echo(f"interrupted; `{shlex.join(again)}` resumes it", err=True)
        return interrupted.exit_code


async def _run(
    files: RequestFiles, checked: CheckedRequest, job: str, allow: Allow, state: Path, as_json: bool
) -> int:
    make_state(state)
    store = open_local(state / LOCAL_FOLDER)
    try:
        await files.keep(store)
        new = await submit(store, await files.spec(checked, job, store))
        spec_entry = (await store.journals.read(job))[0] if new else None
        click.echo(job, err=True)
        engine = open_embedded(store, state / HOST_FOLDER, allow=lambda: allow, slots=1, notice=_notice)
        try:
            return await _see_through(engine, store, job, spec_entry, Location(state, local=True), as_json)
        finally:
            await engine.close()
    finally:
        await store.close()


def _notice(text: str) -> None:
    click.echo(text, err=True)


async def _see_through(
    engine: Engine, store: Store, job: str, spec_entry: Entry | None, place: Location, as_json: bool
) -> int:
    """Run the job to its end, print its output as it comes, and say how it ended."""
    state = (await load(store, job)).state
    workflow = state.spec is not None and state.spec.kind == "workflow"
    since = 0 if workflow else state.epoch + (0 if state.ended else 1)
    if state.held and state.lease is not None and await store.presence.live(job, state.lease):
        raise _held(job, place)
    if state.ended:
        click.echo("it has already ended; this is its recorded result", err=True)
    elif state.lease is not None:
        click.echo(f"resumes after {state.results} recorded effects", err=True)
    async with OutputWatch(
        store, job, Printer(*standard_streams(all_on_stderr=as_json), since=since)
    ) as watch:
        await _until_ended(engine, job, spec_entry, place)
        journal = await load(store, job)
        await watch.rest(journal.state, wait_s=0)
    return await report(store, journal, place, as_json=as_json)


async def _until_ended(engine: Engine, job: str, spec_entry: Entry | None, place: Location) -> None:
    while (step := await engine.run(job, spec_entry=spec_entry)).kind != "ended":
        spec_entry = None
        if step.kind == "held":
            raise _held(job, place)
        await asyncio.sleep(max(0, step.until - wall_clock_ms()) / 1000)


def _held(job: str, place: Location) -> LockHeld:
    return LockHeld(f"another process is running {job}", hint=f"{place.verb(f'logs {job} -f')} follows it")


@click.command("replay", epilog=examples("mvmci replay nightly-1", "mvmci replay nightly-1 --local"))
@id_argument
@place_options
def replay_verb(job: str, place: Location) -> int:
    """Run an ended workflow again from its journal, without effects.

    Prints `identical` when it asked for the same things and came to the same end; otherwise the
    effect's index, what was expected and what came, and exits with 1.
    """
    jobs.check_id(job)
    return run_async(_replay(job, place))


async def _replay(job: str, place: Location) -> int:
    async with place.open() as store:
        engine = open_embedded(store, place.state / HOST_FOLDER, allow=Allow, slots=1, notice=_notice)
        try:
            effects = await engine.verify(job)
        except Nondeterminism as found:
            click.echo(found.message)
            return EXIT_FAILED
        finally:
            await engine.close()
    click.echo("identical")
    click.echo(f"{effects} effects", err=True)
    return 0
