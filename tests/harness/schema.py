"""Strategies of Hypothesis for values as they stand in JSON, by msgspec's types, and for what is beside."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

Strategy = st.SearchStrategy[Any]
WORDS = st.sampled_from(
    ["", "a", "default", "other", "\x1b[2J", "\u202e", "a\nb", "0" * 300, "\ud7ff", "\x00"]
)
ANY: Strategy = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def values(kind: Any) -> Strategy:
    """What is of type `kind`, within its bounds."""
    return _values(inspect.type_info(kind))


def _values(info: inspect.Type) -> Strategy:
    match info:
        case inspect.IntType():
            low = 0 if info.ge is None else info.ge
            high = 2**53 if info.le is None else info.le
            return st.sampled_from([low, high]) | st.integers(low, min(high, low + 100))
        case inspect.FloatType():
            return st.floats(allow_nan=False, allow_infinity=False)
        case inspect.StrType(pattern=None):
            return WORDS.map(lambda text: text[: info.max_length])
        case inspect.StrType():
            return st.sampled_from(["a", "default", "other", "worker-9", "w" * 63])
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.BytesType():
            return st.binary(max_size=20).map(lambda data: msgspec.to_builtins(data))
        case inspect.LiteralType():
            return st.sampled_from(list(info.values))
        case inspect.VarTupleType() | inspect.ListType():
            return st.lists(_values(info.item_type), max_size=3)
        case inspect.TupleType():
            return st.tuples(*map(_values, info.item_types)).map(list)
        case inspect.DictType():
            return st.dictionaries(WORDS, _values(info.value_type), max_size=2)
        case inspect.UnionType():
            return st.one_of(*map(_values, info.types))
        case inspect.StructType():
            return _struct(info.cls)
        case _:
            return ANY


@functools.cache
def _struct(kind: Any) -> Strategy:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    needed = {field.encode_name: _values(field.type) for field in info.fields if field.required}
    more = {field.encode_name: _values(field.type) for field in info.fields if not field.required}
    tag = {info.tag_field: st.just(info.tag)} if info.tag_field else {}
    return st.fixed_dictionaries(tag | needed, optional=more)


def beside(kind: Any) -> Strategy:
    """What is nearly of type `kind`, a struct or a union of them: one field is of another or is missing."""

    def spoilt(value: dict[str, Any]) -> Strategy:
        return st.tuples(st.sampled_from(sorted(value)), ANY | st.just(...)).map(
            lambda change: {
                name: one
                for name, old in value.items()
                if (one := change[1] if name == change[0] else old) is not ...
            }
        )

    return values(kind).flatmap(spoilt)


def damaged(data: bytes) -> Strategy:
    """`data`, cut off or with a byte changed."""
    if not data:
        return st.just(data)
    cut = st.integers(0, len(data) - 1).map(lambda at: data[:at])
    flip = st.tuples(st.integers(0, len(data) - 1), st.integers(1, 255)).map(
        lambda one: data[: one[0]] + bytes([data[one[0]] ^ one[1]]) + data[one[0] + 1 :]
    )
    return cut | flip
