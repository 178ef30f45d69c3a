"""A small YAML, read strictly and with positions: text in, nodes out, every problem reported.

It is one document without anchors, aliases, tags, merge keys or duplicate keys. Keys are text, and all
text is of one line. A plain `yes`, `010` or `1:30` is text too, and not what YAML 1.1 makes of it.
The text is hostile: its size, its depth and the number of its values are bounded.

What the keys mean, and of which type a value must be, is for the caller to say. `write_yaml` goes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec
import yaml

from mvmci.config.text import decode_text

DOCUMENT_BYTES_MAX = 1 << 20
NODES_MAX = 20_000
NESTING_MAX = 12
_SHOWN_CHARS_MAX = 60

INVALID: Final = object()  # the value of a node that was reported and cannot be used
Position = tuple[int, int]  # line and column, from 1


class Node(NamedTuple):
    """One value and where it begins.

    `value` is a scalar, a list of nodes, `INVALID`, or for a mapping {key: (position of the key, node)}.
    """

    value: Any
    position: Position


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing wrong with a file. `where` is `file:line:column`, both from 1."""

    where: str
    message: str
    hint: str | None = None


class Problems:
    """What is wrong with one file so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._items: list[tuple[Position, str, str | None]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, position: Position, message: str, hint: str | None = None) -> None:
        """Note that something is wrong at `position`."""
        self._items.append((position, message, hint))

    def ordered(self) -> tuple[Problem, ...]:
        """All of them, in the order of the file."""
        items = sorted(self._items, key=lambda item: item[0])
        return tuple(
            Problem(where=f"{self.name}:{line}:{column}", message=text, hint=hint)
            for (line, column), text, hint in items
        )


def got(node: Node) -> str:
    """What stands there, for a message that wanted something else."""
    if isinstance(node.value, dict):
        return "a mapping" if node.value else "an empty mapping"
    if isinstance(node.value, list):
        return "a list" if node.value else "an empty list"
    return "nothing" if node.value is None else f"`{shown(node.value)}`"


def shown(value: Any) -> str:
    """A scalar as the file has it, cut to a length that fits a message."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN_CHARS_MAX + 1])
    return text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "…"


_PLAIN: Final = (
    (re.compile(r"~|null|"), lambda _: None),
    (re.compile(r"true|false"), lambda text: text == "true"),
    (re.compile(r"-?(0|[1-9][0-9]{0,17})", re.ASCII), int),
    (re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}", re.ASCII), float),
)


class _Stop(Exception):
    """The text cannot be read on. The reason has been reported."""


def parse_yaml(text: str | bytes, found: Problems) -> Node | None:
    """The document as nodes, or None when a problem was found that leaves none."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(data) > DOCUMENT_BYTES_MAX:
        found.add((1, 1), f"the file has more than the {DOCUMENT_BYTES_MAX:,} bytes that it may have")
        return None
    try:
        decoded = decode_text(data)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        found.add(_line_column(before), "the file is not UTF-8", "Save it as UTF-8.")
        return None
    try:
        return _Composer(decoded, found).document()
    except _Stop:
        return None


def _line_column(before: str) -> Position:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class _Dumper(yaml.SafeDumper):
    """Writes every value out, also one that is there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_yaml(value: Any) -> str:
    """Mappings, lists and scalars as YAML, keys in their order; lists of scalars on a line each."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


class _Composer:
    """Builds nodes from PyYAML's events: its own composer would resolve aliases and cannot be bounded."""

    def __init__(self, text: str, found: Problems) -> None:
        self.found = found
        self.nodes = 0
        try:
            self.loader: Any = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            raise self.stop(
                _line_column(text[: error.position]), "the file has a character that YAML forbids"
            ) from None

    def stop(self, position: Position, message: str, hint: str | None = None) -> _Stop:
        self.found.add(position, message, hint)
        return _Stop()

    def event(self) -> Any:
        try:
            return self.loader.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark or self.loader.get_mark()
            said = shown(error.problem or "it cannot be parsed")
            raise self.stop(_of(mark), f"this is not YAML: {said}") from None
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML passes absurd escapes and versions on to `chr` and `int`.
            raise self.stop(
                _of(self.loader.get_mark()), "this is not YAML: a number in it is out of bounds"
            ) from None

    def document(self) -> Node:
        self.event()  # the stream's start
        first = self.event()
        if isinstance(first, yaml.StreamEndEvent):
            raise self.stop((1, 1), "the file is empty", "There is nothing in it but comments or blanks.")
        node = self.node(self.event(), 0)
        self.event()  # the document's end
        after = self.event()
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.stop(
                _of(after.start_mark), "a second document begins here", "Put each into a file of its own."
            )
        return node

    def node(self, event: Any, depth: int) -> Node:
        position = _of(event.start_mark)
        self.bound(position, depth)
        if isinstance(event, yaml.AliasEvent):
            return self.refused(position, f"`*{shown(event.anchor)}` is an alias", "Write the value out.")
        sound = True
        if event.anchor is not None:
            self.found.add(
                position, f"`&{shown(event.anchor)}` is an anchor", "Write values out where they are used."
            )
        if event.tag is not None:
            self.found.add(position, f"`{shown(event.tag)}` is a tag", "Tags are not read: remove it.")
            sound = False
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, position)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(list(self.sequence(depth)), position)
        else:
            node = Node(self.mapping(depth), position)
        return node if sound else Node(INVALID, position)

    def bound(self, position: Position, depth: int) -> None:
        self.nodes += 1
        if depth > NESTING_MAX:
            raise self.stop(position, f"values are nested more than {NESTING_MAX} deep here")
        if self.nodes > NODES_MAX:
            raise self.stop(position, f"the file has more than {NODES_MAX:,} values")

    def refused(self, position: Position, message: str, hint: str | None = None) -> Node:
        self.found.add(position, message, hint)
        return Node(INVALID, position)

    def scalar(self, event: Any, position: Position) -> Node:
        text: str = event.value
        if not text.isprintable():
            return self.refused(
                position, "this text has a line break or a control character", "Write it on one line."
            )
        if event.style is None:
            for pattern, value in _PLAIN:
                if pattern.fullmatch(text):
                    return Node(value(text), position)
        return Node(text, position)

    def sequence(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := self.event(), yaml.SequenceEndEvent):
            yield self.node(event, depth + 1)

    def mapping(self, depth: int) -> dict[str, tuple[Position, Node]]:
        values: dict[str, tuple[Position, Node]] = {}
        while not isinstance(event := self.event(), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(self.event(), depth + 1)
            if key.value is INVALID:
                continue
            if not isinstance(key.value, str):
                self.found.add(key.position, f"a key must be text, not {got(key)}", "Put it in quotes.")
            elif key.value == "<<":
                self.found.add(key.position, "`<<` is a merge key", "Write the values out.")
            elif key.value in values:
                first = values[key.value][0]
                message = f"`{shown(key.value)}` is given twice, first at line {first[0]}"
                self.found.add(key.position, message, "Keep one of them.")
            else:
                values[key.value] = (key.position, value)
        return values


def _of(mark: Any) -> Position:
    return mark.line + 1, mark.column + 1
