"""What a workflow may ask of the outside world, and what may come back: the values of the WIT world.

They cross the slot's socket and stand in the journal in the same form. Bodies are text; bytes that
are not UTF-8 are base64 and say so.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})
REDACTED = "(redacted)"

Pairs = tuple[tuple[str, str], ...]


class Value(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """Base of requests and answers."""


class Http(Value, frozen=True, kw_only=True, tag="http"):
    """One HTTP request."""

    method: str
    url: str
    headers: Pairs = ()
    body: str = ""
    timeout_ms: int = 0
    idempotent: bool = False


class Exec(Value, frozen=True, kw_only=True, tag="exec"):
    """One native program: an argument list, run in the job's workspace."""

    argv: tuple[str, ...]
    env: Pairs = ()
    stdin: str = ""
    timeout_ms: int = 0
    idempotent: bool = False


class Sleep(Value, frozen=True, kw_only=True, tag="sleep"):
    """A pause of `ms` milliseconds from the moment that its intent names."""

    ms: int

    @property
    def idempotent(self) -> bool:
        """A pause that was cut short is gone on with, to the same moment."""
        return True


class Response(Value, frozen=True, kw_only=True, tag="response"):
    """The answer to an `Http`."""

    status: int
    headers: Pairs = ()
    body: str = ""
    base64: bool = False


class Exit(Value, frozen=True, kw_only=True, tag="exit"):
    """How an `Exec` ended."""

    code: int
    stdout: str = ""
    stderr: str = ""


class Slept(Value, frozen=True, kw_only=True, tag="slept"):
    """The end of a `Sleep`."""


class Error(Value, frozen=True, kw_only=True, tag="error"):
    """The `effect-error` of the workflow world."""

    why: Literal["interrupted", "timed-out", "denied", "lost", "failed"]
    text: str = ""


Request = Http | Exec | Sleep
Answer = Response | Exit | Slept | Error

_encoder = msgspec.json.Encoder()


def digest(request: Request) -> str:
    """The hex SHA-256 of a request, by which a replay knows it again."""
    return hashlib.sha256(_encoder.encode(request)).hexdigest()


def kind(request: Request) -> Literal["http", "exec", "sleep"]:
    """The name of a request's kind."""
    match request:
        case Http():
            return "http"
        case Exec():
            return "exec"
        case Sleep():
            return "sleep"


def redacted(request: Request) -> Request:
    """`request` as it may be shown and kept: the values of headers that carry credentials are gone."""
    if not isinstance(request, Http):
        return request
    headers = tuple(
        (name, REDACTED if name.lower() in SECRET_HEADERS else value) for name, value in request.headers
    )
    return msgspec.structs.replace(request, headers=headers)


def idempotency_key(job: str, index: int) -> str:
    """The key of effect `index` of `job`, the same for every holder (PROTOCOL §2)."""
    return hashlib.sha256(f"{job}/{index}".encode()).hexdigest()
