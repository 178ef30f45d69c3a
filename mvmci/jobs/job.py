"""A job: what a user asked for, in values.

`JobId`s become subjects and file names, so they are checked where they enter. `Limits` are part of
the spec, because a replay must run out of the same things at the same place.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

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

TIMEOUT_MS = 3_600_000
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 64 << 20
WORKSPACE_BYTES = 4 << 30
ATTEMPTS = 5
FUEL = 100_000_000_000  # a few minutes of computing between a workflow's first and last line


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job may use. Going beyond ends it, with the limit's name first in the reason."""

    timeout_ms: int = TIMEOUT_MS  # from its first lease to its end, waiting included
    memory_bytes: int = MEMORY_BYTES
    output_bytes: int = OUTPUT_BYTES  # both streams, one attempt
    workspace_bytes: int = WORKSPACE_BYTES
    attempts: int = ATTEMPTS  # holders that may be lost; of a workflow, in a row without a result
    fuel: int = FUEL  # workflows only


class Payload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Text in place, or the digest of the blob that holds it."""

    text: str | None = None
    blob: str | None = None


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a job left: its path in the workspace, its blob, its size in bytes."""

    path: str
    digest: str
    size: int


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
