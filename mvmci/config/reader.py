"""Reads a small YAML file as msgspec structs, and finds every problem of it, with line and column.

The structs are the only place that names the keys and says what each value may be: the `description` of a
value's type completes the sentence "`workers.count` must be …".
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from mvmci.config.strict_yaml import INVALID, Node, Position, Problems, got, parse_yaml, shown

KeyPath = tuple[str | int, ...]  # the keys, and the indices in lists, that lead to a value


class Reading(Problems):
    """A file as it was read, with its problems so far.

    `values` are plain data of what is sound, or None where nothing is; `broken` are the top-level keys
    that are not.
    """

    def __init__(
        self, text: str | bytes, kind: type[msgspec.Struct], *, name: str, examples: Mapping[str, str]
    ) -> None:
        super().__init__(name)
        self.examples = examples
        self.broken: set[str] = set()
        self.values: dict[str, Any] | None = None
        self._node = parse_yaml(text, self)
        if self._node is not None:
            plain = _plain(kind, self._node, (), self)
            self.values = None if plain is INVALID else plain

    def refuse(self, path: KeyPath, message: str, hint: str | None = None) -> None:
        """Note that the value at `path`, or the nearest one around it that the file has, is wrong."""
        assert self._node is not None
        self.add(_position(self._node, path), message, hint)

    def at(self, path: KeyPath, position: Position, message: str, hint: str | None = None) -> Any:
        """Note what keeps the value at `path` from being read. Returns INVALID."""
        self.add(position, message, hint)
        return self.breaks(path)

    def breaks(self, path: KeyPath) -> Any:
        """Note that the section of `path` is not sound. Returns INVALID."""
        self.broken.update(str(key) for key in path[:1])
        return INVALID


def _plain(kind: Any, node: Node, path: KeyPath, found: Reading) -> Any:
    """The value of `node` as plain data that converts to `kind`, or `INVALID` when there is none."""
    kind = _meant(kind, node)
    bare = _bare(kind)
    if node.value is INVALID:  # its reader has reported it
        return found.breaks(path)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        return _plain_struct(bare, node, path, found)
    if get_origin(bare) is dict and isinstance(node.value, dict):
        return _plain_dict(kind, node, path, found)
    if get_origin(bare) is tuple and isinstance(node.value, list):
        parts = [_plain(get_args(bare)[0], item, (*path, i), found) for i, item in enumerate(node.value)]
        return INVALID if INVALID in parts else _converts(kind, parts, node, path, found)
    return _converts(kind, node.value, node, path, found)


def _plain_struct(kind: type[msgspec.Struct], node: Node, path: KeyPath, found: Reading) -> Any:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    if not isinstance(node.value, dict):
        message = f"{_called(path)} must be a mapping, not {got(node)}"
        return found.at(path, node.position, message, f"Its keys: {', '.join(fields)}.")
    values: dict[str, Any] = {}
    meant: set[str] = set()
    for key, (position, child) in node.value.items():
        if key in fields:
            value = _plain(fields[key].type, child, (*path, key), found)
            if value is not INVALID:
                values[key] = value
            continue
        close = difflib.get_close_matches(key, fields, n=1)
        meant.update(close)
        where = f" in `{_dotted(path)}`" if path else ""
        hint = f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(fields)}."
        found.at(path or tuple(close), position, f"unknown key `{shown(key)}`{where}", hint)
    for key, field in fields.items():
        if field.required and key not in node.value and key not in meant:
            hint = f"Add {key}: {found.examples.get(key, 'NAME')}."
            found.at((*path, key), node.position, f"there is no `{_dotted((*path, key))}`", hint)
    return values


def _plain_dict(kind: Any, node: Node, path: KeyPath, found: Reading) -> Any:
    key_kind, value_kind = get_args(_bare(kind))
    values: dict[str, Any] = {}
    for key, (position, child) in node.value.items():
        name = _converts(key_kind, key, Node(key, position), path, found)
        value = _plain(value_kind, child, (*path, key), found)
        if name is not INVALID and value is not INVALID:
            values[name] = value
    return _converts(kind, values, node, path, found)


def _converts(kind: Any, value: Any, node: Node, path: KeyPath, found: Reading) -> Any:
    """`value`, when msgspec takes it as `kind`."""
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError:
        message = f"{_called(path)} must be {_expected(kind)}, not {got(node)}"
        return found.at(path, node.position, message, _fitting(kind, node.value))
    return value


def _bare(kind: Any) -> Any:
    """`kind` without its annotation, and without `None` beside one other type."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        others = [other for other in get_args(kind) if other is not types.NoneType]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind


def _meant(kind: Any, node: Node) -> Any:
    """Of a choice between one and a list of them, the one that `node` has the form of."""
    bare = _bare(kind)
    if get_origin(bare) not in (Union, types.UnionType):
        return kind
    lists = [one for one in get_args(bare) if get_origin(_bare(one)) is tuple]
    others = [one for one in get_args(bare) if one not in (*lists, types.NoneType)]
    if not lists or len(others) != 1:
        return kind
    return lists[0] if isinstance(node.value, list) else others[0]


def _expected(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return _expected(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is Annotated:
        return next(str(meta.description) for meta in get_args(kind)[1:] if meta.description)
    assert get_origin(kind) is dict
    return "a mapping"


def _fitting(kind: Any, value: Any) -> str | None:
    """What to write instead, where a slip is plain to see."""
    bare = _bare(kind)
    if get_origin(bare) is Literal and isinstance(value, str):
        return did_you_mean(value, get_args(bare))
    if get_origin(bare) is tuple and isinstance(value, str):
        return f"Write a list: [{shown(value)}]."
    if bare is str and isinstance(value, bool | int | float):
        return f'Put it in quotes: "{shown(value)}".'
    if bare is int and isinstance(value, str) and value.isdecimal():
        return "Write it without quotes."
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the one of `known` that is closest to `word`, if any is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean `{close[0]}`?" if close else None


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{shown(key)}" for key in path).removeprefix(".")


def _called(path: KeyPath) -> str:
    return f"`{_dotted(path)}`" if path else "the file"


def _position(node: Node, path: KeyPath) -> Position:
    """Where the value at `path` begins, or the nearest one around it that the file has."""
    for key in path:
        if isinstance(node.value, dict) and key in node.value:
            node = node.value[key][1]
        elif isinstance(node.value, list) and isinstance(key, int):
            node = node.value[key]
    return node.position
