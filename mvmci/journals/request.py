"""An order: what a user asks for, found good before anything is written.

It is typed as options, or written as an object of JSON whose keys are named as those: a line of a batch,
the body of a request. What may stand in it, and the spec that it becomes, is said here, once for all.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mvmci.config.quantity import parse_duration, parse_size
from mvmci.errors import Usage
from mvmci.jobs import job as jobs
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import Spec
from mvmci.jobs.module import Module
from mvmci.store import Store, keep_text

INPUT_BYTES_MAX = 8 << 20
WORDS_BYTES_MAX = 256 << 10
ATTEMPTS_MAX = 1000
SHOWN_CHARS_MAX = 300


class JobRequest(msgspec.Struct, kw_only=True, frozen=True):
    """One job, as it was typed. `input` is JSON text; limits are in ms and bytes.

    On a command line `input` may be `@FILE`; `module`, `dir` and `stdin` name files there.
    """

    module: str = ""
    args: tuple[str, ...] = ()
    id: str | None = None
    queue: str = "default"
    input: str | None = None
    dir: Path | None = None
    artifact: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    stdin: str | None = None
    timeout: int = jobs.TIMEOUT_MS
    memory: int = jobs.MEMORY_BYTES
    output_limit: int = jobs.OUTPUT_BYTES
    disk: int = jobs.WORKSPACE_BYTES
    attempts: int = jobs.ATTEMPTS


class Checked(msgspec.Struct, kw_only=True, frozen=True):
    """An order that was found good. `name` is that of the module's file, `input` JSON text."""

    order: JobRequest
    what: Module
    name: str
    input: str
    env: tuple[tuple[str, str], ...]


class Digests(msgspec.Struct, kw_only=True, frozen=True):
    """Where in a store lies what an order names."""

    module: str
    stdin: str | None = None
    tree: str | None = None


def check(order: JobRequest, what: Module, *, name: str, read: Callable[[str], str]) -> Checked:
    """`order` for a job of module `what`, whose file is `name`. Raises Usage.

    `read` turns what was typed as input into JSON text, if it is not that already.
    """
    if order.id is not None:
        jobs.check_id(order.id)
    jobs.check_id(order.queue, "queue")
    _check_kind(order, what)
    for pattern in order.artifact:
        Pattern(pattern)
    _check_words((*order.args, *order.env, *order.artifact, name))
    return Checked(
        order=order,
        what=what,
        name=name,
        input=_input(order.input, read) if what.kind == "workflow" else "",
        env=tuple(_variable(text) for text in order.env),
    )


async def spec_of(checked: Checked, job: str, digests: Digests, store: Store, *, at: int, by: str) -> Spec:
    """What the job is. A long input is put into `store`."""
    order, what = checked.order, checked.what
    return Spec(
        at=at,
        id=job,
        queue=order.queue,
        kind=what.kind,
        module=digests.module,
        name=checked.name[: jobs.MODULE_NAME_CHARS_MAX],
        component=what.component,
        input=await keep_text(store.blobs, checked.input) if what.kind == "workflow" else Payload(),
        args=order.args,
        env=checked.env,
        stdin=digests.stdin,
        tree=digests.tree,
        artifacts=order.artifact,
        limits=Limits(
            timeout_ms=order.timeout,
            memory_bytes=order.memory,
            output_bytes=order.output_limit,
            workspace_bytes=order.disk,
            attempts=order.attempts,
        ),
        seed=secrets.randbits(63),
        by=by,
    )


def _check_kind(order: JobRequest, what: Module) -> None:
    """Raises Usage for what only the other kind of job takes."""
    name = order.module
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


def _input(typed: str | None, read: Callable[[str], str]) -> str:
    if typed is None:
        return "null"
    _check_text(typed)
    where = typed[1:SHOWN_CHARS_MAX] if typed.startswith("@") else "--input"  # no JSON begins so
    try:
        text = read(typed)
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


# ---- Orders as objects of JSON


class Key(NamedTuple):
    """What the value of a key may be, and what it becomes in an JobRequest."""

    kind: Any
    meaning: Callable[[Any], Any]
    decoder: msgspec.json.Decoder[Any]


def key(kind: Any, meaning: Callable[[Any], Any] = lambda value: value) -> Key:
    """A key whose value is a `kind`. `meaning` may raise Usage."""
    return Key(kind, meaning, msgspec.json.Decoder(kind))


def _attempts(value: int) -> int:
    if not 1 <= value <= ATTEMPTS_MAX:
        raise Usage(f"{value} is not from 1 to {ATTEMPTS_MAX}")
    return value


def _list(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _pairs(value: dict[str, str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else value


def _bytes(value: str | int) -> int:
    return parse_size(value, minimum_bytes=1)


KEYS: dict[str, Key] = {
    "args": key(tuple[str, ...]),
    "id": key(str),
    "queue": key(str),
    "artifact": key(str | tuple[str, ...], _list),
    "env": key(dict[str, str] | tuple[str, ...], _pairs),
    "timeout": key(str | int | float, lambda value: parse_duration(value, minimum_ms=1)),
    "memory": key(str | int, _bytes),
    "output_limit": key(str | int, _bytes),
    "disk": key(str | int, _bytes),
    "attempts": key(int, _attempts),
}
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


def values_of(text: bytes, keys: Mapping[str, Key]) -> dict[str, Any]:
    """What an object of JSON says, by its `keys` and no others. Raises Usage, which names the key."""
    try:
        found = _objects.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Usage(f"it is no JSON object: {error}") from None
    values: dict[str, Any] = {}
    for typed, raw in found.items():
        name = typed.replace("-", "_")
        if name not in keys:
            close = difflib.get_close_matches(name, keys, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(keys)}"
            raise Usage(f"unknown key `{ascii(typed)[1:-1][:60]}`", hint=hint)
        try:
            values[name] = keys[name].meaning(keys[name].decoder.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Usage(f"`{name}`: {error}") from None
        except Usage as problem:
            raise Usage(f"`{name}`: {problem.message}", hint=problem.hint) from None
    return values
