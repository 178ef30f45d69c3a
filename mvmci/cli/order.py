"""An order: what a user asks for, as it was typed; read and found good before anything is written.

`run` and `submit` share all of it. Whatever files several orders name are read once and stored once.
"""

from __future__ import annotations

import functools
import getpass
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from mvmci import job as jobs
from mvmci import module
from mvmci.cli.options import Decorator, Duration, Size, option
from mvmci.errors import Usage
from mvmci.job import Limits, Payload
from mvmci.journal import Spec
from mvmci.module import Module
from mvmci.pattern import Pattern
from mvmci.store import Store, keep_text

STDIN_BYTES_MAX = 256 << 20
INPUT_BYTES_MAX = 8 << 20
WORDS_BYTES_MAX = 256 << 10
FILES_BYTES_MAX = 1 << 30  # modules and standard inputs of all orders together: they are held in memory
STDIN = "-"


class Order(msgspec.Struct, kw_only=True, frozen=True):
    """One job, as it was typed. `input` is JSON text or `@FILE`; limits are in ms and bytes."""

    module: str
    args: tuple[str, ...] = ()
    id: str | None = None
    queue: str
    input: str | None
    dir: Path | None
    artifact: tuple[str, ...]
    env: tuple[str, ...]
    stdin: str | None
    timeout: int
    memory: int
    output_limit: int
    disk: int
    attempts: int


_OPTIONS: tuple[Decorator, ...] = (
    option("--id", metavar="ID", help="The job's id and idempotency key. Minted if absent."),
    option("--queue", default="default", show_default=True, help="The queue it belongs to."),
    option("--input", metavar="JSON|@FILE", help="A workflow's input."),
    option("--dir", type=click.Path(path_type=Path), help="Copied; it becomes the workspace."),
    option("--artifact", metavar="GLOB", multiple=True, help="Files to keep at the end."),
    option("--env", metavar="K=V", multiple=True, help="The guest's environment. Not for secrets."),
    option("--stdin", metavar="FILE|-", help="The guest's standard input. Empty if absent."),
    option("--timeout", type=Duration(), default="1h", show_default=True, help="From first start to end."),
    option("--memory", type=Size(), default="1GiB", show_default=True, help="Of the guest."),
    option("--output-limit", type=Size(), default="64MiB", show_default=True, help="Of both streams."),
    option("--disk", type=Size(), default="4GiB", show_default=True, help="Of the workspace."),
    option("--attempts", type=click.IntRange(1, 1000), default=5, show_default=True, help="Holders to lose."),
)


def order_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Give `verb` the options that make an order; it gets them under the names of `Order`'s fields."""
    for decorate in reversed(_OPTIONS):
        verb = decorate(verb)
    return verb


class Checked(msgspec.Struct, kw_only=True, frozen=True):
    """An order that was found good, and what was read for it."""

    order: Order
    what: Module
    input: str
    env: tuple[tuple[str, str], ...]


class Files:
    """What orders name: read when they are checked, and then put into a store."""

    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}
        self._data: dict[str, bytes] = {}  # by the name of the file
        self._directories: set[Path] = set()
        self._digests: dict[str | Path, str] = {}
        self._bytes = 0

    def check(self, order: Order) -> Checked:
        """Read all that `order` names but its directory. Raises Usage, BadModule."""
        if order.id is not None:
            jobs.check_id(order.id)
        jobs.check_id(order.queue, "queue")
        what = self._module(order.module)
        _check_kind(order, what)
        for pattern in order.artifact:
            Pattern(pattern)
        _check_words((*order.args, *order.env, *order.artifact, os.path.basename(order.module)))
        if order.stdin is not None:
            self._read(order.stdin, STDIN_BYTES_MAX)
        if order.dir is not None:
            self._directories.add(order.dir)
        return Checked(
            order=order,
            what=what,
            input=_input(order.input) if what.kind == "workflow" else "",
            env=tuple(_variable(text) for text in order.env),
        )

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            data = self._read(name, module.MODULE_BYTES_MAX)
            self._modules[name] = module.inspect(data, name=name)
        return self._modules[name]

    def _read(self, name: str, bytes_max: int) -> bytes:
        if name not in self._data:
            data = read_file(name, bytes_max)
            self._bytes += len(data)
            if self._bytes > FILES_BYTES_MAX:
                raise Usage(
                    f"with {name}, the modules and standard inputs are over {FILES_BYTES_MAX >> 30} GiB",
                    hint="submit them in several batches",
                )
            self._data[name] = data
        return self._data[name]

    async def keep(self, store: Store) -> None:
        """Put all of it into `store`. Raises BadWorkspace, StoreUnavailable."""
        for name in list(self._data):
            self._digests[name] = await store.blobs.put(self._data.pop(name))
        for directory in self._directories:
            from mvmci import tree
            from mvmci.sandbox import workspace

            snapshot = await workspace.scan(directory, store.blobs)
            self._digests[directory] = await store.blobs.put(tree.encode(snapshot.tree))

    async def spec(self, checked: Checked, job: str, store: Store) -> Spec:
        """What the job is; `keep` comes first."""
        order, what = checked.order, checked.what
        workflow = what.kind == "workflow"
        return Spec(
            at=time.time_ns() // 1_000_000,
            id=job,
            queue=order.queue,
            kind=what.kind,
            module=self._digests[order.module],
            name=os.path.basename(order.module)[: jobs.MODULE_NAME_CHARS_MAX],
            component=what.component,
            input=await keep_text(store.blobs, checked.input) if workflow else Payload(),
            args=order.args,
            env=checked.env,
            stdin=self._digests[order.stdin] if order.stdin is not None else None,
            tree=self._digests[order.dir] if order.dir is not None else None,
            artifacts=order.artifact,
            limits=Limits(
                timeout_ms=order.timeout,
                memory_bytes=order.memory,
                output_bytes=order.output_limit,
                workspace_bytes=order.disk,
                attempts=order.attempts,
            ),
            seed=secrets.randbits(63),
            by=who(),
        )


def _check_kind(order: Order, what: Module) -> None:
    """Raises Usage for what only the other kind of job takes."""
    name = order.module
    if name == order.stdin == STDIN:
        raise Usage("standard input cannot be the module and the guest's as well", hint="name a file")
    if what.kind == "workflow" and order.args:
        raise Usage(f"{name} is a workflow and takes no arguments", hint="give it --input JSON")
    if what.kind == "workflow" and (order.env or order.stdin is not None):
        raise Usage(f"{name} is a workflow and takes no --env or --stdin", hint="give it --input JSON")
    if what.kind == "command" and order.input is not None:
        raise Usage(f"{name} is a command and takes no --input", hint="use --stdin, or arguments")


def _check_words(words: tuple[str, ...]) -> None:
    """They stand in the journal's first message, which is UTF-8 and bounded."""
    for word in words:
        _check_text(word)
    if sum(len(word.encode()) for word in words) > WORDS_BYTES_MAX:
        raise Usage(
            f"arguments, environment and artifact patterns are over {WORDS_BYTES_MAX >> 10} KiB together",
            hint="pass large values in a file, with --stdin, --input @FILE or --dir",
        )


def _check_text(word: str) -> None:
    if not word.isprintable() and any("\ud800" <= char <= "\udfff" for char in word):
        raise Usage(f"{ascii(word)[:80]} is not UTF-8", hint="pass bytes in a file, with --stdin or --dir")


def _input(text: str | None) -> str:
    if text is None:
        return "null"
    where = "--input"
    _check_text(text)
    try:
        if text.startswith("@"):
            where = text[1:]
            text = read_file(where, INPUT_BYTES_MAX).decode()
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


def read_file(name: str, bytes_max: int) -> bytes:
    """The bytes of a file, or of standard input for `-`. Raises Usage."""
    try:
        if name == STDIN:
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


@functools.cache
def who() -> str:
    """Who asks, for the journal."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have them
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
