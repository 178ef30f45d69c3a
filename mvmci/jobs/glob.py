"""Which files an artifact pattern means: shell patterns over whole relative paths, as pure functions.

`*`, `?` and `[…]` match within one name, `**` any number of directories, and a pattern that matches a
directory takes all that is beneath it. Names that begin with a dot are names like any other.
"""

from __future__ import annotations

import re

from mvmci.errors import Usage

PATTERN_CHARS_MAX = 1_000


class Pattern:
    """One artifact pattern. Making one raises Usage for what cannot be one.

    Matching takes time in proportion to the path, whatever the pattern.
    """

    def __init__(self, text: str) -> None:
        parts = text.removeprefix("./").rstrip("/").split("/")
        if len(text) > PATTERN_CHARS_MAX or any(part in ("", ".", "..") for part in parts):
            raise Usage(
                f"{text[:100]!r} cannot be an artifact pattern",
                hint="it is a path relative to the workspace, such as report/*.json or **/*.xml",
            )
        if parts[-1] == "**":
            parts.append("*")
        self._parts = [None if part == "**" else _name_pattern(part) for part in parts]

    def matches(self, path: str) -> bool:
        """Whether it matches the file at `path`, or a directory above it."""
        at = self._closed({0})
        for name in path.split("/"):
            if len(self._parts) in at:
                return True
            steps = ((index, self._parts[index]) for index in at)
            at = self._closed(
                {index + (part is not None) for index, part in steps if part is None or part.fullmatch(name)}
            )
        return len(self._parts) in at

    def _closed(self, at: set[int]) -> set[int]:
        """`at`, and what is reached from there when a `**` stands for nothing."""
        for index in sorted(at):
            while index < len(self._parts) and self._parts[index] is None:
                index += 1
                at.add(index)
        return at


def _name_pattern(text: str) -> re.Pattern[str]:
    """`*`, `?` and `[…]` in one name as a regular expression that never looks back over a `*`."""
    runs: list[str] = [""]
    at = 0
    while at < len(text):
        character = text[at]
        at += 1
        closing = text.find("]", at + 1 + text.startswith("!", at)) if character == "[" else -1
        if character == "*":
            runs.append("")
        elif character == "?":
            runs[-1] += "."
        elif closing >= 0:
            inside = text[at:closing]
            negated, inside = ("^", inside[1:]) if inside.startswith("!") else ("", inside)
            # A hyphen makes a range and is left; two of them, and other doubles, will be operators some day.
            escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside)
            runs[-1] += f"[{negated}{escaped.replace('--', '-' + chr(92) + '-')}]"
            at = closing + 1
        else:
            runs[-1] += re.escape(character)
    first, *others = runs
    middle = "".join(f"(?>.*?{run})" for run in others[:-1])
    try:
        return re.compile(first + middle + (f".*{others[-1]}" if others else ""), re.DOTALL)
    except re.error:
        raise Usage(f"{text[:100]!r} cannot be an artifact pattern: its brackets mean nothing") from None
