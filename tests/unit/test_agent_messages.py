"""What is said between who is at work on a cluster and the hosts of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.errors import HostAway, LockHeld, MvmciError
from mvmci.runtimes.local import agent
from mvmci.runtimes.local.agent import (
    Answer,
    Begin,
    Failure,
    Forget,
    Key,
    Keys,
    Lock,
    Log,
    Observe,
    Provide,
    Request,
    Unlock,
    Wanted,
)
from mvmci.runtimes.local.messages import Report, Start, Stop, Watch
from mvmci.runtimes.local.runtime import Local
from mvmci.runtimes.ssh.channel import Ran
from mvmci.runtimes.ssh.client import AgentClient
from tests.harness.waiting import LONG_S

LOCK = Lock(who="process 1 of root on there", owner="O1")
EACH = (
    LOCK,
    Unlock(),
    Keys(units=(Wanted(name="worker-1", role="worker", generation=2),)),
    Provide(files={"worker-1": b"{}\n\x00"}),
    Begin(start=Start(units=()), attached=True),
    Stop(names=("worker-1",), grace_s=1.5),
    Stop(),
    Observe(),
    Watch(),
    Log(name="worker-1", follow=True, last=7),
    Forget(),
)


def test_each_request_comes_to_be_what_it_was_and_is_one_line() -> None:
    for ask in EACH:
        line = msgspec.json.encode(Request(id=3, ask=ask))
        assert b"\n" not in line
        assert msgspec.json.decode(line, type=Request) == Request(id=3, ask=ask)


def test_a_request_without_an_ask_says_only_that_somebody_is_there() -> None:
    assert msgspec.json.encode(Request()) == b"{}"


def test_what_is_new_in_a_message_is_passed_over() -> None:
    line = b'{"id":1,"new":2,"ask":{"type":"lock","who":"w","owner":"o","new":[]}}'
    assert msgspec.json.decode(line, type=Request) == Request(id=1, ask=Lock(who="w", owner="o"))
    answer = b'{"id":1,"last":true,"new":1,"error":{"kind":"Usage","message":"m","new":1}}'
    found = msgspec.json.decode(answer, type=Answer)
    assert found.error == Failure(kind="Usage", message="m")


# ---- The agent


class Talk:
    """Somebody at work, who writes lines and reads what is told."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.told: asyncio.Queue[Answer] = asyncio.Queue()
        self._numbers = itertools.count(1)

    async def write(self, line: bytes) -> None:
        self.told.put_nowait(msgspec.json.decode(line, type=Answer))

    async def ask(self, ask: Any) -> Answer:
        number = next(self._numbers)
        self.reader.feed_data(msgspec.json.encode(Request(id=number, ask=ask)) + b"\n")
        answer = await self.told.get()
        assert answer.id == number
        return answer


@pytest.fixture
def here(tmp_path: Path) -> Local:
    return Local(tmp_path, "demo", ["nobody"])


async def talking(here: Local, talk: Callable[[Talk], Awaitable[None]]) -> None:
    """Talk with an agent, which has ended then."""
    one = Talk()
    serving = asyncio.create_task(agent.serve(here, one.reader, one.write))
    try:
        await talk(one)
        one.reader.feed_eof()
        await serving
    finally:
        serving.cancel()


async def test_of_two_at_once_the_second_is_told_who_holds_the_lock_and_since_when(
    here: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "LOCK_WAIT_S", 0)

    async def first(one: Talk) -> None:
        assert (await one.ask(LOCK)).error is None

        async def second(other: Talk) -> None:
            failure = (await other.ask(LOCK)).error
            assert failure is not None
            assert failure.kind == "LockHeld"
            assert failure.message.startswith("process 1 of root on there, since 2")
            assert failure.message.endswith("Z, is at work on demo")
            assert (await one.ask(Unlock())).error is None
            assert (await other.ask(LOCK)).error is None

        await talking(here, second)
        assert (await one.ask(LOCK)).error is None  # the second has gone

    await talking(here, first)


async def test_the_lock_of_one_who_is_about_to_go_is_waited_for(
    here: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "LOCK_WAIT_S", LONG_S)
    tried, hold = asyncio.Event(), agent.hold

    def try_to_hold(*args: Any) -> Any:
        tried.set()
        return hold(*args)

    async def first(one: Talk) -> None:
        assert (await one.ask(LOCK)).error is None
        monkeypatch.setattr(agent, "hold", try_to_hold)

        async def second(other: Talk) -> None:
            asked = asyncio.create_task(other.ask(LOCK))
            await tried.wait()
            assert (await one.ask(Unlock())).error is None
            assert (await asked).error is None

        await talking(here, second)

    await talking(here, first)


async def test_who_has_gone_silent_has_lost_its_lock(here: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SILENT_S", 0.05)
    one = Talk()
    serving = asyncio.create_task(agent.serve(here, one.reader, one.write))
    assert (await one.ask(LOCK)).error is None
    await serving  # though its streams are open

    async def another(other: Talk) -> None:
        assert (await other.ask(LOCK)).error is None

    await talking(here, another)


async def test_who_says_that_it_is_there_keeps_it(here: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SILENT_S", 0.2)

    async def talk(one: Talk) -> None:
        await one.ask(LOCK)
        for _ in range(10):
            one.reader.feed_data(msgspec.json.encode(Request()) + b"\n")
            await asyncio.sleep(0.05)
        assert (await one.ask(Unlock())).error is None

    await talking(here, talk)


async def test_a_cluster_of_the_same_name_that_is_another_s_is_refused_and_stays_theirs(here: Local) -> None:
    async def provide(one: Talk, owner: str) -> Answer:
        locked = await one.ask(Lock(who="w", owner=owner))
        if locked.error is None:
            await one.ask(Provide(files={}))
        return locked

    async def first(one: Talk) -> None:
        assert (await provide(one, "O1")).error is None

    async def other(one: Talk) -> None:
        for _ in range(2):  # nor does a refusal leave anything
            failure = (await provide(one, "O2")).error
            assert failure is not None
            assert failure.kind == "Usage"
            assert failure.message.startswith("another cluster named demo is there")

    await talking(here, first)
    await talking(here, other)
    await talking(here, first)


async def test_who_looked_in_and_laid_down_nothing_leaves_the_name_free(here: Local) -> None:
    async def only_lock(one: Talk) -> None:
        assert (await one.ask(Lock(who="w", owner="O1"))).error is None

    async def other(one: Talk) -> None:
        assert (await one.ask(Lock(who="w", owner="O2"))).error is None

    await talking(here, only_lock)
    await talking(here, other)


async def test_a_key_is_made_once_and_only_its_public_half_is_told(here: Local) -> None:
    wanted = Keys(units=(Wanted(name="worker-1", role="worker", generation=0),))

    async def talk(one: Talk) -> None:
        (key,) = msgspec.json.decode((await one.ask(wanted)).value, type=list[Key])
        assert msgspec.json.decode((await one.ask(wanted)).value, type=list[Key]) == [key]
        assert key.public.startswith("U")
        assert key.there == b""

    await talking(here, talk)


async def test_a_disk_that_takes_nothing_is_a_sentence_and_the_agent_goes_on(here: Local) -> None:
    here.files.folder.parent.mkdir(exist_ok=True)
    here.files.folder.write_text("not a folder")

    async def talk(one: Talk) -> None:
        for _ in range(2):
            failure = (await one.ask(LOCK)).error
            assert failure is not None
            assert failure.kind == "Usage"
            assert str(here.files.folder) in failure.message

    await talking(here, talk)


async def test_a_stop_is_of_all_that_was_begun_before(here: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come in the middle of a start: what then is not there yet is not to stay."""
    done: list[str] = []

    async def start(*_: object, **__: object) -> None:
        await asyncio.sleep(0.1)
        done.append("started")

    async def stop(*_: object) -> bool:
        done.append("stopped")
        return True

    monkeypatch.setattr(here, "start", start)
    monkeypatch.setattr(here, "stop", stop)

    async def talk(one: Talk) -> None:
        begin = Request(id=7, ask=Begin(start=Start(units=()), attached=True))
        one.reader.feed_data(msgspec.json.encode(begin) + b"\n")
        one.reader.feed_data(msgspec.json.encode(Request(id=8, ask=Stop())) + b"\n")
        assert [(await one.told.get()).id for _ in range(2)] == [7, 8]

    await talking(here, talk)
    assert done == ["started", "stopped"]


# ---- Whoever asks it


class Line:
    """A channel of which tests are the other end."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Request] = asyncio.Queue()
        self.came: asyncio.Queue[bytes | MvmciError] = asyncio.Queue()
        self.is_deaf = False
        self.code = 1

    async def write(self, data: bytes) -> None:
        if self.is_deaf:
            await asyncio.Event().wait()
        request = msgspec.json.decode(data, type=Request)
        if request.ask is not None:
            self.sent.put_nowait(request)

    async def readline(self) -> bytes:
        came = await self.came.get()
        if isinstance(came, MvmciError):
            raise came
        return came

    async def wait(self) -> Ran:
        return Ran(code=self.code, out=b"", err=b"Traceback\nKeyError: 'x'\n")


@pytest.fixture
def line() -> Line:
    return Line()


async def failing(line: Line, *answers: bytes | MvmciError, ask: Any = None) -> MvmciError:
    """What is raised when a host answers so."""
    client = AgentClient("h1", line)  # type: ignore[arg-type]
    for answer in answers:
        line.came.put_nowait(answer)
    try:
        with pytest.raises(MvmciError) as caught:
            await client.ask(ask or Observe(), Report)
        return caught.value
    finally:
        await client.close()


async def test_what_the_agent_raises_is_raised_here_with_its_host(line: Line) -> None:
    held = msgspec.json.encode(Answer(id=1, last=True, error=Failure(kind="LockHeld", message="m", hint="h")))
    error = await failing(line, held + b"\n")
    assert (type(error), error.message, error.hint) == (LockHeld, "h1: m", "h")
    line.came = asyncio.Queue()
    strange = msgspec.json.encode(Answer(id=1, last=True, error=Failure(kind="SystemExit", message="m")))
    assert type(await failing(line, strange + b"\n")) is MvmciError


async def test_an_agent_that_ended_is_a_sentence_with_its_last_line(line: Line) -> None:
    error = await failing(line, b"")
    assert error.message == "h1: ended with exit code 1: KeyError: 'x'"
    line.came = asyncio.Queue()
    gone = HostAway("the connection to h1 is lost")
    assert await failing(line, gone) is gone


async def test_one_that_a_signal_ended_is_of_a_host_that_is_away(line: Line) -> None:
    """As it is where its host shuts down, which keeps nobody from going on with the others."""
    line.code = 143
    error = await failing(line, b"")
    assert type(error) is HostAway
    assert error.message.startswith("h1: ")


async def test_whoever_still_waits_for_an_answer_is_told_when_nobody_asks_any_more(line: Line) -> None:
    client = AgentClient("h1", line)  # type: ignore[arg-type]
    asking = asyncio.create_task(client.ask(Stop(grace_s=1e6), bool))
    await line.sent.get()
    await client.close()
    with pytest.raises(HostAway, match="h1"):
        await asking
    with pytest.raises(HostAway, match="h1"):
        await client.ask(Observe(), Report)


@pytest.mark.parametrize(
    "garbage",
    [
        b"Welcome!\n",
        b"[]\n",
        b'{"id": 1}\n',
        b'{"id": 1, "last": true, "value": 7}\n',
        b'{"id": 1, "last": true, "value": {"units": [{"name": "\xff"}]}}\n',
        b'{"id": 1, "last": true, "error": {"kind": "\xff", "message": ""}}\n',
        b'{"id": 1, "last": true, "value": ' + b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
    ids=range(8),
)
async def test_an_answer_that_makes_no_sense_is_a_sentence(line: Line, garbage: bytes) -> None:
    error = await failing(line, garbage)
    assert error.message.startswith("mvmci on h1 said something else than an answer")
    assert len(error.message) < 400


async def test_answers_to_what_nobody_asked_are_passed_over(line: Line) -> None:
    client = AgentClient("h1", line)  # type: ignore[arg-type]
    for number in (0, -1, 7, 1 << 62, 1):
        answer = Answer(id=number, last=True, value=msgspec.Raw(b'{"units":[]}'))
        line.came.put_nowait(msgspec.json.encode(answer) + b"\n")
    assert (await client.ask(Observe(), Report)).units == []
    await client.close()


@pytest.mark.parametrize("ask", [Observe(), Stop(grace_s=0.01), Begin(start=Start(units=()))])
@pytest.mark.parametrize("deaf", [False, True])
async def test_a_host_that_never_answers_is_away(
    line: Line, ask: Any, deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.runtimes.ssh.client.ANSWER_S", 0.05)
    monkeypatch.setattr("mvmci.runtimes.ssh.client.UNPACK_S", 0.0)
    line.is_deaf = deaf
    error = await failing(line, ask=ask)
    assert type(error) is HostAway
    assert error.message.startswith("mvmci on h1 does not answer within")


async def test_an_agent_may_unpack_its_program_before_its_first_word_and_not_later(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.runtimes.ssh.client.ANSWER_S", 0.0)
    client = AgentClient("h1", line)  # type: ignore[arg-type]
    asking = asyncio.create_task(client.ask(Observe(), Report))
    await line.sent.get()
    answer = Answer(id=1, last=True, value=msgspec.Raw(b'{"units":[]}'))
    line.came.put_nowait(msgspec.json.encode(answer) + b"\n")
    assert (await asking).units == []
    with pytest.raises(HostAway, match="does not answer within 0 s"):
        await client.ask(Observe(), Report)
    await client.close()


async def test_nor_does_one_keep_us_that_answers_without_end(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.runtimes.ssh.client.ANSWER_S", 0.05)
    monkeypatch.setattr("mvmci.runtimes.ssh.client.UNPACK_S", 0.0)
    part = msgspec.json.encode(Answer(id=1, last=False, value=msgspec.Raw(b"1"))) + b"\n"

    async def flood() -> None:
        while True:
            line.came.put_nowait(part)
            await asyncio.sleep(0)

    flooding = asyncio.create_task(flood())
    try:
        assert type(await failing(line)) is HostAway
    finally:
        flooding.cancel()
