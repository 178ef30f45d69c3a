"""A request for a job, checked before anything is written.

It is typed as options, or written as an object of JSON whose keys are named as those: a line of a batch,
the body of an HTTP request. What it may say, and the spec that it becomes, is decided here alone.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mvmci.config.quantity import parse_duration, parse_size
from mvmci.errors import Usage
from mvmci.jobs import job as jobs
from mvmci.jobs.glob import Pattern
from mvmci.jobs.job import ATTEMPTS_MAX, Limits, Payload
from mvmci.jobs.journal import Spec
from mvmci.jobs.module import Module
from mvmci.store import Store, keep_text

INPUT_BYTES_MAX = 8 << 20
_WORDS_BYTES_MAX = 256 << 10
_SHOWN_CHARS_MAX = 300


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


class CheckedRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A request that was found good. `name` is that of the module's file, `input` JSON text."""

    request: JobRequest
    module: Module
    name: str
    input: str
    env: tuple[tuple[str, str], ...]


class Digests(msgspec.Struct, kw_only=True, frozen=True):
    """Where in a store lies what a request names."""

    module: str
    stdin: str | None = None
    tree: str | None = None


def check_request(
    request: JobRequest, module: Module, *, name: str, read: Callable[[str], str]
) -> CheckedRequest:
    """`request` for a job of `module`, whose file is `name`. Raises Usage.

    `read` turns what was typed as input into JSON text, if it is not that already.
    """
    if request.id is not None:
        jobs.check_id(request.id)
    jobs.check_id(request.queue, "queue")
    _check_kind(request, module)
    for pattern in request.artifact:
        Pattern(pattern)
    _check_words((*request.args, *request.env, *request.artifact, name))
    return CheckedRequest(
        request=request,
        module=module,
        name=name,
        input=_input(request.input, read) if module.kind == "workflow" else "",
        env=tuple(_variable(text) for text in request.env),
    )


async def spec_of(
    checked: CheckedRequest, job: str, digests: Digests, store: Store, *, at: int, by: str
) -> Spec:
    """What the job is. A long input is put into `store`."""
    request, module = checked.request, checked.module
    return Spec(
        at=at,
        id=job,
        queue=request.queue,
        kind=module.kind,
        module=digests.module,
        name=checked.name[: jobs.MODULE_NAME_CHARS_MAX],
        component=module.component,
        input=await keep_text(store.blobs, checked.input) if module.kind == "workflow" else Payload(),
        args=request.args,
        env=checked.env,
        stdin=digests.stdin,
        tree=digests.tree,
        artifacts=request.artifact,
        limits=Limits(
            timeout_ms=request.timeout,
            memory_bytes=request.memory,
            output_bytes=request.output_limit,
            workspace_bytes=request.disk,
            attempts=request.attempts,
        ),
        seed=secrets.randbits(63),
        by=by[: jobs.MODULE_NAME_CHARS_MAX],
    )


def _check_kind(request: JobRequest, module: Module) -> None:
    """Raises Usage for what only the other kind of job takes."""
    name = request.module
    if module.kind == "workflow" and request.args:
        raise Usage(f"{name} is a workflow and takes no arguments", hint="give it --input JSON")
    if module.kind == "workflow" and (request.env or request.stdin is not None):
        raise Usage(f"{name} is a workflow and takes no --env or --stdin", hint="give it --input JSON")
    if module.kind == "command" and request.input is not None:
        raise Usage(f"{name} is a command and takes no --input", hint="use --stdin, or arguments")


def _check_words(words: tuple[str, ...]) -> None:
    """They stand in the journal's first message, which is UTF-8 and bounded."""
    for word in words:
        _check_text(word)
    if sum(len(word.encode()) for word in words) > _WORDS_BYTES_MAX:
        raise Usage(
            f"arguments, environment and artifact patterns are over {_WORDS_BYTES_MAX >> 10} KiB together",
            hint="pass large values in a file, with --stdin, --input @FILE or --dir",
        )


def _check_text(word: str) -> None:
    if not word.isprintable() and any("\ud800" <= char <= "\udfff" for char in word):
        raise Usage(f"{ascii(word)[:80]} is not UTF-8", hint="pass bytes in a file, with --stdin or --dir")


def _input(typed: str | None, read: Callable[[str], str]) -> str:
    if typed is None:
        return "null"
    _check_text(typed)
    where = typed[1:_SHOWN_CHARS_MAX] if typed.startswith("@") else "--input"  # no JSON begins so
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


# ---- Requests as objects of JSON


class JobFields(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an object of JSON says of a job, whoever reads it; a value that is UNSET was left out.

    A duration is seconds or text with a unit, and a size is bytes or text with one.
    """

    args: tuple[str, ...] | UnsetType = UNSET
    id: Annotated[str, Meta(extra_json_schema={"pattern": f"^{jobs.ID_PATTERN}$"})] | UnsetType = UNSET
    queue: str | UnsetType = UNSET
    artifact: str | tuple[str, ...] | UnsetType = UNSET
    env: dict[str, str] | tuple[str, ...] | UnsetType = UNSET
    timeout: str | int | float | UnsetType = UNSET
    memory: str | int | UnsetType = UNSET
    output_limit: str | int | UnsetType = UNSET
    disk: str | int | UnsetType = UNSET
    attempts: int | UnsetType = UNSET


_Fields = TypeVar("_Fields", bound=JobFields)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


@cache  # a batch asks for each of its lines
def _decoders(kind: type[JobFields]) -> tuple[dict[str, msgspec.json.Decoder[Any]], list[str]]:
    """By a field's name; and the fields that have to be there."""
    fields = msgspec.structs.fields(kind)
    decoders = {field.name: msgspec.json.Decoder(field.type) for field in fields}
    return decoders, [field.name for field in fields if field.required]


def read_object(text: bytes, kind: type[_Fields]) -> _Fields:
    """The object of JSON that `text` is; `-` in a key stands for `_`. Raises Usage, which names the key."""
    try:
        found = _objects.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Usage(f"it is no JSON object: {error}") from None
    (decoders, required), values = _decoders(kind), {}
    for typed, raw in found.items():
        name = typed.replace("-", "_")
        if name not in decoders:
            close = difflib.get_close_matches(name, decoders, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(decoders)}"
            raise Usage(f"unknown key `{ascii(typed)[1:-1][:60]}`", hint=hint)
        try:
            values[name] = decoders[name].decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Usage(f"`{name}`: {error}") from None
    for name in required:
        if name not in values:
            raise Usage(f"there is no `{name}`")
    return kind(**values)


def _attempts(value: int) -> int:
    if not 1 <= value <= ATTEMPTS_MAX:
        raise Usage(f"{value} is not from 1 to {ATTEMPTS_MAX}")
    return value


def _bytes(value: str | int) -> int:
    return parse_size(value, minimum_bytes=1)


_MEANINGS: dict[str, Callable[[Any], Any]] = {
    "args": tuple,
    "id": str,
    "queue": str,
    "artifact": lambda value: (value,) if isinstance(value, str) else value,
    "env": lambda value: (
        tuple(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else value
    ),
    "timeout": lambda value: parse_duration(value, minimum_ms=1),
    "memory": _bytes,
    "output_limit": _bytes,
    "disk": _bytes,
    "attempts": _attempts,
}


def request_from(fields: JobFields, base: JobRequest, **meanings: Callable[[Any], Any]) -> JobRequest:
    """`base`, with what `fields` say instead. Raises Usage, which names the key.

    `meanings` are those of the keys that only this kind of fields has; each may raise Usage.
    """
    values: dict[str, Any] = {}
    for name, meaning in (_MEANINGS | meanings).items():
        value = getattr(fields, name)
        if value is not UNSET:
            try:
                values[name] = meaning(value)
            except Usage as problem:
                raise Usage(f"`{name}`: {problem.message}", hint=problem.hint) from None
    return msgspec.structs.replace(base, **values)
