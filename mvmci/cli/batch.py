"""The file of `submit --batch`: an order a line, as a JSON object whose keys are named as the options.

    {"module": "tool.wasm", "args": ["--fast"], "id": "nightly-1", "dir": ".", "timeout": "5m"}
    {"module": "flow.wasm", "input": {"build": 7}}

All of it is read, and everything wrong with it is said, before anything is submitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from mvmci.cli.order import STDIN, Files, read_file
from mvmci.errors import Usage
from mvmci.journals.request import KEYS, Checked, JobRequest, key, values_of

BATCH_BYTES_MAX = 256 << 20
LINES_MAX = 100_000
PROBLEMS_MAX = 20


class Line(msgspec.Struct, frozen=True):
    """A good line: where it stands, and what it orders."""

    where: str
    checked: Checked


def _file(value: str) -> str:
    if value == STDIN:
        raise Usage("standard input is not for the lines of a batch", hint="name a file")
    return value


_KEYS = {
    **KEYS,
    "module": key(str, _file),
    "input": key(msgspec.Raw, lambda raw: bytes(raw).decode()),
    "dir": key(str, Path),
    "stdin": key(str, _file),
}


def read_batch(name: str, base: JobRequest, files: Files) -> list[Line]:
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


def _order(text: bytes, base: JobRequest) -> JobRequest:
    """What one line says. Raises Usage."""
    values = values_of(text, _KEYS)
    if "module" not in values:
        raise Usage("there is no `module`")
    return msgspec.structs.replace(base, **values)


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
