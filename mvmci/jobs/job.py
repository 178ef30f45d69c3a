"""A job: what a user asked for, in values, and the bounds of every value that stands in a record.

`JobId`s become subjects and file names, so they are checked where they enter. `Limits` are part of
the spec, because a replay must run out of the same things at the same place. What is out of bounds here
is no record for any reader, whoever wrote it, and so never reaches an engine.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from mvmci.config.quantity import DURATION_MS_MAX, SIZE_BYTES_MAX
from mvmci.errors import Usage

ID_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
_ID = re.compile(ID_PATTERN)
DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"  # of a blob
_DIGEST = re.compile(DIGEST_PATTERN)
Id = Annotated[str, msgspec.Meta(pattern=rf"\A{ID_PATTERN}\Z")]

Kind = Literal["command", "workflow"]
End = Literal["succeeded", "failed", "errored", "cancelled", "timed_out"]
Status = Literal["queued", "running", "suspended"] | End
ENDS: tuple[End, ...] = ("succeeded", "failed", "errored", "cancelled", "timed_out")
STATUSES: tuple[Status, ...] = ("queued", "running", "suspended", *ENDS)

INLINE_BYTES_MAX = 64 << 10  # a larger payload is a blob
MODULE_NAME_CHARS_MAX = 255
REASON_CHARS_MAX = 16 << 10
ATTEMPTS_MAX = 1000
COUNT_MAX = 1 << 53  # what every reader of JSON keeps exactly
_TIME_MS_MAX = 253_402_300_799_999  # the year 9999

Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Time = Annotated[int, msgspec.Meta(ge=0, le=_TIME_MS_MAX)]  # milliseconds since 1970
Name = Annotated[str, msgspec.Meta(max_length=255)]
Reason = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]
Words = Annotated[tuple[Text, ...], msgspec.Meta(max_length=1 << 18)]
_Bytes = Annotated[int, msgspec.Meta(ge=1, le=SIZE_BYTES_MAX)]

TIMEOUT_MS = 3_600_000
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 64 << 20
WORKSPACE_BYTES = 4 << 30
ATTEMPTS = 5
FUEL = 100_000_000_000  # a few minutes of computing between a workflow's first and last line


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job may use. Going beyond ends it, with the limit's name first in the reason."""

    # from its first lease to its end, waiting included
    timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=DURATION_MS_MAX)] = TIMEOUT_MS
    memory_bytes: _Bytes = MEMORY_BYTES
    output_bytes: _Bytes = OUTPUT_BYTES  # both streams, one attempt
    workspace_bytes: _Bytes = WORKSPACE_BYTES
    # holders that may be lost; of a workflow, in a row without a result
    attempts: Annotated[int, msgspec.Meta(ge=1, le=ATTEMPTS_MAX)] = ATTEMPTS
    fuel: Annotated[int, msgspec.Meta(ge=1, le=COUNT_MAX)] = FUEL  # workflows only


class Payload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Text in place, or the digest of the blob that holds it."""

    text: Text | None = None
    blob: Name | None = None


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a job left: its path in the workspace, its blob, its size in bytes."""

    path: Text
    digest: Name
    size: Count
    executable: bool = False


def is_id(text: str) -> bool:
    """Whether `text` may be the name of a job, a queue, a unit or a cluster."""
    return _ID.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` may be the digest of a blob."""
    return _DIGEST.fullmatch(text) is not None


def check_id(text: str, what: str = "job id") -> str:
    """`text`, if it may be an id. Raises Usage."""
    if not is_id(text):
        raise Usage(
            f"{text[:80]!r} cannot be a {what}",
            hint="use 1 to 63 of a-z, 0-9 and -, beginning with a letter or a digit",
        )
    return text
