"""The agent of a host, asked from here: `mvmci host` at the other end of a channel."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import msgspec

from mvmci import errors
from mvmci.errors import HostAway, MvmciError
from mvmci.runtime import why_ended
from mvmci.runtimes.local.agent import SILENT_S, Answer, Ask, Failure, Request
from mvmci.runtimes.local.messages import Stop
from mvmci.runtimes.ssh.channel import Channel, Ran
from mvmci.system.tasks import cancel

SIGNALS = 128  # and the number of one, as the exit code of what it ended
ANSWER_S = 60.0  # for whatever an agent does by itself
UNPACK_S = 150.0  # more for its first word: it may wait 120 s for another of its program that unpacks it
T = TypeVar("T")
_SENSELESS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_answers = msgspec.json.Decoder(Answer)


class AgentClient:
    """One agent. Whatever is asked raises MvmciError: the agent's own, or that the host is gone."""

    def __init__(self, host: str, channel: Channel) -> None:
        self.host = host
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Answer | MvmciError]] = {}
        self._gone: MvmciError | None = None
        self._has_begun = False  # whether it has said a word
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._tell_that_we_are_here())]

    async def close(self) -> None:
        """Ask no more, and let nobody wait. The agent ends with its channel, which is not ours."""
        await cancel(*self._tasks)
        self._end(HostAway(f"mvmci on {self.host} is asked no more"))

    async def ask(self, ask: Ask, kind: type[T]) -> T:
        """What the agent answers, which is a `kind`."""
        within_s = ANSWER_S + (ask.grace_s if isinstance(ask, Stop) else 0)
        within_s += 0 if self._has_begun else UNPACK_S
        try:
            async with asyncio.timeout(within_s), contextlib.aclosing(self._answers(ask)) as answers:
                async for answer in answers:
                    if answer.last:
                        return self._decoded(answer, kind)
        except TimeoutError:
            raise HostAway(
                f"mvmci on {self.host} does not answer within {within_s:.0f} s", hint="look at that host"
            ) from None
        raise AssertionError("answers end with one that is the last, or an error")

    async def tell(self, ask: Ask) -> None:
        """Have it do what has no answer."""
        await self.ask(ask, type(None))

    async def follow(self, ask: Ask, kind: type[T]) -> AsyncGenerator[T, None]:
        """The parts of an answer."""
        async with contextlib.aclosing(self._answers(ask)) as answers:
            async for answer in answers:
                if answer.last:
                    return
                yield self._decoded(answer, kind)

    def _decoded(self, answer: Answer, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.value, type=kind)
        except _SENSELESS as error:
            raise self._senseless(error) from None

    def _senseless(self, error: Exception) -> MvmciError:
        return MvmciError(f"mvmci on {self.host} said something else than an answer: {error}")

    async def _answers(self, ask: Ask) -> AsyncGenerator[Answer, None]:
        number = next(self._numbers)
        came: asyncio.Queue[Answer | MvmciError] = asyncio.Queue()
        self._waiting[number] = came
        try:
            if self._gone is not None:
                raise self._gone
            with contextlib.suppress(HostAway):  # what is read tells whether it ended, or its host is away
                await self._send(Request(id=number, ask=ask))
            while True:
                answer = await came.get()
                if isinstance(answer, MvmciError):
                    raise answer
                if answer.error is not None:
                    raise self._raised(answer.error)
                yield answer
                if answer.last:
                    return
        finally:
            del self._waiting[number]

    def _raised(self, failure: Failure) -> MvmciError:
        """What the agent raised, with the host that it was on."""
        kind: Any = getattr(errors, failure.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, MvmciError)):
            kind = MvmciError
        raised: MvmciError = kind(f"{self.host}: {failure.message}", hint=failure.hint)
        return raised

    async def _send(self, request: Request) -> None:
        await self._channel.write(msgspec.json.encode(request) + b"\n")

    async def _read(self) -> None:
        try:
            while line := await self._channel.readline():
                self._has_begun = True
                answer = _answers.decode(line)
                if answer.id in self._waiting:  # else nobody waits for it any more
                    self._waiting[answer.id].put_nowait(answer)
            self._end(self._ended(await self._channel.wait()))
        except MvmciError as error:
            self._end(error)
        except _SENSELESS as error:
            self._end(self._senseless(error))

    def _ended(self, ran: Ran) -> MvmciError:
        """Why an agent ended that nobody told to. By a signal it does so where its host shuts down."""
        kind = HostAway if ran.code > SIGNALS else MvmciError
        why = why_ended(ran.err.decode(errors="replace").splitlines(), f"ended with exit code {ran.code}")
        return kind(f"{self.host}: {why}")

    def _end(self, why: MvmciError) -> None:
        """Tell whoever waits for an answer, or asks from now on, that there is none."""
        self._gone = self._gone or why
        for waiting in self._waiting.values():
            waiting.put_nowait(self._gone)

    async def _tell_that_we_are_here(self) -> None:
        while True:
            await asyncio.sleep(SILENT_S / 4)
            with contextlib.suppress(MvmciError):  # whoever asks something is told
                await self._send(Request())
