"""The file of `submit --batch`: a job a line, as a JSON object whose keys are named as the options.

    {"module": "tool.wasm", "args": ["--fast"], "id": "nightly-1", "dir": ".", "timeout": "5m"}
    {"module": "flow.wasm", "input": {"build": 7}}

All of it is read, and everything wrong with it is said, before anything is submitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from mvmci.cli.request import STDIN, RequestFiles, read_text
from mvmci.errors import Usage
from mvmci.journals.request import CheckedRequest, JobFields, JobRequest, read_object, request_from

BATCH_BYTES_MAX = 256 << 20
LINES_MAX = 100_000
BAD_LINES_SHOWN_MAX = 20


class BatchLine(msgspec.Struct, frozen=True):
    """A good line: where it stands, and what it asks for."""

    where: str
    checked: CheckedRequest


def _file(value: str) -> str:
    if value == STDIN:
        raise Usage("standard input is not for the lines of a batch", hint="name a file")
    return value


class _LineFields(JobFields, kw_only=True, frozen=True):
    module: str
    input: msgspec.Raw | UnsetType = UNSET
    dir: str | UnsetType = UNSET
    stdin: str | UnsetType = UNSET


def read_batch(name: str, base: JobRequest, files: RequestFiles) -> list[BatchLine]:
    """The jobs of the file `name`, or of standard input for `-`; `base` has what a line does not say.

    Raises Usage, which names every bad line.
    """
    shown = "<stdin>" if name == STDIN else name
    found: list[BatchLine] = []
    problems: list[tuple[str, Usage]] = []
    ids: dict[str, str] = {}
    for where, text in _texts(shown, read_text(name, BATCH_BYTES_MAX)):
        try:
            checked = files.check(_request(text, base))
            job = checked.request.id
            if job is not None and ids.setdefault(job, where) != where:
                raise Usage(f"the id {job} is that of {ids[job]} too", hint="an id is one job")
            found.append(BatchLine(where, checked))
        except Usage as problem:
            problems.append((where, problem))
    if problems:
        raise _all_of(problems)
    if not found:
        raise Usage(f"{shown} has no jobs", hint="a line is a JSON object with the key `module`")
    return found


def _texts(shown: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The lines that are not empty, each with its place. Raises Usage for too many."""
    count = 0
    for number, text in enumerate(data.split(b"\n"), 1):
        if text.strip():
            count += 1
            if count > LINES_MAX:
                raise Usage(f"{shown} has over {LINES_MAX} jobs", hint="submit it in several parts")
            yield f"{shown}:{number}", text


def _request(text: bytes, base: JobRequest) -> JobRequest:
    """What one line says. Raises Usage."""
    return request_from(
        read_object(text, _LineFields),
        base,
        module=_file,
        input=lambda raw: bytes(raw).decode(),
        dir=Path,
        stdin=_file,
    )


def _all_of(problems: list[tuple[str, Usage]]) -> Usage:
    """All of them as one, the last one's hint as its own."""
    shown = problems[:BAD_LINES_SHOWN_MAX]
    lines = [
        f"{where}: {one.message}" + (f"\nhint: {one.hint}" if one.hint else "") for where, one in shown[:-1]
    ]
    where, last = shown[-1]
    lines.append(f"{where}: {last.message}")
    if len(problems) > len(shown):
        lines.insert(0, f"{len(problems)} bad lines, of which the first {len(shown)} are:")
    return Usage("\n".join(lines), hint=last.hint)
