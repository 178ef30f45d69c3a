"""What all effects have in common, whatever their kind: how one is asked for, known again and answered.

In the journal and on a slot's socket a request or an answer is an object of JSON that names its kind. What
the kinds are, and what the objects hold, is said in `mvmci.engines.embedded.effects`, a file for each.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

import msgspec

Fields = dict[str, Any]  # a request or an answer as JSON has it, with its `kind`
Pairs = tuple[tuple[str, str], ...]

_encode = msgspec.json.Encoder().encode


class Value(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """Base of requests and answers. What is absent is the zero of its type: no default may be another."""

    def fields(self) -> Fields:
        """As it stands in the journal."""
        fields: Fields = msgspec.json.decode(_encode(self))
        return fields


class Request(Value, frozen=True, kw_only=True):
    """Base of requests. The tag of a kind is the name of its function in the workflow world."""

    # Whether it reaches beyond the engine: then its intent is on disk before it begins.
    outside: ClassVar[bool] = True

    @property
    def idempotent(self) -> bool:
        """Whether it may be done again if nobody knows whether it was."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return str(self.__struct_config__.tag)

    def digest(self) -> str:
        """The hex SHA-256, by which a replay knows it again."""
        return hashlib.sha256(_encode(self)).hexdigest()

    def line(self) -> str:
        """What a person can tell it by."""
        raise NotImplementedError

    def redacted(self) -> Request:
        """As it may be kept and shown."""
        return self


class Error(Value, frozen=True, kw_only=True, tag="error"):
    """The `effect-error` of the workflow world."""

    why: Literal["interrupted", "timed-out", "denied", "lost", "failed"]
    text: str = ""


def idempotency_key(job: str, index: int) -> str:
    """The key of effect `index` of `job`, the same for every holder (docs/protocol.md §2)."""
    return hashlib.sha256(f"{job}/{index}".encode()).hexdigest()
