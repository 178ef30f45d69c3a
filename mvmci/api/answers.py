"""What goes out: JSON, and for everything that went wrong one sentence with a status that fits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from mvmci.errors import (
    IdTaken,
    MvmciError,
    NotFound,
    NotYet,
    StoreFull,
    StoreLost,
    StoreUnavailable,
    Usage,
    VersionsDiffer,
)

RETRY_AFTER_S = 1
WRITE_S = 60.0  # a reader that takes nothing for so long is given up
NDJSON = "application/x-ndjson"

_encode = msgspec.json.Encoder().encode

# The first that fits counts.
HTTP_STATUSES: tuple[tuple[type[MvmciError], int], ...] = (
    (StoreFull, 507),
    (StoreUnavailable, 503),
    (StoreLost, 503),
    (VersionsDiffer, 503),  # another executor may understand it
    (IdTaken, 409),
    (NotFound, 404),
    (NotYet, 504),
    (Usage, 400),
)
SENTENCES = {
    404: ("there is no such route", "GET /openapi.json lists those that there are"),
    405: ("the route does not take this method", "GET /openapi.json lists what there is"),
}


class HttpError(MvmciError):
    """The request is answered with `status` and this sentence."""

    def __init__(self, status: int, message: str, *, hint: str | None = None, **headers: str) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`value` as JSON."""
    return web.Response(
        body=_encode(value), status=status, content_type="application/json", headers=headers, charset="utf-8"
    )


def error(failure: MvmciError) -> web.Response:
    """The sentence of an expected failure."""
    status, headers = 500, {}
    if isinstance(failure, HttpError):
        status, headers = failure.status, failure.headers
    else:
        status = next((found for kind, found in HTTP_STATUSES if isinstance(failure, kind)), status)
    if status == 503:
        headers = {"Retry-After": str(RETRY_AFTER_S), **headers}
    return sentence(status, failure.message, failure.hint, headers)


def sentence(
    status: int, message: str, hint: str | None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """What every error looks like."""
    return json({"error": {"message": message, "hint": hint}}, status, headers)
