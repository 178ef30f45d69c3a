"""What crosses the socket pair between a slot and its parent.

A frame is four bytes of length, little endian, and that many bytes of JSON. The parent treats what a
slot sends as hostile: a frame is bounded, typed and decoded by msgspec, and anything else kills the
slot. A slot runs one task at a time; the parent speaks first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

FRAME_BYTES_MAX = 32 << 20  # an answer of `exec` comes to 18 MiB at most, one of `http` to less
LENGTH_BYTES = 4


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame"):
    """Base of all frames."""


# From the parent to a slot. Paths are relative to the root directory that the fork server was given.


class Compile(Frame, frozen=True, kw_only=True, tag="compile"):
    """Compile the module behind the first fd passed at the fork, write the code to the second.

    With `look` it is only seen whether it can be: nothing is written, and of a core module nothing compiled.
    """

    component: bool
    look: bool = False
    workflow: bool  # with fuel and canonical NaNs; only components are workflows


class RunCommand(Frame, frozen=True, kw_only=True, tag="command"):
    """Run a WASI program. Its three streams are the fds passed at the fork."""

    code: str
    component: bool
    args: tuple[str, ...]  # argv[0] included
    env: tuple[tuple[str, str], ...]
    workspace: str
    tmp: str  # empty: what the guest finds at /tmp is the workspace's own
    memory_bytes: int


class RunWorkflow(Frame, frozen=True, kw_only=True, tag="workflow"):
    """Run a component of world `mvmci:workflow/workflow` from its beginning."""

    code: str
    input: str
    memory_bytes: int
    fuel: int
    seed: int
    now_ms: int


class RunProgram(Frame, frozen=True, kw_only=True, tag="program"):
    """Run a native program in a process tree of its own. Its streams are the fds passed at the fork."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    directory: str
    processes_max: int
    file_bytes: int
    hidden: str = ""  # a folder that it must not see, where it has our own user; "" for none


class Answer(Frame, frozen=True, kw_only=True, tag="answer"):
    """The result of the call that a workflow waits in; `now_ms` is the time of the record behind it."""

    now_ms: int
    value: dict[str, Any]  # an answer as the journal has it


# From a slot to its parent.


class Call(Frame, frozen=True, kw_only=True, tag="call"):
    """A workflow asks for an effect and waits for an `Answer`."""

    request: dict[str, Any]  # its `kind` is the function's name; the rest is what was passed


class Log(Frame, frozen=True, kw_only=True, tag="log"):
    """A workflow says something. No answer."""

    level: Literal["debug", "info", "warning", "error"]
    message: str


class Respond(Frame, frozen=True, kw_only=True, tag="respond"):
    """A workflow gives its early answer. No answer."""

    value: str


class ReportProgress(Frame, frozen=True, kw_only=True, tag="progress"):
    """A workflow says how far it is. No answer."""

    done: int
    total: int
    message: str


NO_MEMORY = (
    "compiling it takes more memory than is allowed"  # `host`, where it is allowed less than elsewhere
)


class Ended(Frame, frozen=True, kw_only=True, tag="ended"):
    """How the task ended.

    `ok`: a workflow returned ok (`text` is its JSON), a command ended with code 0, compiling worked.
    `err`: a workflow returned err (`text` is its reason). `exit`: a command or program ended with
    `code`. `trap`: the guest trapped; `limit` names the limit if it was one (`memory`, `stack`,
    `fuel`). `signal`: a program died of signal `code`. `limit`: a program was stopped at `limit`
    (`processes`). `invalid`: not something that this engine runs (`text` says why). `host`: this host
    refused what every guest needs, and what it refused is no fault of this one (`text` says what).
    """

    outcome: Literal["ok", "err", "exit", "trap", "signal", "limit", "invalid", "host"]
    code: int | None = None
    text: str = ""
    limit: str | None = None


ToSlot = Compile | RunCommand | RunWorkflow | RunProgram | Answer
ToParent = Call | Log | Respond | ReportProgress | Ended

_encoder = msgspec.json.Encoder()
to_slot: msgspec.json.Decoder[ToSlot] = msgspec.json.Decoder(ToSlot)
to_parent: msgspec.json.Decoder[ToParent] = msgspec.json.Decoder(ToParent)


def encode(frame: Frame) -> bytes:
    """`frame` with its length in front. Raises ValueError over `FRAME_BYTES_MAX`."""
    body = _encoder.encode(frame)
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {FRAME_BYTES_MAX}")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class Splitter:
    """Cuts a byte stream into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that `data` completes. Raises ValueError on a length over `FRAME_BYTES_MAX`."""
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            size = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
            if size > FRAME_BYTES_MAX:
                raise ValueError(f"a frame of {size} bytes is over the limit of {FRAME_BYTES_MAX}")
            end = LENGTH_BYTES + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield body
