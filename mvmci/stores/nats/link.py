"""One connection to a broker: requests, paged reads, subscriptions. The only module that imports nats.

Answers come to an inbox of our own, so that every wait ends: with the answer, when the connection
breaks, or when its time is up. While disconnected nothing is sent; but what was given to the client
library just before a break may still be sent after it, so a write without an answer may land late.
Waits are bounded by `asyncio.timeout` throughout: before Python 3.12, `wait_for` can lose a cancellation.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import logging
import re
import ssl
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from mvmci.cluster.identity import TLS_NAME, Login
from mvmci.errors import MvmciError, NoAnswer, StoreUnavailable, TicketRefused
from mvmci.stores.nats.dial import first_to_answer
from mvmci.stores.nats.parser import Incoming, ShortCut
from mvmci.stores.nats.window import Window
from mvmci.system.tasks import TaskSet, to_its_end

# The library would load aiohttp for websockets, which nobody speaks here: 0.1 s and 10 MB of each process.
_hidden = {"aiohttp": None} if "aiohttp" not in sys.modules else {}
sys.modules |= _hidden  # type: ignore[arg-type]
import nats  # noqa: E402
from nats.aio.client import Client  # noqa: E402
from nats.aio.msg import Msg  # noqa: E402
from nats.aio.subscription import Subscription  # noqa: E402

for _name in _hidden:
    del sys.modules[_name]

T = TypeVar("T")

ANSWER_S = 5.0
TRANSFER_STALL_S = 20.0  # without anything that arrives; the connection itself is given up after 30
_CONNECT_S = 5.0
RECONNECT_PAUSE_S = 0.2
CLOSE_S = 2.0
PING_EVERY_S = 10
PINGS_OUT_MAX = 2
EVERYTHING = ">"  # as a subject, all of a stream: the server need not look at each message's own then
READ_MESSAGES = 1_000  # of one page
LASTS_MAX = 500  # the server answers for up to 1,024
READ_STALL_S = 2.0
READ_TRIES = 3  # pages in a row that bring nothing new
READ_PAUSE_S = 0.2
LOOK_AGAIN_S = (0.002, 0.01, 0.05, 0.2)  # after a word of a message: it may not be stored yet
LOOK_EVERY_S = 2.0  # a word may be lost
REFUSALS_MAX = 3  # in a row, of reconnecting: a broker that is only starting is not one

_PARTS = re.compile(r"[ \t\r\n]")  # what parts the words of the protocol
# Of a credential. 'Authentication Timeout' is none: who was too slow to show one may try again.
REFUSALS = ("authorization violation", "revoked", "expired")


class NoStream(StoreUnavailable):
    """Nobody answers on that subject: the stream is not there, or not yet. Nothing was stored."""


class ApiError(StoreUnavailable):
    """JetStream said no, with a code. Nothing was stored."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"the broker refused: {description} ({code})")
        self.code = code


class Stored:
    """A message of a stream."""

    __slots__ = ("_reply", "data", "seq", "subject")

    def __init__(self, reply: Incoming) -> None:
        self.seq = int(reply.headers["Nats-Sequence"])
        self.subject = reply.headers["Nats-Subject"]
        self.data = reply.data
        self._reply = reply

    @property
    def headers(self) -> dict[str, str]:
        return self._reply.headers


Unsubscribe = Callable[[], Coroutine[Any, Any, None]]
_Answer = Callable[[Incoming | None], None]  # None: the connection broke


class _Client(Client):
    """The library's, which would dial one address after the other, and wait for each."""

    async def _select_next_server(self) -> None:
        pool = self._server_pool
        if len(pool) > 1:
            places = [(server.uri.hostname or "", server.uri.port or 0) for server in pool]
            try:
                first = await first_to_answer(places, self.options.get("tls"))
            except ssl.SSLCertVerificationError as stranger:
                await self._error_cb(stranger)
                raise
            if first is not None:
                pool.insert(0, pool.pop(first))
        await super()._select_next_server()


class Link:
    """A connection that comes back by itself, unless its credential is refused.

    `refused` is set once it will never come back, with the reason in `failure`.
    """

    def __init__(self, login: Login | str, name: str) -> None:
        self.login = Login(urls=(login,)) if isinstance(login, str) else login
        self.url = ", ".join(self.login.urls)
        self.on_reconnect: list[Callable[[], None]] = []
        self.refused = asyncio.Event()
        self.failure: MvmciError | None = None
        self._name = name
        self._client = _Client()
        self._takes: dict[bytes, Callable[[Incoming], None]] = {}  # of each subscription, by its number
        self._parser = ShortCut(self._client._ps, self._takes)
        self._client._ps = self._parser  # type: ignore[assignment]
        self._window = Window()  # of what is sent
        self._pages = Window()  # of what is asked for
        self._answers: dict[str, _Answer] = {}
        self._tokens = itertools.count()
        self._serving = TaskSet()
        self._inbox = ""
        self._refusals = 0
        self._up = asyncio.Event()
        self._closed = False

    async def open(self) -> None:
        """Connect. Raises StoreUnavailable, TicketRefused."""
        # The library would go on trying for ever, also against a server that says no.
        connecting = asyncio.ensure_future(self._connect())
        refused = asyncio.ensure_future(self.refused.wait())
        try:
            await asyncio.wait([connecting, refused], timeout=_CONNECT_S, return_when="FIRST_COMPLETED")
            if not connecting.done():
                raise TimeoutError
            connecting.result()
        except BaseException as error:
            # The library waits by `wait_for`, which can lose a cancellation before Python 3.12, and then it
            # tries for ever.
            while not connecting.done():
                connecting.cancel()
                await asyncio.wait([connecting], timeout=CLOSE_S)
            await self.close()
            if not isinstance(error, TimeoutError | OSError | nats.errors.Error):
                raise
            said = error if _is_refusal(error) else self._client.last_error
            if self._refusals or _is_refusal(said):
                raise self.failure or self._refusal(said) from error
            raise StoreUnavailable(
                f"no broker answers at {self.url}", hint="see that it runs and can be reached from here"
            ) from error
        finally:
            refused.cancel()
        self._up.set()

    async def _connect(self) -> None:
        """A server may let us in and then say that it does not: the first subscription finds that out."""
        await self._client.connect(
            list(self.login.urls),
            name=self._name,
            connect_timeout=2,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_PAUSE_S,  # type: ignore[arg-type]
            ping_interval=PING_EVERY_S,
            max_outstanding_pings=PINGS_OUT_MAX,
            inbox_prefix=self.login.inbox,
            error_cb=self._failed,
            disconnected_cb=self._went_down,
            reconnected_cb=self._came_back,
            closed_cb=self._ended,
            discovered_server_cb=_nothing,
            dont_randomize=True,  # the first is the one that answered last
            lame_duck_mode_cb=_nothing,
            skip_subject_validation=True,  # `publish` looks for what could do harm
            **self._trust(),
        )
        self._inbox = self._client.new_inbox()
        await self._subscribe(f"{self._inbox}.*", self._take)
        self._put_first()

    def _put_first(self) -> None:
        """Let the address that answered stand first in `login`, for whoever keeps that."""
        dialled = self._client.connected_url
        here = [
            url for url in self.login.urls if dialled is not None and urlsplit(url).netloc == dialled.netloc
        ]
        urls = tuple(dict.fromkeys([*here, *self.login.urls]))
        self.login = msgspec.structs.replace(self.login, urls=urls)

    def _trust(self) -> dict[str, Any]:
        """Who we trust, and what we show: read anew at each connect, so that it can be renewed."""
        settings: dict[str, Any] = {}
        if self.login.ca:
            logging.getLogger("asyncio").addFilter(_worth_saying)
            context = ssl.create_default_context(cadata=self.login.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            settings |= {"tls": context, "tls_hostname": TLS_NAME, "tls_handshake_first": True}
        if self.login.seed:
            settings["user_jwt_cb"] = lambda: self.login.jwt.encode()
            settings["signature_cb"] = self._sign
        return settings

    def _sign(self, nonce: str) -> bytes:
        from mvmci.system.keys import sign

        return base64.b64encode(sign(self.login.seed, nonce.encode()))

    async def renew(self, login: Login) -> None:
        """Go on under a newer credential: the server would cut a connection whose old one expires."""
        self.login = login
        await self._client.force_reconnect()

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._up.is_set()

    def inbox(self) -> str:
        """A subject that nobody else uses."""
        return self._client.new_inbox()

    async def close(self) -> None:
        """Close, also where the caller is cancelled: left half closed, the library keeps its tasks."""
        await to_its_end(self._close())

    async def _close(self) -> None:
        self._closed = True
        self._up.clear()
        await self._serving.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._client.close()
        except (TimeoutError, OSError, RuntimeError, nats.errors.Error):
            pass  # nothing more could be lost; uvloop calls it a RuntimeError that the other side has closed
        finally:
            self._let_go()  # the library does so only if all went well
        self._give_up()

    def _let_go(self) -> None:
        if self._client._transport is not None:
            self._client._transport.close()  # type: ignore[no-untyped-call]

    async def publish(
        self, subject: str, data: bytes = b"", *, headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        """Send, and wait for nothing. Raises StoreUnavailable when it surely was not sent."""
        if _PARTS.search(subject):  # what follows would be a command of its own
            raise MvmciError(f"{subject[:80]!r} is no subject")
        await self._be_up()
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (OSError, nats.errors.Error) as error:
            raise NoAnswer(f"the broker at {self.url} went away: {error}") from error

    def expect(self) -> tuple[str, asyncio.Future[Incoming]]:
        """A subject for one answer, and the answer to come."""
        token = str(next(self._tokens))
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._answers.pop(token, None))

        def take(reply: Incoming | None) -> None:
            if answer.done():
                return
            if reply is None:
                answer.set_exception(NoAnswer(f"the broker at {self.url} went away"))
            elif reply.status == "503":
                answer.set_exception(NoStream(f"the broker at {self.url} has no stream for this"))
            else:
                answer.set_result(reply)

        self._answers[token] = take
        return f"{self._inbox}.{token}", answer

    async def answer(self, answer: asyncio.Future[Incoming], wait_s: float = ANSWER_S) -> Incoming:
        """Raises NoAnswer, NoStream."""
        try:
            async with asyncio.timeout(wait_s):
                return await answer
        except TimeoutError:
            raise NoAnswer(f"the broker at {self.url} did not answer within {wait_s:.0f} s") from None

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        wait_s: float = ANSWER_S,
    ) -> dict[str, Any]:
        """Send and take JetStream's answer: its JSON. Raises NoAnswer, NoStream, ApiError."""
        to, answer = self.expect()
        try:
            await self.publish(subject, data, headers=headers, reply=to)
            return accepted(await self.answer(answer, wait_s))
        finally:
            answer.cancel()

    async def request_all(self, subject: str, pieces: Iterable[bytes]) -> None:
        """Send `pieces` in order, as many at a time as pass in a moment, and see that each is taken.

        It may take as long as it takes while the line carries something. Raises as `request`.
        """
        answers: deque[asyncio.Future[Incoming]] = deque()
        try:
            for piece in pieces:
                answers.append(await self._begin(subject, piece))
                while answers[0].done() and len(answers) > 1:
                    accepted(answers.popleft().result())
            while answers:
                waiting = functools.partial(asyncio.shield, answers[0])
                accepted(await self._while_it_moves(waiting))
                answers.popleft()
        finally:
            for answer in answers:
                answer.cancel()

    async def _begin(self, subject: str, piece: bytes) -> asyncio.Future[Incoming]:
        begun = await self._while_it_moves(lambda: self._window.reserve(len(piece)))
        to, answer = self.expect()

        def over(answer: asyncio.Future[Incoming]) -> None:
            came = not answer.cancelled() and answer.exception() is None
            self._window.release(len(piece), begun if came else None)

        answer.add_done_callback(over)
        try:
            await self.publish(subject, piece, reply=to)
        except BaseException:
            answer.cancel()
            raise
        return answer

    async def _while_it_moves(self, wait: Callable[[], Awaitable[T]]) -> T:
        """What `wait` returns; it is given up only once nothing has arrived for `TRANSFER_STALL_S`."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            try:
                async with asyncio.timeout(TRANSFER_STALL_S):
                    return await wait()
            except TimeoutError:
                if self._window.moved_at < begun:
                    raise NoAnswer(
                        f"the broker at {self.url} took nothing for {TRANSFER_STALL_S:.0f} s"
                    ) from None

    async def api(self, verb: str, **body: Any) -> dict[str, Any]:
        """Ask the JetStream API. Raises as `request`."""
        data = msgspec.json.encode(body) if body else b""
        return await self.request(f"{self.login.api or '$JS.API'}.{verb}", data)

    async def call(self, subject: str, data: bytes = b"", *, wait_s: float = ANSWER_S) -> bytes:
        """One request to whoever serves `subject`, and its answer. Raises NoStream when nobody does."""
        to, answer = self.expect()
        try:
            await self.publish(subject, data, reply=to)
            return (await self.answer(answer, wait_s)).data
        finally:
            answer.cancel()

    async def serve(
        self,
        subject: str,
        handler: Callable[[str, bytes], Awaitable[bytes]],
        is_asker: Callable[[str, str], bool],
        group: str = "",
    ) -> Unsubscribe:
        """Answer requests on `subject` with what `handler(subject, data)` returns; one of `group` does.

        Only where `is_asker(subject, reply)`: who asks may name any `reply`, and is answered with our rights.
        """

        async def answer(message: Msg) -> None:
            await self.publish(message.reply, await handler(message.subject, message.data))

        async def begin(message: Msg) -> None:
            if message.reply and is_asker(message.subject, message.reply):
                answering = self._serving.start(answer(message), name=f"answer {subject}")
                answering.add_done_callback(self._served)

        await self._be_up()
        subscription = await self._client.subscribe(subject, queue=group, cb=begin)
        return lambda: self._unsubscribe(subscription)

    def _served(self, task: asyncio.Task[None]) -> None:
        """That the broker went away needs no telling; whoever asked asks again. A bug ends the link."""
        failure = None if task.cancelled() else task.exception()
        if failure is not None and not isinstance(failure, StoreUnavailable):
            self._over(MvmciError(f"a request could not be answered: {failure!r}"))

    async def subscribe(self, subject: str, take: Callable[[Incoming], None], group: str = "") -> Unsubscribe:
        """Give every message on `subject` to `take`, until what is returned is called.

        Each message goes to one of a `group` only, so that none may be dropped when one leaves it.
        """
        await self._be_up()
        subscription = await self._subscribe(subject, take, group)
        return lambda: self._unsubscribe(subscription, drain=bool(group))

    async def _subscribe(
        self, subject: str, take: Callable[[Incoming], None], group: str = ""
    ) -> Subscription:
        """Without a callback, because the parser gives the messages out itself."""
        subscription = await self._client.subscribe(subject, queue=group)
        self._takes[b"%d" % subscription._id] = take
        return subscription

    async def read(
        self, stream: str, subject: str, after: int = 0, *, size: int = 0
    ) -> AsyncIterator[Stored]:
        """The messages of `stream` on `subject` with a sequence over `after`, in order, page by page.

        What has a `size` in bytes is asked for as much at a time as passes in a moment.
        A reply that stalls is asked for again from where it stopped. Raises StoreUnavailable.
        """
        tries = 0
        while True:
            ask = {
                "seq": after + 1,
                "next_by_subj": subject,
                "batch": READ_MESSAGES,
                "max_bytes": self._pages.size,
            }
            reserved = min(size, self._pages.size)
            begun, more = await self._pages.reserve(reserved), False
            try:
                page, more = await self._page(stream, ask)
            finally:
                self._pages.release(reserved, begun if reserved or more else None)
            size -= reserved
            for stored in page:
                yield stored
            if not more:
                return
            after = page[-1].seq if page else after
            tries = 0 if page else tries + 1
            if tries >= READ_TRIES:
                raise StoreUnavailable(f"the broker at {self.url} does not answer reads of {stream}")
            if not page:
                await asyncio.sleep(READ_PAUSE_S)

    async def follow(
        self, stream: str, subject: str, word_on: str, after: int = 0
    ) -> AsyncGenerator[Stored, None]:
        """What `stream` has on `subject` after `after`, and what comes.

        A word on `word_on` that a message was stored only says when to look: what is read may not show it
        yet, and a word may be lost. So there are more looks while more were heard of than found.
        """
        word = asyncio.Event()
        heard, found = 1, 0  # as if somebody had said so: what was sent before we listened may come late, too
        first = True

        def hear(_: Incoming) -> None:
            nonlocal heard
            heard += 1
            word.set()

        unsubscribe = await self.subscribe(word_on, hear)
        try:
            pauses = iter(LOOK_AGAIN_S)
            while True:
                word.clear()
                async for message in self.read(stream, subject, after):
                    after = message.seq
                    found = min(found + 1, heard)
                    yield message
                if first:
                    found, first = 0, False  # that was there already
                if found == heard:
                    word.clear()
                pause_s = next(pauses, None) if found < heard else None
                try:
                    async with asyncio.timeout(LOOK_EVERY_S if pause_s is None else pause_s):
                        await word.wait()
                    pauses = iter(LOOK_AGAIN_S)
                except TimeoutError:
                    found = heard if pause_s is None else found
        finally:
            await unsubscribe()

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The last message on the literal `subject`. Raises StoreUnavailable."""
        return await self._get(stream, last_by_subj=subject)

    async def first(self, stream: str, subject: str) -> Stored | None:
        """The first message on `subject`, which may have wildcards. Raises StoreUnavailable."""
        for _ in range(READ_TRIES):
            page, more = await self._page(stream, {"seq": 1, "next_by_subj": subject, "batch": 1})
            if page or not more:
                return page[0] if page else None
            await asyncio.sleep(READ_PAUSE_S)
        raise StoreUnavailable(f"the broker at {self.url} does not answer reads of {stream}")

    async def at(self, stream: str, seq: int) -> Stored | None:
        """The message with that sequence. Raises StoreUnavailable."""
        return await self._get(stream, seq=seq)

    async def _get(self, stream: str, **which: Any) -> Stored | None:
        to, answer = self.expect()
        try:
            await self.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(which), reply=to)
            reply = await self.answer(answer)
        finally:
            answer.cancel()
        return None if reply.status else Stored(reply)

    async def lasts(self, stream: str, subjects: Sequence[str]) -> dict[str, Stored]:
        """The last message on each of the literal `subjects` that has one, in one answer.

        There may be `LASTS_MAX` of them. Raises StoreUnavailable.
        """
        assert 0 < len(subjects) <= LASTS_MAX
        for _ in range(READ_TRIES):
            page, more = await self._page(stream, {"multi_last": subjects})
            if not more:
                return {stored.subject: stored for stored in page}
            await asyncio.sleep(READ_PAUSE_S)
        raise StoreUnavailable(f"the broker at {self.url} does not answer reads of {stream}")

    async def _page(self, stream: str, ask: dict[str, Any]) -> tuple[list[Stored], bool]:
        """Up to a page of messages, and whether there may be more."""
        token = str(next(self._tokens))
        replies: asyncio.Queue[Incoming | None] = asyncio.Queue()
        self._answers[token] = replies.put_nowait
        page: list[Stored] = []
        try:
            await self.publish(
                f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(ask), reply=f"{self._inbox}.{token}"
            )
            while True:
                reply = await self._next(replies)
                if reply is None or reply.status == "503":
                    return page, True
                if reply.status == "404":
                    return page, False
                if reply.status == "204":
                    return page, reply.headers.get("Nats-Num-Pending", "0") != "0"
                if reply.status:
                    raise StoreUnavailable(f"the broker refused to read {stream}: {reply.headers}")
                page.append(Stored(reply))
        except TimeoutError:
            return page, True
        finally:
            self._answers.pop(token, None)

    async def _next(self, replies: asyncio.Queue[Incoming | None]) -> Incoming | None:
        """The next reply. One that is large may take long, as long as its bytes come. Raises TimeoutError."""
        while True:
            before = self._parser.partial
            try:
                async with asyncio.timeout(READ_STALL_S):
                    return await replies.get()
            except TimeoutError:
                if self._parser.partial == before:
                    raise

    async def _be_up(self) -> None:
        if self._client.is_closed and not self._closed and self.failure is None:
            await self._ended()  # the library failed while it closed, and told nobody
        if self._up.is_set():
            return
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise StoreUnavailable("the store was closed")
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._up.wait()
        except TimeoutError:
            raise StoreUnavailable(
                f"the broker at {self.url} cannot be reached",
                hint="see that it runs; work goes on when it is back",
            ) from None

    async def _unsubscribe(self, subscription: Subscription, *, drain: bool = False) -> None:
        """With `drain`, what the server sent before it heard of this is still given out."""
        try:
            await subscription.unsubscribe()
            if drain:
                await self.round_trip()
        except (OSError, nats.errors.Error):
            pass  # the connection is gone, and the subscription with it
        finally:
            self._takes.pop(b"%d" % subscription._id, None)

    async def round_trip(self) -> bool:
        """Until all has come that the server sent before it heard this; whether it answered.

        The library's `flush` cancels what it waits for when it is given up, and an answer that comes all the
        same then ends the library's reading for good. Its ping overtakes what is yet to be sent.
        """
        pong, client = asyncio.get_running_loop().create_future(), self._client
        try:
            if not client.is_connected or client._transport is None:
                return False
            client._transport.writelines(client._pending)
            client._pending, client._pending_data_size = [], 0
            await client._send_ping(pong)
        except (OSError, RuntimeError, nats.errors.Error):  # the second is uvloop's, of one that was closed
            return False
        return bool((await asyncio.wait([pong], timeout=ANSWER_S))[0])

    def _take(self, reply: Incoming) -> None:
        take = self._answers.get(reply.subject.rpartition(".")[2])
        if take is not None:
            take(reply)

    async def _went_down(self) -> None:
        self._up.clear()
        self._give_up()

    async def _came_back(self) -> None:
        self._refusals = 0
        self._up.set()
        for call in self.on_reconnect:
            call()

    async def _failed(self, error: Exception) -> None:
        """What the library reports here shows as a missing answer to whoever waits for one.

        A connection that came to nothing it would forget, open as it is, and make the next.
        """
        if not self._client.is_connected:
            self._let_go()
        if not self._up.is_set() and _is_refusal(error):
            self._refusals += 1 if self._inbox else REFUSALS_MAX  # without one, it was never let in
            if self._refusals >= REFUSALS_MAX:
                self._over(self._refusal(error))

    async def _ended(self) -> None:
        """The library gave up: the server said why, and closed the connection."""
        await self._went_down()
        if not self._closed:
            error = self._client.last_error
            lost = StoreUnavailable(f"the broker at {self.url} closed the connection: {error}")
            self._over(self._refusal(error) if _is_refusal(error) else lost)

    def _refusal(self, error: BaseException | None) -> TicketRefused:
        """What it means that this connection was refused, by the server or by us."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return TicketRefused(
                f"what answers at {self.url} is not the broker that this credential is for",
                hint="another CA vouches for it: get a new ticket from that cluster, if it was made anew",
            )
        return TicketRefused(
            f"the broker at {self.url} refuses the credential",
            hint="it was revoked or has expired: enrol again with a new ticket",
        )

    def _over(self, failure: MvmciError) -> None:
        if self.failure is None:
            self.failure = failure
        self.refused.set()
        self._give_up()

    def _give_up(self) -> None:
        for take in list(self._answers.values()):
            take(None)


async def _nothing() -> None:
    pass


def _worth_saying(record: logging.LogRecord) -> bool:
    """The client library turns a plain stream into one with TLS, of which asyncio warns at its every end."""
    return "eof_received" not in str(record.msg)


def _is_refusal(error: BaseException | None) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    return any(word in str(error).lower() for word in REFUSALS)


def accepted(reply: Incoming) -> dict[str, Any]:
    """The JSON of an answer of JetStream. Raises ApiError."""
    try:
        answer = msgspec.json.decode(reply.data, type=dict[str, Any])
    except msgspec.DecodeError:
        raise NoAnswer(f"the broker answered {reply.data[:80]!r}") from None
    error = answer.get("error")
    if error:
        raise ApiError(error.get("err_code", error.get("code", 0)), error.get("description", ""))
    return answer
