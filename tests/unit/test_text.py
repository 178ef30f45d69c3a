"""Text of people, as editors and shells write it."""

from __future__ import annotations

import codecs

import pytest

from mvmci.config.strict_yaml import Problems, parse_yaml
from mvmci.config.text import decode_text, plain_text

DRESSES = {
    "plain": "a: é".encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + "a: é".encode(),
    "UTF-16, as PowerShell has it": codecs.BOM_UTF16_LE + "a: é".encode("utf-16-le"),
    "UTF-16, the other way": codecs.BOM_UTF16_BE + "a: é".encode("utf-16-be"),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_a_mark_is_no_part_of_a_text(dress: str) -> None:
    assert decode_text(DRESSES[dress]) == "a: é"
    assert plain_text(DRESSES[dress]) == "a: é".encode()


@pytest.mark.parametrize("dress", DRESSES)
def test_a_cluster_file_is_read_in_each_dress(dress: str) -> None:
    problems = Problems("f")
    node = parse_yaml(DRESSES[dress], problems)
    assert not problems
    assert node is not None
    assert node.value["a"][1].value == "é"


@pytest.mark.parametrize("data", [b"\xff", codecs.BOM_UTF16_LE + b"a", codecs.BOM_UTF16_LE + b"\x00\xd8"])
def test_what_is_no_text_is_said_to_be_none(data: bytes) -> None:
    problems = Problems("f")
    assert parse_yaml(data, problems) is None
    assert problems
