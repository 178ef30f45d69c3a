"""The types of the workflow world, read from its WIT: what functions there are, and what crosses them.

Reads the part of the language that `mvmci/wit` uses. A type's text is what is compared with a component's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORLD = Path(__file__).resolve().parents[1] / "wit" / "workflow.wit"

_TOKEN = re.compile(r"//[^\n]*|->|[{}()<>,:;@./]|[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Type:
    """`kind` is `string`, `u32`, … or has parts: `list`, `result`, `record`, `variant`, `enum`.

    Parts are fields, cases, or what is listed; `name` is that of a type which has one.
    """

    kind: str
    parts: tuple[tuple[str, Type | None], ...] = ()
    name: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "record":
                return "record{" + ",".join(f"{name}:{type_}" for name, type_ in self.parts) + "}"
            case "variant" | "enum":
                cases = (name if type_ is None else f"{name}({type_})" for name, type_ in self.parts)
                return f"{self.kind}{{{','.join(cases)}}}"
            case _ if self.parts:
                return f"{self.kind}<{','.join(str(type_) for _, type_ in self.parts)}>"
            case _:
                return self.kind


@dataclass(frozen=True)
class Function:
    """One function of an interface."""

    parameters: tuple[tuple[str, Type], ...]
    result: Type | None

    def __str__(self) -> str:
        parameters = ",".join(str(type_) for _, type_ in self.parameters)
        return f"({parameters})->{'' if self.result is None else self.result}"

    @property
    def fields(self) -> tuple[tuple[str, Type], ...]:
        """What a request holds: the parameters, or the fields of the one record among them."""
        if len(self.parameters) == 1 and self.parameters[0][1].kind == "record":
            return tuple((name, type_) for name, type_ in self.parameters[0][1].parts if type_ is not None)
        return self.parameters

    @property
    def fails(self) -> bool:
        """Whether it can return an error."""
        return self.result is not None and self.result.kind == "result"

    @property
    def returns(self) -> Type | None:
        """What it returns where it does not fail."""
        return self.result.parts[0][1] if self.result is not None and self.fails else self.result


@cache
def functions() -> dict[str, Function]:
    """Those of the interface `host`, by name."""
    return _Reader(WORLD.read_text()).functions("host")


class _Reader:
    """Reads one WIT document."""

    def __init__(self, text: str) -> None:
        self._tokens: Iterator[str] = (one for one in _TOKEN.findall(text) if not one.startswith("//"))
        self._types: dict[str, Type] = {}
        self._next = next(self._tokens)

    def functions(self, interface: str) -> dict[str, Function]:
        while self._take() != "interface" or self._next != interface:
            pass
        self._take()
        self._expect("{")
        found = {}
        while self._next != "}":
            word = self._take()
            if word in ("record", "variant", "enum") and self._next != ":":
                name = self._take()
                self._types[name] = Type(word, tuple(self._list("{", "}")), name)
            else:
                self._expect(":")
                found[word] = self._function()
        return found

    def _function(self) -> Function:
        self._expect("func")
        parameters = tuple((name, type_) for name, type_ in self._list("(", ")") if type_ is not None)
        result = None
        if self._next == "->":
            self._take()
            result = self._type()
        self._expect(";")
        return Function(parameters, result)

    def _list(self, start: str, end: str) -> Iterator[tuple[str, Type | None]]:
        """`name: type`, `case(type)` or `case`, with commas between."""
        self._expect(start)
        while self._next != end:
            name, type_ = self._take(), None
            if self._next == ":":
                self._take()
                type_ = self._type()
            elif self._next == "(":
                self._take()
                type_ = self._type()
                self._expect(")")
            yield name, type_
            if self._next == ",":
                self._take()
        self._expect(end)

    def _type(self) -> Type:
        name = self._take()
        if self._next != "<":
            return self._types.get(name) or Type(name)
        parts = []
        while self._take() in "<,":
            parts.append(("", self._type()))
            if self._next == ">":
                self._take()
                break
        return Type(name, tuple(parts))

    def _take(self) -> str:
        taken, self._next = self._next, next(self._tokens, "")
        if not taken:
            raise ValueError("the WIT ends too early")
        return taken

    def _expect(self, wanted: str) -> None:
        if (found := self._take()) != wanted:
            raise ValueError(f"the WIT has {found} where {wanted} is expected")
