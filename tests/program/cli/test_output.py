"""What is shown of a job's output: all of it, once, in order, and written before anybody ends."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from mvmci.cli.options import Location
from mvmci.cli.output import Printer, telling
from mvmci.cli.streams import ReaderGone
from mvmci.cli.uploads import Uploads
from mvmci.deploy import operate
from mvmci.deploy.state import ClusterState
from mvmci.deploy.status import ClusterStatus, UnitRow
from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import Done, Lease, Spec, State, fold
from mvmci.journals.client import submit
from mvmci.journals.logs import OutputWatch
from mvmci.journals.reader import load
from mvmci.journals.status import waiting
from mvmci.store import About, Chunk, Member, digest_of
from tests.harness.memory import Memory
from tests.harness.waiting import LONG_S
from tests.harness.world import command_spec

SLOW_S = 0.01
PIECE = 4096


class Reader:
    """The end of a pipe that is read slowly."""

    def __init__(self) -> None:
        self._there, self.end = os.pipe()
        fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, PIECE)  # whoever writes more has to wait for it
        self.data = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while piece := os.read(self._there, PIECE):
            self.data += piece
            time.sleep(SLOW_S)

    def close(self) -> bytes:
        """What was written."""
        os.close(self.end)
        self._thread.join()
        os.close(self._there)
        return bytes(self.data)


@pytest.fixture
def reader() -> Reader:
    return Reader()


def chunk(number: int, data: bytes, *, attempt: int = 1) -> Chunk:
    return Chunk(attempt=attempt, number=number, stream="stdout", data=data, at=1)


def ended(chunks: int, *, epoch: int = 1) -> State:
    """How a command stands that has ended in its attempt `epoch`."""
    state = State()
    spec = Spec(
        at=1, id="j", queue="q", kind="command", module="m", name="m", component=False, seed=1, by="me"
    )
    lease = Lease(at=1, epoch=epoch, unit="w", incarnation="i", run="r", why="first")
    for record in (spec, lease, Done(at=1, status="succeeded", chunks=chunks)):
        fold(state, record)
    return state


async def test_all_is_written_before_it_is_over(reader: Reader) -> None:
    store = Memory().store("u1")
    pieces = [bytes([number]) * 10 * PIECE for number in range(4)]
    await store.logs.append("j", "q", [chunk(number, data) for number, data in enumerate(pieces)])
    printer = Printer(reader.end, reader.end)
    async with OutputWatch(store, "j", printer) as watch:
        await watch.rest(ended(len(pieces)))
        assert len(reader.data) >= sum(map(len, pieces)) - 2 * PIECE  # the rest is in the pipe
    assert reader.close() == b"".join(pieces)


async def test_output_that_its_end_has_overtaken_is_waited_for(
    reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Memory().store("u1")
    async with OutputWatch(store, "j", Printer(reader.end, reader.end)) as watch:
        resting = asyncio.create_task(watch.rest(ended(2), wait_s=2 * LONG_S))
        for number in range(2):
            await asyncio.sleep(0.3)
            assert not resting.done()
            await store.logs.append("j", "q", [chunk(number, b"%d" % number)])
        async with asyncio.timeout(LONG_S):  # it hears of it
            await resting
    assert reader.close() == b"01"
    assert capsys.readouterr().err == ""


async def test_output_that_never_comes_is_told(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    store = Memory().store("u1")
    await store.logs.append("j", "q", [chunk(0, b"0")])
    async with OutputWatch(store, "j", Printer(reader.end, reader.end)) as watch:
        await watch.rest(ended(3), wait_s=0.2)
    assert reader.close() == b"0"
    assert capsys.readouterr().err == "warning: 2 pieces of the output of 3 are lost\n"


async def test_a_new_attempt_starts_over_and_an_older_one_is_heard_no_more(
    reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Memory().store("u1")
    several = [(1, 0, b"a"), (1, 1, b"b"), (2, 0, b"A"), (1, 2, b"c"), (2, 1, b"B"), (1, 3, b"d")]
    for attempt, number, data in several:
        await store.logs.append("j", "q", [chunk(number, data, attempt=attempt)])
    async with OutputWatch(store, "j", Printer(reader.end, reader.end)) as watch:
        await watch.rest(ended(2, epoch=2))
    assert reader.close() == b"abAB"
    assert capsys.readouterr().err == "attempt 2: it starts over\n"


@pytest.mark.parametrize(("attempt", "wanted"), [(1, b"ab"), (2, b"AB"), (3, b"")])
async def test_of_one_attempt_only_that_is_shown(reader: Reader, attempt: int, wanted: bytes) -> None:
    store = Memory().store("u1")
    for of, number, data in [(1, 0, b"a"), (2, 0, b"A"), (1, 1, b"b"), (2, 1, b"B")]:
        await store.logs.append("j", "q", [chunk(number, data, attempt=of)])
    async with OutputWatch(store, "j", Printer(reader.end, reader.end, attempt=attempt)) as watch:
        await watch.rest(ended(2, epoch=2), wait_s=0)
    assert reader.close() == wanted


async def test_a_store_that_is_away_is_asked_again(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Memory().store("u1")
    follow, asked = store.logs.follow, 0

    async def away(job: str):  # type: ignore[no-untyped-def]
        nonlocal asked
        asked += 1
        async for found in follow(job):
            yield found
            if asked < 3:
                raise StoreUnavailable("away")

    monkeypatch.setattr(store.logs, "follow", away)
    monkeypatch.setattr("mvmci.journals.logs.FOLLOW_AGAIN_S", 0.01)
    await store.logs.append("j", "q", [chunk(number, b"%d" % number) for number in range(5)])
    async with OutputWatch(store, "j", Printer(reader.end, reader.end)) as watch:
        await watch.rest(ended(5))
    assert (reader.close(), asked) == (b"01234", 3)


async def test_who_shows_to_nobody_stops_waiting() -> None:
    store = Memory().store("u1")
    there, end = os.pipe()
    os.close(there)
    await store.logs.append("j", "q", [chunk(0, b"0")])

    async def watch() -> None:
        async with OutputWatch(store, "j", Printer(end, end)) as watching:
            await watching.until(asyncio.sleep(2 * LONG_S))

    async with asyncio.timeout(LONG_S):
        with pytest.raises(ReaderGone):
            await watch()
    os.close(end)


# ---- Why a job waits


def worker(*, busy: int = 0, queues: tuple[str, ...] = ("q",), draining: bool = False) -> Member:
    about = About(role="worker", slots=2, queues=queues, state="draining" if draining else "ready")
    return Member(unit="w", incarnation="i", holds=tuple(f"j{n}@1" for n in range(busy)), about=about)


PLANE = Member(unit="c", incarnation="c", about=About(role="control-plane"))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], "waiting: no worker takes from queue q"),
        ([PLANE, worker(queues=("other",))], "waiting: no worker takes from queue q"),
        ([worker(draining=True)], "waiting: workers draining"),
        ([worker(busy=2), worker(draining=True)], "waiting: workers busy"),
        ([worker(busy=2), worker(busy=1)], ""),
    ],
)
def test_a_queued_job_says_why_it_waits(members: list[Member], reason: str) -> None:

    assert waiting("j", "q", members) == reason


# ---- What is told beside the output


async def test_who_waits_for_a_job_is_told_why_it_does_not_go_on_and_each_reason_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mvmci.cli.output.STANDING_EVERY_S", 0.01)
    store = Memory().store("u1")
    await submit(store, await command_spec(store, "j", "hello"))
    journal = await load(store, "j")
    err = ""
    async with telling(store, journal, Location(tmp_path)), asyncio.timeout(LONG_S):
        while err.count("\n") < 1:
            await asyncio.sleep(0.01)
            err += capsys.readouterr().err
        await store.presence.describe(About(role="worker", slots=1, queues=("default",)))
        await store.presence.explain("j", "compiling hello.wasm\x1b")
        while err.count("\n") < 2:
            await asyncio.sleep(0.01)
            err += capsys.readouterr().err
    assert err == ("j: waiting: no worker takes from queue default\nj: waiting: compiling hello.wasm\\x1b\n")


async def test_an_upload_that_takes_long_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.cli.uploads.EVERY_S", 0.0)
    store = Memory().store("u1")
    data = bytes(3 << 20)
    assert await Uploads(store.blobs).put(data) == digest_of(data)
    assert await store.blobs.get(digest_of(data)) == data
    assert "uploading: 3.0 MiB of at most 3.0 MiB" in capsys.readouterr().err


async def test_who_is_waited_for_when_a_cluster_goes_down_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(operate, "_SAY_EVERY_S", 0.0)
    busy = [
        UnitRow(name="broker", role="broker", host="h", state="ready"),
        UnitRow(name="worker-1", role="worker", host="h", state="draining", busy=2),
    ]
    looks = 0
    enough = asyncio.Event()

    async def look(*_: object) -> ClusterStatus:
        nonlocal looks
        looks += 1
        if looks == 3:
            enough.set()
        if looks == 2:
            raise StoreUnavailable("the broker has gone")
        return ClusterStatus(cluster="demo", access=None, runtime=None, units=tuple(busy))

    monkeypatch.setattr(operate, "look", look)
    said: list[str] = []
    telling = asyncio.create_task(operate._tell_who_is_busy(ClusterState(tmp_path, "demo"), said.append))
    await enough.wait()
    telling.cancel()
    assert said == ["waiting for jobs of worker-1 (2)"]
