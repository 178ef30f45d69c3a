"""HTML and SVG of which no text can become markup: what is not made here is escaped where it is put in."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from mvmci.system.text import one_line


class Markup(str):
    """Text that was made of tags, so that it goes into others as it is."""

    __slots__ = ()


Inside = str | None | Iterable["Inside"]  # strings are text unless they are Markup


def tag(name: str, *inside: Inside, **attributes: str | float | bool | None) -> Markup:
    """An element. `class_` and `stroke_width` are attributes `class` and `stroke-width`; None is none."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value not in (None, False)
    )
    return Markup(f"<{name}{shown}>{join(inside)}</{name}>")


def join(inside: Inside) -> Markup:
    """All of it in a row."""
    match inside:
        case None:
            return Markup()
        case Markup():
            return inside
        case str():
            return Markup(escape(one_line(inside)))
        case _:
            return Markup("".join(map(join, inside)))


def _attribute(value: str | float | bool) -> str:
    match value:
        case bool():
            return ""
        case str():
            return escape(one_line(value))
        case _:
            return f"{value:.1f}".removesuffix(".0")
