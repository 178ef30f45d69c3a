"""Messages as they lie in a stream, for what copies streams."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple


class Row(NamedTuple):
    """A message of a stream. `at` is in ns since 1970; `headers` are as they are sent, or empty."""

    seq: int
    at: int
    subject: str
    headers: bytes
    data: bytes


def nanoseconds(text: str) -> int:
    """A time of the broker, RFC 3339 with up to nine digits, in ns since 1970."""
    whole, _, rest = text.rstrip("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 10**9 + int(rest.ljust(9, "0") or 0)
