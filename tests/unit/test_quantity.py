"""Durations and sizes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvmci import errors
from mvmci.config import quantity

DURATIONS = [
    ("90", 90_000),
    (90, 90_000),
    (0.5, 500),
    ("1.5", 1500),
    ("250ms", 250),
    ("90s", 90_000),
    ("5m", 300_000),
    ("1h", 3_600_000),
    ("1.5h", 5_400_000),
    ("7d", 604_800_000),
    (" 1h ", 3_600_000),
    ("0", 0),
]
SIZES = [("4096", 4096), (4096, 4096), ("64MiB", 64 << 20), ("1GiB", 1 << 30), ("1.5KiB", 1536), ("0", 0)]
NEITHER = [
    "",
    " ",
    "x",
    "1 h",
    "-1",
    "+1",
    "1e3",
    "1.",
    ".5",
    "1w",
    "nan",
    "inf",
    "1_000",
    "१",
    "1h30m",
    "9" * 30,
    "1\0",
]


@pytest.mark.parametrize(("text", "ms"), DURATIONS)
def test_a_duration_is_seconds_or_a_number_with_a_unit(text: str | int | float, ms: int) -> None:
    assert quantity.parse_duration(text) == ms


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_a_size_is_bytes_or_a_number_with_a_unit(text: str | int, size: int) -> None:
    assert quantity.parse_size(text) == size


@pytest.mark.parametrize("text", [*NEITHER, "1MiB", "1H", True, -1, float("nan"), float("inf")])
def test_what_is_no_duration_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(errors.Usage) as caught:
        quantity.parse_duration(text)
    assert caught.value.hint == quantity.DURATION_HINT


@pytest.mark.parametrize("text", [*NEITHER, "1h", "1MB", "1G", "1mib", False, -1])
def test_what_is_no_size_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(errors.Usage) as caught:
        quantity.parse_size(text)
    assert caught.value.hint == quantity.SIZE_HINT


def test_a_quantity_out_of_bounds_says_the_bounds() -> None:
    with pytest.raises(errors.Usage, match="`2h` is out of bounds") as caught:
        quantity.parse_duration("2h", minimum_ms=1, maximum_ms=3_600_000)
    assert caught.value.hint == "A duration from 1ms to 1h goes here."
    with pytest.raises(errors.Usage, match="`0` is out of bounds") as caught:
        quantity.parse_size(0, minimum_bytes=1, maximum_bytes=1 << 20)
    assert caught.value.hint == "A size from 1 to 1MiB goes here."
    with pytest.raises(errors.Usage, match="out of bounds"):
        quantity.parse_duration("4000d")


@given(st.integers(0, quantity.DURATION_MS_MAX))
def test_a_duration_that_was_written_is_read_back_the_same(ms: int) -> None:
    assert quantity.parse_duration(quantity.format_duration(ms)) == ms


@given(st.integers(0, quantity.SIZE_BYTES_MAX))
def test_a_size_that_was_written_is_read_back_the_same(size: int) -> None:
    assert quantity.parse_size(quantity.format_size(size)) == size


def test_a_number_too_long_to_print_is_refused_too() -> None:
    with pytest.raises(errors.Usage, match="That number is not a duration"):
        quantity.parse_duration(10**5000)


@given(st.text(max_size=30) | st.integers() | st.floats())
def test_anything_at_all_is_a_quantity_or_a_usage_error(text: str | int | float) -> None:
    for parse, pattern in (
        (quantity.parse_duration, quantity.DURATION_PATTERN),
        (quantity.parse_size, quantity.SIZE_PATTERN),
    ):
        try:
            value = parse(text)
        except errors.Usage as refused:
            message = refused.message
        else:
            message = "fine"
            assert value >= 0
            assert not isinstance(text, str) or re.search(pattern, text.strip())
        assert len(message) < 200
        assert message.isprintable()
