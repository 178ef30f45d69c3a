"""What others wrote, as text that a terminal or a line of a log may be given."""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` as one line: what moves a cursor, breaks a line or turns its direction is escaped, and shown."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def printable(text: str) -> str:
    """The same of each line."""
    return "\n".join(map(one_line, text.split("\n")))
