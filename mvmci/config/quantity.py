"""Durations and sizes as people write them: `90`, `1.5h`, `64MiB`.

A duration is seconds, or a number with `ms s m h d`, and becomes whole milliseconds. A size is bytes,
or a number with `KiB MiB GiB`, and becomes whole bytes. What `format_…` writes, `parse_…` reads back to
the same value. Nothing here is locale-dependent, signed, or without an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mvmci import errors

DURATION_MS_MAX = 3650 * 24 * 60 * 60 * 1000  # ten years: anything longer is a slip of the finger
SIZE_BYTES_MAX = 1 << 50

_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,9})?"
DURATION_PATTERN = rf"^{_NUMBER}(?:ms|s|m|h|d)?$"
SIZE_PATTERN = rf"^{_NUMBER}(?:KiB|MiB|GiB)?$"

DURATION_HINT = "A duration is seconds, or a number with ms, s, m, h or d: 90, 250ms, 1.5h, 7d."
SIZE_HINT = "A size is bytes, or a number with KiB, MiB or GiB: 4096, 64MiB, 1.5GiB."

_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SPLIT = re.compile(rf"({_NUMBER})([A-Za-z]*)", re.ASCII)


def parse_duration(text: str | int | float, *, minimum_ms: int = 0, maximum_ms: int = DURATION_MS_MAX) -> int:
    """Milliseconds, from `minimum_ms` to `maximum_ms`. Raises `errors.Usage`."""
    value = _parse(text, units=_MS, unitless=1000)
    if value is None:
        raise errors.Usage(f"{_shown(text)} is not a duration", hint=DURATION_HINT)
    if not minimum_ms <= value <= maximum_ms:
        bounds = f"from {format_duration(minimum_ms)} to {format_duration(maximum_ms)}"
        raise errors.Usage(f"{_shown(text)} is out of bounds", hint=f"A duration {bounds} goes here.")
    return value


def format_duration(ms: int) -> str:
    """`ms` in the largest unit that divides it: `250ms`, `90s`, `7d`."""
    assert ms >= 0
    for unit in ("d", "h", "m", "s"):
        if ms % _MS[unit] == 0 and ms:
            return f"{ms // _MS[unit]}{unit}"
    return f"{ms}ms" if ms else "0s"


def rough_duration(us: float) -> str:
    """`us` microseconds for a table: `80us`, `3.4ms`, `12.0s`, `75m`."""
    for limit, divisor, unit in ((1_000, 1, "us"), (1_000_000, 1_000, "ms"), (600_000_000, 1_000_000, "s")):
        if us < limit:
            return f"{us / divisor:.{0 if divisor == 1 else 1}f}{unit}"
    return f"{us / 60_000_000:.0f}m"


def parse_size(
    text: str | int | float, *, minimum_bytes: int = 0, maximum_bytes: int = SIZE_BYTES_MAX
) -> int:
    """Bytes, from `minimum_bytes` to `maximum_bytes`. Raises `errors.Usage`."""
    value = _parse(text, units=_BYTES, unitless=1)
    if value is None:
        raise errors.Usage(f"{_shown(text)} is not a size", hint=SIZE_HINT)
    if not minimum_bytes <= value <= maximum_bytes:
        bounds = f"from {format_size(minimum_bytes)} to {format_size(maximum_bytes)}"
        raise errors.Usage(f"{_shown(text)} is out of bounds", hint=f"A size {bounds} goes here.")
    return value


def format_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that divides it: `4KiB`, `1GiB`, and plain bytes otherwise."""
    assert size_bytes >= 0
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes % _BYTES[unit] == 0 and size_bytes:
            return f"{size_bytes // _BYTES[unit]}{unit}"
    return str(size_bytes)


def rough_size(size_bytes: int) -> str:
    """`size_bytes` for a sentence: `512 bytes`, `3.4 MiB`."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= _BYTES[unit]:
            return f"{size_bytes / _BYTES[unit]:.1f} {unit}"
    return f"{size_bytes} bytes"


def _parse(text: str | int | float, *, units: Mapping[str, int], unitless: int) -> int | None:
    """The whole number of smallest units, rounded to the nearest; None when it cannot be read."""
    if isinstance(text, float):
        text = f"{text:.9f}"  # nan and inf and negative ones fail to match below
    elif isinstance(text, int):
        text = str(text) if abs(text) < 10**18 else ""
    match = _SPLIT.fullmatch(text.strip())
    if match is None or (match[2] and match[2] not in units):
        return None
    from fractions import Fraction  # it loads decimal numbers with it, and every verb loads this module

    return round(Fraction(match[1]) * (units[match[2]] if match[2] else unitless))


def _shown(text: str | int | float) -> str:
    if isinstance(text, int) and abs(text) >= 10**18:
        return "That number"
    shown = str(text).encode("unicode_escape").decode("ascii")
    return f"`{shown}`" if len(shown) <= 40 else f"`{shown[:40]}…`"
