"""Artifact patterns: what they match, and that none of them takes long to say so."""

from __future__ import annotations

import warnings

import pytest

from mvmci.errors import Usage
from mvmci.jobs.glob import Pattern


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a", "a", True),
        ("a", "a/b/c", True),
        ("a", "b/a", False),
        ("a/", "a/b", True),
        ("./a", "a", True),
        ("*", "a/b", True),
        ("*.x", "a.x", True),
        ("*.x", "a.y", False),
        ("*.x", "d/a.x", False),
        ("**/*.x", "a.x", True),
        ("**/*.x", "d/e/a.x", True),
        ("a/**", "a/b/c", True),
        ("a/**", "a", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/c/d/b", True),
        ("a/**/b", "a/c/d", False),
        ("?.x", "a.x", True),
        ("?.x", "ab.x", False),
        ("[ab].x", "b.x", True),
        ("[!ab].x", "b.x", False),
        ("[!ab].x", "c.x", True),
        ("[a-c]", "b", True),
        ("[]]", "]", True),
        ("[", "[", True),
        ("[^a]", "^", True),
        ("a.b", "axb", False),
        ("(a|b)+", "a", False),
        ("*a*b*", "xaybz", True),
        ("*a*b", "xaybz", False),
        ("*.tar.gz", "x.tar.tar.gz", True),
        ("a\nb", "a\nb", True),
    ],
)
def test_a_pattern_matches_whole_paths(pattern: str, path: str, matches: bool) -> None:
    assert Pattern(pattern).matches(path) is matches


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../x", "a/../b", "", "a//b", "[z-a]", "x" * 2000])
def test_a_pattern_that_cannot_be_one_is_refused(pattern: str) -> None:
    with pytest.raises(Usage):
        Pattern(pattern)


def test_a_pattern_takes_no_time_to_speak_of() -> None:
    assert not Pattern("*a" * 100 + "b").matches("a" * 255)
    assert not Pattern("**/" * 50 + "b").matches("/".join("a" * 100))


@pytest.mark.parametrize(
    "pattern", ["[[a]", "[a&&b]", "[a--b]", "[a||b]", "[a~~b]", "[--a]", "[!--a]", "[a[:b]"]
)
def test_no_pattern_means_something_to_the_library_alone(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            matches = Pattern(pattern).matches
        except Usage:
            return
    assert matches("a") is not pattern.startswith("[!")
