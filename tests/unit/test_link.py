"""Messages are the same however the bytes of a connection come."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nats.aio.client import Client
from nats.protocol.parser import Parser

from mvmci.errors import MvmciError
from mvmci.stores.nats import link
from mvmci.stores.nats.link import Link
from mvmci.stores.nats.parser import Incoming, ShortCut

HEAD = b"NATS/1.0\r\nNats-Sequence: 7\r\nOf-Two:  words here \r\n\r\n"
NO_MESSAGES = b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 3\r\n\r\n"
STREAM = (
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"MSG a.b 1 reply.to 0\r\n\r\n"
    b"HMSG a.c 1 reply.to %d %d\r\n%s{}\r\n\r\n"
    % (len(HEAD), len(HEAD) + 4, HEAD + b"")
    + b"MSG other 2 2\r\n\r\n\r\n"
    + b"HMSG in 1 %d %d\r\n%s\r\n" % (len(NO_MESSAGES), len(NO_MESSAGES), NO_MESSAGES)
    + b"MSG a.d 1 20000\r\n%s\r\n" % (b"MSG " * 5000)
    + b"MSG a.e 1 1\r\nx\r\n"
)
TAKEN = [
    ("a.b", b"hello", "", {}),
    ("a.b", b"", "reply.to", {}),
    ("a.c", b"{}\r\n", "reply.to", {"Nats-Sequence": "7", "Of-Two": "words here"}),
    ("in", b"", "", {"Status": "408", "Description": "Request Timeout", "Nats-Pending-Messages": "3"}),
    ("a.d", b"MSG " * 5000, "", {}),
    ("a.e", b"x", "", {}),
]


@pytest.mark.parametrize("subject", ["a b", "a\r\nPUB b 0", "a\tb", "a "])
async def test_a_subject_that_would_be_a_command_is_never_sent(subject: str) -> None:
    with pytest.raises(MvmciError, match="is no subject"):
        await Link("nats://127.0.0.1:1", "test").publish(subject)


async def test_who_gives_up_is_let_go_though_the_library_loses_a_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[bool] = []
    began = asyncio.Event()

    async def dial(self: Client) -> None:
        began.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append(True)

    monkeypatch.setattr(link, "CLOSE_S", 0.01)
    monkeypatch.setattr(link._Client, "_select_next_server", dial)
    opening = asyncio.create_task(Link("nats://127.0.0.1:1", "test").open())
    await began.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert lost


async def test_a_round_trip_is_behind_all_that_was_to_be_sent_before() -> None:
    """Else the server may not have heard of a subscription, or of its end, when it has answered."""
    there, sent = Link("nats://127.0.0.1:1", "test"), list[bytes]()
    client: Any = there._client
    client._transport = SimpleNamespace(write=sent.append, writelines=sent.extend)
    client._flush_queue, client._flusher_task = asyncio.Queue(), asyncio.get_running_loop().create_future()
    client._status = Client.CONNECTED
    await client._send_command(b"UNSUB 7\r\n")
    trip = asyncio.create_task(there.round_trip())
    while not client._pongs:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0)
    await client._process_pong()
    assert await trip
    assert sent == [b"UNSUB 7\r\n", b"PING\r\n"]
    assert (client._pending, client._pongs) == ([], [])


async def test_there_is_no_round_trip_where_nobody_is_connected() -> None:
    assert not await Link("nats://127.0.0.1:1", "test").round_trip()


class Library:
    """What the library does with the rest: it must never see a message that is taken."""

    def __init__(self) -> None:
        self.pings = 0
        self.others: list[tuple[bytes, bytes]] = []

    async def _process_ping(self) -> None:
        self.pings += 1

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        assert sid == 2
        self.others.append((subject, data))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 997, 4096, len(STREAM)])
async def test_messages_are_the_same_however_their_bytes_come(size: int) -> None:
    library, taken = Library(), list[Incoming]()
    parser = ShortCut(Parser(cast(Client, library)), {b"1": taken.append})
    for start in range(0, len(STREAM), size):
        await parser.parse(STREAM[start : start + size])
    assert [(one.subject, one.data, one.reply, one.headers) for one in taken] == TAKEN
    assert [one.status for one in taken] == ["", "", "", "408", "", ""]
    assert library.pings == 1
    assert library.others == [(b"other", b"\r\n")]


async def test_what_cannot_be_taken_stops_nothing() -> None:
    library, taken = Library(), list[Incoming]()
    fails = itertools.chain([True], itertools.repeat(False))

    def take(reply: Incoming) -> None:
        taken.append(reply)
        if next(fails):
            raise ValueError

    parser = ShortCut(Parser(cast(Client, library)), {b"1": take})
    await parser.parse(b"MSG a 1 0\r\n\r\nMSG b 1 0\r\n\r\n")
    assert [one.subject for one in taken] == ["a", "b"]
