"""A short cut past the client library's parser, for subscriptions that take their messages as they come.

The library takes each message through a regular expression, a queue and a task, three times the work of
all else on the way. What it takes itself may not be mixed with what goes the short way: a message that
went through its queue would be overtaken by the next that did not, and a reader would see a gap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

log = logging.getLogger(__name__)


class Parser(Protocol):
    """What a connection asks of its parser."""

    def reset(self) -> None:
        """Another connection begins."""

    async def parse(self, data: bytes = b"") -> None:
        """Take in the next bytes."""


class Incoming:
    """A message: an answer, a delivery or a word. Nobody reads the headers of most: they are cut up late."""

    __slots__ = ("_head", "_headers", "data", "reply", "subject")

    def __init__(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None = None,
        reply: str = "",
        *,
        head: bytes = b"",
    ) -> None:
        """`head` is what stands before the data, as it was sent, where `headers` is absent."""
        self.subject = subject
        self.data = data
        self.reply = reply
        self._headers = headers
        self._head = head

    @property
    def headers(self) -> dict[str, str]:
        if self._headers is None:
            self._headers = _headers(self._head)
        return self._headers

    @property
    def status(self) -> str:
        return "" if self.data else self.headers.get("Status", "")


class ShortCut:
    """Stands where the client library has its parser, and gives the messages of `takes` out itself.

    `takes` has the subscriptions' numbers. `library` gets whatever else comes, whole and one at a time.
    """

    def __init__(self, library: Parser, takes: Mapping[bytes, Callable[[Incoming], None]]) -> None:
        self._library = library
        self._takes = takes
        self.partial = 0  # counts the bytes that came for messages which were not whole with them
        self._buffer = bytearray()
        self._whole = 0  # bytes that are there once what `_buffer` begins with is whole; 0: nobody knows yet

    def reset(self) -> None:
        """Forget what is not whole: another connection begins."""
        self._buffer.clear()
        self._library.reset()

    async def parse(self, data: bytes = b"") -> None:
        """Take in the next bytes of the connection."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._whole:
                self.partial += len(data)
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        at = self._take(data, 0)
        while 0 < self._whole <= len(data) - at:
            other = data[at : at + self._whole]
            await self._library.parse(other)
            at = self._take(data, at + len(other))
        self._buffer += data[at:]
        self.partial += len(self._buffer)

    def _take(self, data: bytes, at: int) -> int:
        """Give out the messages that come at `at`; where what is not one of ours begins, or not whole."""
        self._whole = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            words = data[at:end].split() or [b""]
            # MSG <subject> <number> [reply] <bytes>, HMSG <subject> <number> [reply] <bytes of head> <bytes>
            headed = words[0] == b"HMSG"
            is_message = headed or words[0] == b"MSG"
            begin = end + 2
            whole = begin + int(words[-1]) + 2 if is_message else begin
            take = self._takes.get(words[2]) if is_message else None
            if take is None or len(data) < whole:
                self._whole = whole - at
                break
            middle = begin + int(words[-2]) if headed else begin
            reply = _text(words[3]) if len(words) == (6 if headed else 5) else ""
            message = Incoming(
                _text(words[1]), data[middle : whole - 2], reply=reply, head=data[begin:middle]
            )
            at = whole
            try:
                take(message)
            except Exception:
                log.exception("a message on %s could not be taken", message.subject)
        return at


def _text(subject: bytes) -> str:
    """Nothing that comes may stop the reading."""
    return subject.decode("utf-8", "replace")


def _headers(head: bytes) -> dict[str, str]:
    """What stands in `NATS/1.0[ status[ description]]`, and a line for each header after it."""
    first, *lines = head.decode("utf-8", "replace").split("\r\n")
    _, _, said = first.partition(" ")
    headers = {}
    if said:
        status, _, description = said.partition(" ")
        headers = {"Status": status, "Description": description}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    return headers
