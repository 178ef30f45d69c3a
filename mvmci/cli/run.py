"""`mvmci run` and `mvmci replay`: a job on this machine, with no cluster.

`run` is submit, engine and wait in one process, on a store in the state directory. Everything that it
does is in the journal, so the same command with the same `--id` goes on after a crash.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import secrets
import shlex
import socket
import sys
import time
from pathlib import Path

import click
import msgspec

from mvmci import job as jobs
from mvmci import module
from mvmci.allow import Allow
from mvmci.cli.options import (
    HOST,
    Duration,
    Interrupted,
    Size,
    examples,
    id_argument,
    json_option,
    local_option,
    open_store,
    option,
    run_async,
    state_option,
)
from mvmci.cli.output import Printer, follow, standard_streams, stop
from mvmci.cli.read import summary_of
from mvmci.engine import Engine
from mvmci.engines import open_embedded
from mvmci.errors import EXIT_FAILED, EXIT_INTERNAL, EXIT_TIMED_OUT, LockHeld, Nondeterminism, Usage
from mvmci.holder import load
from mvmci.job import Limits, Payload
from mvmci.journal import Journal, Spec, status
from mvmci.module import Module
from mvmci.pattern import Pattern
from mvmci.store import Store, keep_text
from mvmci.submission import mint_id, submit

STDIN_BYTES_MAX = 256 << 20
INPUT_BYTES_MAX = 8 << 20
WORDS_BYTES_MAX = 256 << 10
EXITS = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_FAILED, "timed_out": EXIT_TIMED_OUT}

EXAMPLES = """
\b
Examples:
  mvmci run tool.wasm -- --version
  mvmci run lint.wasm --dir . --artifact 'report/*.json' -- --strict
  mvmci run flow.wasm --input '{"build": 7}' --allow-http 'https://api.example.com/*' --allow-exec git
  mvmci run flow.wasm --id nightly-1 --input @build.json
  echo hello | mvmci run cat.wasm --stdin -
"""


@click.command("run", epilog=EXAMPLES)
@click.argument("module_path", metavar="MODULE", type=click.Path(path_type=Path))
@click.argument("args", metavar="[-- ARG]...", nargs=-1)
@option("--id", "job", metavar="ID", help="The job's id and idempotency key. Minted if absent.")
@option("--queue", default="default", show_default=True, help="The queue it belongs to.")
@option("--input", "input_", metavar="JSON|@FILE", help="A workflow's input.")
@option("--dir", "directory", type=click.Path(path_type=Path), help="Copied; it becomes the workspace.")
@option("--artifact", "artifacts", metavar="GLOB", multiple=True, help="Files to keep at the end.")
@option("--env", "env", metavar="K=V", multiple=True, help="The guest's environment. Not for secrets.")
@option("--stdin", "stdin", metavar="FILE|-", help="The guest's standard input. Empty if absent.")
@option("--timeout", type=Duration(), default="1h", show_default=True, help="From first start to end.")
@option("--memory", type=Size(), default="1GiB", show_default=True, help="Of the guest.")
@option("--output-limit", type=Size(), default="64MiB", show_default=True, help="Of both streams.")
@option("--disk", type=Size(), default="4GiB", show_default=True, help="Of the workspace.")
@option("--attempts", type=click.IntRange(1, 1000), default=5, show_default=True, help="Holders to lose.")
@option("--allow-http", metavar="URL", multiple=True, help="URLs that a workflow may request; * matches.")
@option("--allow-exec", metavar="NAME", multiple=True, help="Programs that a workflow may run.")
@json_option
@state_option
def run_verb(module_path: Path, state: Path, as_json: bool, **options: object) -> int:
    """Run MODULE to its end on this machine, and print what it prints.

    Exits with 0, with 1 if the job failed, 124 if its time was up. After a crash, or Ctrl-C, the same
    command with --id goes on where it was.
    """
    order = msgspec.convert({**options, "module": str(module_path)}, Order)
    read = _read(order)
    minted = order.job is None
    order.job = order.job or mint_id()
    try:
        return run_async(_run(order, read, state, as_json))
    except Interrupted as interrupted:
        again = ["mvmci", "run", *(["--id", order.job] if minted else []), *sys.argv[2:]]
        click.echo(f"interrupted; `{shlex.join(again)}` goes on from here", err=True)
        return interrupted.exit_code


class Order(msgspec.Struct, kw_only=True):
    """The options of `run`, as they were typed."""

    module: str
    job: str | None
    queue: str
    input_: str | None
    directory: Path | None
    artifacts: tuple[str, ...]
    env: tuple[str, ...]
    stdin: str | None
    timeout: int
    memory: int
    output_limit: int
    disk: int
    attempts: int
    allow_http: tuple[str, ...]
    allow_exec: tuple[str, ...]
    args: tuple[str, ...]


async def _run(order: Order, read: Read, state: Path, as_json: bool) -> int:
    async with open_store(state, create=True) as store:
        spec = await _spec(order, read, store)
        fresh = await submit(store, spec)
        click.echo(spec.id, err=True)
        engine = open_embedded(store, state / HOST, allow=read.allow, slots=1, notice=_notice)
        try:
            return await _see_through(engine, store, spec.id, fresh, as_json)
        finally:
            await engine.close()


def _notice(text: str) -> None:
    click.echo(text, err=True)


class Read(msgspec.Struct, kw_only=True):
    """Everything that an order names, read and found good before anything is written."""

    module: bytes
    what: Module
    input: str
    env: tuple[tuple[str, str], ...]
    stdin: bytes | None
    allow: Allow


def _read(order: Order) -> Read:
    if order.job is not None:
        jobs.check_id(order.job)
    jobs.check_id(order.queue, "queue")
    code = _read_file(order.module, module.MODULE_BYTES_MAX)
    what = module.inspect(code, name=order.module)
    if what.kind == "workflow" and order.args:
        raise Usage(f"{order.module} is a workflow and takes no arguments", hint="give it --input JSON")
    if what.kind == "workflow" and (order.env or order.stdin is not None):
        raise Usage(
            f"{order.module} is a workflow and takes no --env or --stdin", hint="give it --input JSON"
        )
    if what.kind == "command" and order.input_ is not None:
        raise Usage(f"{order.module} is a command and takes no --input", hint="use --stdin, or arguments")
    for pattern in order.artifacts:
        Pattern(pattern)
    _check_words((*order.args, *order.env, *order.artifacts, Path(order.module).name))
    return Read(
        module=code,
        what=what,
        allow=Allow(http=order.allow_http, exec=order.allow_exec),
        input=_input(order.input_) if what.kind == "workflow" else "",
        env=tuple(_variable(text) for text in order.env),
        stdin=_read_file(order.stdin, STDIN_BYTES_MAX) if order.stdin is not None else None,
    )


def _check_words(words: tuple[str, ...]) -> None:
    """They stand in the journal's first message, which is UTF-8 and bounded."""
    for word in words:
        if not word.isprintable() and any("\ud800" <= char <= "\udfff" for char in word):
            raise Usage(
                f"{ascii(word)[:80]} is not UTF-8", hint="pass bytes in a file, with --stdin or --dir"
            )
    if sum(len(word.encode()) for word in words) > WORDS_BYTES_MAX:
        raise Usage(
            f"arguments, environment and artifact patterns are over {WORDS_BYTES_MAX >> 10} KiB together",
            hint="pass large values in a file, with --stdin, --input @FILE or --dir",
        )


def _input(text: str | None) -> str:
    if text is None:
        return "null"
    where = "--input"
    _check_words((text,))
    try:
        if text.startswith("@"):
            where = text[1:]
            text = _read_file(where, INPUT_BYTES_MAX).decode()
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Usage(
            f"{where} is not JSON: {error}", hint="""quote it for the shell: --input '{"a": 1}'"""
        ) from None
    return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or "\0" in text:
        raise Usage(f"--env {text!r} is not of the form K=V")
    return name, value


def _read_file(name: str, bytes_max: int) -> bytes:
    """The bytes of a file, or of standard input for `-`."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(bytes_max + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Usage(f"{name} cannot be read: {why}") from None
    if len(data) > bytes_max:
        raise Usage(f"{name} is larger than {bytes_max >> 20} MiB, which is the most that is taken")
    return data


async def _spec(order: Order, read: Read, store: Store) -> Spec:
    """Put everything that the job needs into the store, and say what the job is."""
    assert order.job is not None
    tree = None
    if order.directory is not None:
        from mvmci import tree as trees
        from mvmci.sandbox import workspace

        snapshot = await workspace.scan(order.directory, store.blobs)
        tree = await store.blobs.put(trees.encode(snapshot.tree))
    input_ = Payload()
    if read.what.kind == "workflow":
        input_ = await keep_text(store.blobs, read.input)
    return Spec(
        at=_now_ms(),
        id=order.job,
        queue=order.queue,
        kind=read.what.kind,
        module=await store.blobs.put(read.module),
        name=Path(order.module).name[: jobs.MODULE_NAME_CHARS_MAX],
        component=read.what.component,
        input=input_,
        args=order.args,
        env=read.env,
        stdin=await store.blobs.put(read.stdin) if read.stdin is not None else None,
        tree=tree,
        artifacts=order.artifacts,
        limits=Limits(
            timeout_ms=order.timeout,
            memory_bytes=order.memory,
            output_bytes=order.output_limit,
            workspace_bytes=order.disk,
            attempts=order.attempts,
        ),
        seed=secrets.randbits(63),
        by=f"{_user()}@{socket.gethostname()}",
    )


async def _see_through(engine: Engine, store: Store, job: str, fresh: bool, as_json: bool) -> int:
    """Run the job to its end, its output passed on as it comes, and say how it ended."""
    state = (await load(store, job)).state
    workflow = state.spec is not None and state.spec.kind == "workflow"
    since = 0 if workflow else state.epoch + (0 if state.ended else 1)
    if state.held and state.lease is not None and await store.presence.live(job, state.lease):
        raise _held(job)
    if state.ended:
        click.echo("it has already ended; this is what is recorded", err=True)
    elif state.lease is not None:
        click.echo(f"goes on after {state.results} recorded effects", err=True)
    printer = Printer(*standard_streams(all_on_stderr=as_json), since=since)
    following = asyncio.create_task(follow(store, job, printer))
    try:
        await _until_ended(engine, job, fresh)
    finally:
        await stop(following)
    await printer.show(await store.logs.read(job))
    journal = await load(store, job)
    printer.warn(journal.state)
    return await _report(store, journal, as_json)


async def _until_ended(engine: Engine, job: str, fresh: bool) -> None:
    while (step := await engine.run(job, fresh=fresh)).kind != "ended":
        fresh = False
        if step.kind == "held":
            raise _held(job)
        await asyncio.sleep(max(0, step.until - _now_ms()) / 1000)


def _held(job: str) -> LockHeld:
    return LockHeld(f"another process is at work on {job}", hint=f"`mvmci logs {job} --local -f` follows it")


async def _report(store: Store, journal: Journal, as_json: bool) -> int:
    name, reason = status(journal.state)
    summary = await summary_of(store, journal)
    if as_json:
        click.echo(msgspec.json.encode(summary))
    elif summary.result is not None:
        click.echo(bytes(summary.result))
    if name != "succeeded":
        click.echo(f"{journal.job} {name}: {reason}", err=True)
    return EXITS.get(name, EXIT_INTERNAL)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have them
        return str(os.getuid())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.command("replay", epilog=examples("mvmci replay nightly-1 --local"))
@id_argument
@local_option
@state_option
def replay_verb(job: str, local: bool, state: Path) -> int:
    """Run an ended workflow again from its journal, without effects.

    Prints `identical` when it asked for the same things and came to the same end; otherwise the
    effect's index, what was expected and what came, and exits with 1.
    """
    jobs.check_id(job)
    return run_async(_replay(job, local, state))


async def _replay(job: str, local: bool, state: Path) -> int:
    async with open_store(state, local=local) as store:
        engine = open_embedded(store, state / HOST, allow=Allow(), slots=1, notice=_notice)
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
