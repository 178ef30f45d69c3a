"""The file of `submit --batch`: an order a line, as a JSON object whose keys are named as the options.

    {"module": "tool.wasm", "args": ["--fast"], "id": "nightly-1", "dir": ".", "timeout": "5m"}
    {"module": "flow.wasm", "input": {"build": 7}}

All of it is read, and everything wrong with it is said, before anything is submitted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cli.order import STDIN, Checked, Files, Order, read_file
from mvmci.errors import Usage
from mvmci.quantity import parse_duration, parse_size

BATCH_BYTES_MAX = 256 << 20
LINES_MAX = 100_000
PROBLEMS_MAX = 20
ATTEMPTS_MAX = 1000


class Line(msgspec.Struct, frozen=True):
    """A good line: where it stands, and what it orders."""

    where: str
    checked: Checked


def _attempts(value: int) -> int:
    if not 1 <= value <= ATTEMPTS_MAX:
        raise Usage(f"{value} is not from 1 to {ATTEMPTS_MAX}")
    return value


def _list(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _pairs(value: dict[str, str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else value


def _file(value: str) -> str:
    if value == STDIN:
        raise Usage("standard input is not for the lines of a batch", hint="name a file")
    return value


def _same(value: Any) -> Any:
    return value


_Key = tuple[msgspec.json.Decoder[Any], Callable[[Any], Any]]


def _key(kind: Any, meaning: Callable[[Any], Any] = _same) -> _Key:
    return msgspec.json.Decoder(kind), meaning


# What the value of each key may be, and what it becomes in an Order.
_KEYS: dict[str, _Key] = {
    "module": _key(str, _file),
    "args": _key(tuple[str, ...]),
    "id": _key(str),
    "queue": _key(str),
    "input": _key(msgspec.Raw, lambda raw: bytes(raw).decode()),
    "dir": _key(str, Path),
    "artifact": _key(str | tuple[str, ...], _list),
    "env": _key(dict[str, str] | tuple[str, ...], _pairs),
    "stdin": _key(str, _file),
    "timeout": _key(str | int | float, lambda value: parse_duration(value, minimum_ms=1)),
    "memory": _key(str | int, lambda value: parse_size(value, minimum_bytes=1)),
    "output_limit": _key(str | int, lambda value: parse_size(value, minimum_bytes=1)),
    "disk": _key(str | int, lambda value: parse_size(value, minimum_bytes=1)),
    "attempts": _key(int, _attempts),
}
_lines = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_batch(name: str, base: Order, files: Files) -> list[Line]:
    """The orders of the file `name`, or of standard input for `-`; `base` has what a line does not say.

    Raises Usage, which names every bad line.
    """
    shown = "<stdin>" if name == STDIN else name
    found: list[Line] = []
    problems: list[tuple[str, Usage]] = []
    ids: dict[str, str] = {}
    for where, text in _texts(shown, read_file(name, BATCH_BYTES_MAX)):
        try:
            checked = files.check(_order(text, base))
            job = checked.order.id
            if job is not None and ids.setdefault(job, where) != where:
                raise Usage(f"the id {job} is that of {ids[job]} too", hint="an id is one job")
            found.append(Line(where, checked))
        except Usage as problem:
            problems.append((where, problem))
    if problems:
        raise _all_of(problems)
    if not found:
        raise Usage(f"{shown} has no orders", hint="a line is a JSON object with the key `module`")
    return found


def _texts(shown: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The lines that are not empty, each with its place. Raises Usage for too many."""
    count = 0
    for number, text in enumerate(data.split(b"\n"), 1):
        if text.strip():
            count += 1
            if count > LINES_MAX:
                raise Usage(f"{shown} has over {LINES_MAX} orders", hint="submit it in several parts")
            yield f"{shown}:{number}", text


def _order(text: bytes, base: Order) -> Order:
    """What one line says. Raises Usage."""
    try:
        values = _lines.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Usage(f"it is no JSON object: {error}") from None
    changes: dict[str, Any] = {}
    for typed, raw in values.items():
        key = typed.replace("-", "_")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(_KEYS)}"
            raise Usage(f"unknown key `{ascii(typed)[1:-1][:60]}`", hint=hint)
        decoder, meaning = _KEYS[key]
        try:
            changes[key] = meaning(decoder.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Usage(f"`{key}`: {error}") from None
        except Usage as problem:
            raise Usage(f"`{key}`: {problem.message}", hint=problem.hint) from None
    if "module" not in changes:
        raise Usage("there is no `module`")
    return msgspec.structs.replace(base, **changes)


def _all_of(problems: list[tuple[str, Usage]]) -> Usage:
    """All of them as one, the last one's hint as its own."""
    shown = problems[:PROBLEMS_MAX]
    lines = [
        f"{where}: {one.message}" + (f"\nhint: {one.hint}" if one.hint else "") for where, one in shown[:-1]
    ]
    where, last = shown[-1]
    lines.append(f"{where}: {last.message}")
    if len(problems) > len(shown):
        lines.insert(0, f"{len(problems)} bad lines, of which the first {len(shown)} are:")
    return Usage("\n".join(lines), hint=last.hint)
