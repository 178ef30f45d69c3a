"""A report as JSON: what was written is read again, and what is none or is newer is told in a sentence."""

from __future__ import annotations

import json

import pytest

from mvmci.bench.report import VERSION, decode, encode
from mvmci.errors import Usage, VersionsDiffer
from tests.harness.reports import make_report


def test_what_was_written_is_read_again_with_every_sample() -> None:
    report = make_report()
    read = decode(encode(report))
    assert [one.samples_us for one in read.windows] == [one.samples_us for one in report.windows]
    assert read.windows[-1].sent_us == report.windows[-1].sent_us
    assert [one.knee.at for one in read.curves] == pytest.approx([one.knee.at for one in report.curves], 1e-5)
    assert read.verdict == decode(encode(read)).verdict
    assert decode(encode(read)) == read


def test_no_number_is_written_with_more_digits_than_a_run_knows() -> None:
    told: list[float] = []
    json.loads(encode(make_report()), parse_float=lambda text: told.append(float(text)))
    assert told
    assert all(float(f"{one:.6g}") == one for one in told)


def test_a_report_of_a_newer_schema_is_said_to_be_newer() -> None:
    with pytest.raises(VersionsDiffer, match=f"newer .* version {VERSION + 1}, not {VERSION}"):
        decode(b'{"version": %d, "curves": "told otherwise"}' % (VERSION + 1))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b'{"version": 1}', b'{"version": "1"}', b"[" * 9999]
)
def test_what_is_no_report_is_told_in_one_sentence(data: bytes) -> None:
    with pytest.raises(Usage, match="no report of `mvmci bench`") as told:
        decode(data)
    assert "\n" not in told.value.message
