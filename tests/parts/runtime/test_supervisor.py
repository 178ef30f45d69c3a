"""The supervisor of this machine: what the contract of runtimes does not say of it."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import (
    LISTENS,
    LOCAL_HOST,
    Deployment,
    RoleName,
    Unit,
    UnitConfig,
    listening,
    resolve,
)
from mvmci.errors import LockHeld, MvmciError, Usage
from mvmci.runtimes.local import messages, supervisor, unit_process
from mvmci.runtimes.local.messages import (
    Desired,
    Report,
    Start,
    SupervisorFiles,
    SupervisorProcess,
    desired_by,
    read_desired,
)
from mvmci.runtimes.local.runtime import Local
from mvmci.runtimes.local.unit_process import Pace
from mvmci.system.processes import Known, open_alive, program_digest, this_process
from mvmci.system.tasks import cancel
from tests.harness import stub
from tests.harness.ports import own_port
from tests.harness.stub import Said, read
from tests.harness.waiting import LONG_S, until_true

PACE = {"first_pause_s": 0.05, "longest_pause_s": 0.4, "healthy_s": 30, "hurry_s": 2.0, "look_every_s": 0.05}


def unit(name: str, *options: str, role: RoleName = "worker") -> UnitConfig:
    return UnitConfig(unit=Unit(name=name, role=role, host=LOCAL_HOST, options=options))


BROKER, PLANE = unit("broker-1", role="broker"), unit("plane-1", role="control-plane")
W1, W2, W3 = unit("w-1"), unit("w-2"), unit("w-3")
CLUSTER = (BROKER, PLANE, W1, W2)


@dataclass
class Place:
    """One cluster and its runtime."""

    root: Path
    local: Local
    folder: Path

    def said(self) -> list[Said]:
        """What the units said, in its order."""
        return read(self.root / "said")

    def began(self, name: str) -> list[Said]:
        return [one for one in self.said() if (one.name, one.what) == (name, "began")]

    def order(self) -> list[str]:
        return [f"{one.name} {one.what}" for one in self.said()]

    def units(self) -> list[Observed]:
        """What the supervisor wrote down."""
        file = self.folder / "units.json"
        return msgspec.json.decode(file.read_bytes(), type=Report).units if file.exists() else []

    def status(self, name: str) -> Observed:
        (found,) = [status for status in self.units() if status.name == name]
        return found

    def pids(self) -> dict[str, int | None]:
        return {status.name: status.pid for status in self.units()}

    def supervisor(self) -> int:
        return msgspec.json.decode((self.folder / "supervisor.json").read_bytes(), type=Known).pid

    async def runs(self, *units: UnitConfig, attached: bool = False) -> None:
        """Start, and wait until each has begun."""
        await self.local.start(units, attached=attached)
        await until_true(lambda: {one.unit.name for one in units} <= set(self.alive()))

    def alive(self) -> dict[str, int]:
        """The units whose process runs and has begun, as they say themselves."""
        pids = {status.pid for status in self.units()}
        return {one.name: one.pid for one in self.said() if one.pid in pids and one.what == "began"}

    async def kill(self, name: str) -> None:
        """`kill -9` to a unit, once it has begun."""
        await until_true(lambda: name in self.alive())
        os.kill(self.alive()[name], signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def pace() -> dict[str, Any]:
    return dict(PACE)


@pytest.fixture
async def place(tmp_path: Path, pace: dict[str, Any]) -> AsyncIterator[Place]:
    (tmp_path / "c").mkdir(mode=0o700)
    local = Local(tmp_path, "c", [sys.executable, stub.__file__, json.dumps(pace)])
    place = Place(tmp_path, local, tmp_path / "c")
    yield place
    if (place.folder / "supervisor.json").exists():
        (known,) = [msgspec.json.decode((place.folder / "supervisor.json").read_bytes(), type=Known)]
        if (pidfd := open_alive(known)) is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
    await until_true(lambda: all(gone(one.pid) for one in place.said()))


# ---- Starting


async def test_units_start_in_the_order_in_which_they_are_told(place: Place) -> None:
    await place.runs(*CLUSTER)
    assert [status.name for status in place.units()] == [one.unit.name for one in CLUSTER]
    starts = [_start_time(pid) for pid in place.pids().values()]
    assert starts == sorted(starts)
    assert {status.state for status in place.units()} == {"starting"}


def _start_time(pid: int | None) -> tuple[int, int]:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]), pid or 0


async def test_a_service_that_is_wanted_no_more_is_removed_before_anything_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next boot would start all by either."""
    removed: list[list[str]] = []

    class Other:
        def remove(self) -> None:
            removed.append(place.order())

    monkeypatch.setattr("mvmci.runtimes.local.runtime.services", lambda *_: [] if removed else [Other()])
    await place.runs(W1)
    assert removed == [[]]


async def test_nothing_runs_before_it_was_told(place: Place) -> None:
    assert await place.local.observe() == []
    assert await place.local.stop() is False
    async for seen in place.local.watch():
        assert seen == []
        break


async def test_a_unit_that_is_started_with_something_else_is_never_there_twice(place: Place) -> None:
    await place.runs(*CLUSTER)
    before = place.pids()
    await place.local.start([unit("w-2", "--leave", "0.2")])
    assert {status.state for status in place.units() if status.name != "w-2"} == {"starting"}
    await until_true(lambda: len(place.began("w-2")) == 2)
    after = place.pids()
    assert {name for name in after if after[name] == before[name]} == {"broker-1", "plane-1", "w-1"}
    assert {status.restarts for status in place.units()} == {0}
    # The same again, whose way out takes time.
    await place.local.start([W2])
    await until_true(lambda: len(place.began("w-2")) == 3)
    told = [one.what for one in place.said() if one.name == "w-2"]
    assert told == ["began", "asked", "ended"] * 2 + ["began"]


async def test_a_unit_that_is_wanted_again_while_it_leaves_comes_back(place: Place) -> None:
    slow = unit("w-1", "--leave", "0.5")
    await place.runs(*CLUSTER[:2], slow)
    stopping = asyncio.create_task(place.local.stop(["w-1"]))
    await until_true(lambda: "w-1 asked" in place.order())
    assert place.status("w-1").state == "draining"
    await place.local.start([slow])
    await until_true(lambda: len(place.began("w-1")) == 2)
    await stopping
    assert [one.what for one in place.said() if one.name == "w-1"] == ["began", "asked", "ended", "began"]


async def test_what_was_set_for_this_call_alone_does_not_reach_the_units(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVMCI_TICKET_FILE", "secret")
    monkeypatch.setenv("MVMCI_LOG", "DEBUG")
    await place.runs(BROKER)
    pid = place.status("broker-1").pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ours = {entry for entry in environment if entry.startswith(b"MVMCI_")}
    assert ours == {f"MVMCI_STATE={place.root}".encode(), b"MVMCI_LOG=DEBUG"}


# ---- Crashes


async def test_a_killed_unit_comes_back_under_its_name_and_no_other_is_touched(place: Place) -> None:
    await place.runs(*CLUSTER)
    before = place.pids()
    await place.kill("w-1")
    await until_true(lambda: len(place.began("w-1")) == 2)
    after = place.pids()
    assert after.pop("w-1") != before.pop("w-1")
    assert after == before
    status = place.status("w-1")
    assert (status.restarts, status.last_exit, status.state) == (1, -signal.SIGKILL, "starting")
    log = (place.folder / "units" / "w-1" / "log").read_text()
    assert "w-1 was killed by SIGKILL; it is started again in 0.05 s" in log


async def test_the_pauses_between_crashes_double_up_to_the_longest(place: Place) -> None:
    await place.local.start([unit("w-1", "--exit", "3")])
    await until_true(lambda: len(place.began("w-1")) == 7)
    times = [one.at for one in place.began("w-1")]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times[:7])]
    for pause, least in zip(pauses, [0.05, 0.1, 0.2, 0.4, 0.4, 0.4], strict=True):
        assert least <= pause
    log = (place.folder / "units" / "w-1" / "log").read_text()
    assert log.count("it is started again in 0.4 s") >= 3
    assert "it is started again in 0.8 s" not in log
    assert place.status("w-1").last_exit == 3


@pytest.mark.parametrize("pace", [PACE | {"first_pause_s": 0.01, "healthy_s": 0.3}], ids=[""])
async def test_a_unit_that_lived_well_is_started_again_at_once(place: Place) -> None:
    await place.local.start([unit("w-1", "--exit", "3", "--live", "0.4")])
    await until_true(lambda: len(place.began("w-1")) == 8)
    log = (place.folder / "units" / "w-1" / "log").read_text()
    assert log.count("it is started again in 0.01 s") >= 7


async def test_a_unit_whose_credential_is_refused_stays_down_and_says_why(place: Place) -> None:
    refused = unit("w-1", "--exit", "7", "--print", "Error: the credential of w-1 was revoked")
    await place.local.start([BROKER, refused])
    await until_true(lambda: place.units() and place.status("w-1").reason)
    status = place.status("w-1")
    assert (status.state, status.pid, status.last_exit) == ("down", None, 7)
    assert status.reason == "the credential of w-1 was revoked"
    await asyncio.sleep(3 * PACE["longest_pause_s"])
    assert len(place.began("w-1")) == 1
    assert status.given_up
    # Whoever starts it again has seen to it.
    await place.local.start([refused])
    await until_true(lambda: len(place.began("w-1")) == 2)


async def test_the_reason_is_of_this_process_and_not_of_an_earlier_one(place: Place) -> None:
    await place.local.start([unit("w-1", "--print", "Error: of the first")])
    await until_true(lambda: place.began("w-1"))
    await place.kill("w-1")
    await until_true(lambda: place.status("w-1").reason)
    assert place.status("w-1").reason == "of the first"
    await place.local.start([unit("w-1", "--exit", "3", "--live", "0.3")])
    await until_true(lambda: place.status("w-1").last_exit == 3)
    assert place.status("w-1").reason == "ended with exit code 3"


async def test_what_a_unit_said_last_is_the_reason_where_it_named_no_error(place: Place) -> None:
    await place.local.start([unit("w-1", "--exit", "3", "--print", "cannot: `what` is wrong")])
    await until_true(lambda: place.began("w-1") and place.status("w-1").last_exit == 3)
    assert place.status("w-1").reason == "ended with exit code 3: cannot: `what` is wrong"


async def test_a_broker_says_in_a_log_of_its_own_what_is_wrong(place: Place) -> None:
    log = place.folder / "broker" / "nats.log"
    log.parent.mkdir(parents=True)
    log.write_text("[1] [FTL] of an earlier one\n")
    await place.local.start([BROKER])
    await until_true(lambda: place.began("broker-1"))
    with log.open("a") as file:
        file.write("[2] [FTL] no room\n[2] 2026/01/01 [INF] Server Exiting..\n")
    await place.kill("broker-1")
    await until_true(lambda: place.status("broker-1").reason)
    assert place.status("broker-1").reason == "was killed by SIGKILL: [2] [FTL] no room"


async def test_a_program_that_cannot_be_started_is_tried_again_too(place: Place) -> None:
    first = desired_by(Start(units=(W1,)), ["/nowhere/mvmci"])
    supervise = supervisor.supervise(
        place.folder, first, ["mvmci"], {}, ready=lambda: None, pace=Pace(**PACE)
    )
    here = asyncio.create_task(supervise)
    await until_true(lambda: place.units() and place.units()[0].restarts == 2)
    assert place.units()[0].reason == "it cannot be started: No such file or directory"
    os.kill(os.getpid(), signal.SIGTERM)
    await here


async def test_a_unit_that_is_stopped_by_a_signal_is_left_alone_and_can_leave(place: Place) -> None:
    await place.runs(W1)
    pid = place.alive()["w-1"]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(3 * PACE["longest_pause_s"])
    assert (place.status("w-1").pid, place.status("w-1").restarts) == (pid, 0)
    assert await place.local.stop(grace_s=LONG_S)
    assert place.order() == ["w-1 began", "w-1 asked", "w-1 ended"]


# ---- Stopping


async def test_a_stop_goes_the_other_way_round_and_leaves_nothing(place: Place) -> None:
    await place.runs(BROKER, PLANE, *(unit(name, "--stubborn", "1") for name in ("w-1", "w-2")))
    pid, alive = place.supervisor(), place.alive()
    stopping = asyncio.create_task(place.local.stop(grace_s=LONG_S))
    await until_true(lambda: {"w-1 asked", "w-2 asked"} <= set(place.order()))  # both at once
    for name in ("w-1", "w-2"):
        os.kill(alive[name], signal.SIGTERM)
    assert await stopping
    order = place.order()[6:]
    assert set(order[:4]) == {f"w-{number} {what}" for number in "12" for what in ("asked", "ended")}
    assert order[4:] == ["plane-1 asked", "plane-1 ended", "broker-1 asked", "broker-1 ended"]
    assert gone(pid)
    left = {str(path.relative_to(place.folder)) for path in place.folder.rglob("*") if path.is_file()}
    assert left == {
        "supervisor.lock",
        "supervisor.log",
        *(f"units/{one.unit.name}/log" for one in CLUSTER),
    }
    assert await place.local.stop() is False


async def test_who_does_not_listen_is_asked_again_and_then_killed(place: Place) -> None:
    await place.runs(BROKER, unit("w-1", "--stubborn", "1"), unit("w-2", "--stubborn", "9"))
    start = time.monotonic()
    await place.local.stop(grace_s=0.4)
    took = time.monotonic() - start
    told = place.order()[3:]
    assert [one for one in told if "w-1" in one] == ["w-1 asked", "w-1 asked", "w-1 ended"]
    assert [one for one in told if "w-2" in one] == ["w-2 asked", "w-2 asked"]
    assert 0.4 + PACE["hurry_s"] <= took
    assert told[-1] == "broker-1 ended"


async def test_a_second_stop_hurries_the_first(place: Place) -> None:
    await place.runs(BROKER, unit("w-1", "--stubborn", "1"))
    first = asyncio.create_task(place.local.stop(grace_s=LONG_S))
    await until_true(lambda: "w-1 asked" in place.order())
    start = time.monotonic()
    await asyncio.gather(first, place.local.stop(grace_s=LONG_S))
    assert time.monotonic() - start < LONG_S / 2
    assert place.order()[-1] == "broker-1 ended"


async def test_a_unit_in_its_pause_is_stopped_at_once(place: Place) -> None:
    await place.local.start([unit("w-1", "--exit", "3")])
    await until_true(lambda: place.units() and place.status("w-1").restarts >= 3)
    assert await place.local.stop()


# ---- The supervisor itself


async def test_no_unit_outlives_a_killed_supervisor(place: Place) -> None:
    await place.runs(*CLUSTER)
    pids = [pid for pid in place.pids().values() if pid]
    os.kill(place.supervisor(), signal.SIGKILL)
    await until_true(lambda: all(gone(pid) for pid in pids))
    assert len(pids) == 4
    # Its files are still there, and believed by nobody.
    assert await place.local.observe() == []
    assert await place.local.stop() is False
    await place.runs(*CLUSTER)
    assert len(place.began("w-1")) == 2


async def test_there_is_one_supervisor_per_cluster(place: Place) -> None:
    await place.runs(*CLUSTER)
    before = place.units()
    here = (place.folder / "supervisor.json").read_bytes()
    first = Desired()
    with pytest.raises(LockHeld):
        async with asyncio.timeout(LONG_S):
            await supervisor.supervise(place.folder, first, ["/bin/true"], {}, ready=lambda: None)
    (place.folder / "supervisor.json").unlink()  # and not because a file says so
    with pytest.raises(MvmciError, match="supervisor ended with exit code"):
        await place.local.start(CLUSTER)
    (place.folder / "supervisor.json").write_bytes(here)
    assert place.units() == before


async def test_a_number_that_was_used_again_is_never_signalled(place: Place) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # noqa: ASYNC220
        stale = Known(pid=other.pid, started=1)
        messages.write(place.folder / "supervisor.json", stale)
        assert await place.local.stop() is False
        await place.runs(W1)
        assert place.supervisor() != other.pid
        assert other.poll() is None
        other.kill()


def test_a_process_is_known_until_it_has_ended() -> None:
    pidfd = open_alive(this_process())
    assert pidfd is not None
    os.close(pidfd)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19])
        known = Known(pid=other.pid, started=started)
        pidfd = open_alive(known)
        assert pidfd is not None
        os.close(pidfd)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # ended, and reaped by nobody
        assert open_alive(known) is None
    assert open_alive(known) is None


ATTACHED = """
import asyncio, sys
from pathlib import Path
from mvmci.cluster.deployment import Unit, UnitConfig
from mvmci.runtimes.local.runtime import Local
from mvmci.runtimes.local.unit_process import Pace
async def main():
    unit = UnitConfig(unit=Unit(name="w-1", role="worker", host="local"))
    attached = sys.stdin.readline() == "attached\\n"
    await Local(Path(sys.argv[1]), "c", sys.argv[2:]).start([unit], attached=attached)
    print("applied", flush=True)
    sys.stdin.readline()
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["attached", "detached"])
async def test_what_is_attached_is_stopped_when_the_process_that_started_it_dies(
    place: Place, how: str
) -> None:
    program = [sys.executable, stub.__file__, json.dumps(PACE)]
    command = [sys.executable, "-c", ATTACHED, str(place.root), *program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as up:  # noqa: ASYNC220
        assert up.stdin is not None
        assert up.stdout is not None
        up.stdin.write(f"{how}\n")
        assert up.stdout.readline() == "applied\n"
        await until_true(lambda: place.began("w-1"))
        up.kill()
    if how == "attached":
        await until_true(lambda: "w-1 ended" in place.order())
        async for seen in place.local.watch():
            if not seen:
                break
    else:
        await asyncio.sleep(0.3)
        assert place.order() == ["w-1 began"]
        assert place.status("w-1").pid is not None


# ---- What is wanted, when the supervisor comes back


def desired(place: Place) -> dict[str, str]:
    """What the next boot would start, and by which file."""
    found = read_desired(SupervisorFiles(place.folder)).units
    return {one.config.unit.name: Path(one.program[1]).name for one in found}


def start_again(place: Place) -> subprocess.Popen[bytes]:
    """What is done after a boot: nobody says what is to run."""
    command = [*place.local._program, "supervise", "--resume", "--cluster", "c"]
    env = os.environ | {"MVMCI_STATE": str(place.root)}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


async def resume(place: Place) -> None:
    """The same, until it can be asked."""
    process = start_again(place)
    process.returncode = 0  # the fixture ends it
    known = place.folder / "supervisor.json"
    await until_true(lambda: known.exists() and place.supervisor() == process.pid)


@dataclass
class Beginning:
    """A supervisor that waits for the end of what it reads."""

    process: subprocess.Popen[bytes]
    feed: IO[bytes]

    def read(self, *units: UnitConfig) -> None:
        """Have it read that these are wanted."""
        wanted = desired_by(Start(units=units), [sys.executable, stub.__file__])
        self.feed.write(msgspec.json.encode(wanted))
        self.feed.close()


async def kill_supervisor(place: Place) -> None:
    alive = place.alive()
    os.kill(place.supervisor(), signal.SIGKILL)
    await until_true(lambda: all(gone(pid) for pid in alive.values()))


async def test_after_a_crash_or_a_boot_all_that_is_wanted_runs_again(place: Place) -> None:
    await place.runs(*CLUSTER)
    await place.runs(W3)
    await place.local.stop(["w-1"])
    file = place.folder / "desired.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    await kill_supervisor(place)
    await resume(place)
    await until_true(lambda: {"broker-1", "plane-1", "w-2", "w-3"} <= set(place.alive()))
    assert len(place.began("w-1")) == 1
    assert {one.name: one.config for one in place.units()} == {
        one.unit.name: one for one in (BROKER, PLANE, W2, W3)
    }


async def test_a_machine_that_shuts_down_forgets_nothing_and_a_stop_does(place: Place) -> None:
    await place.runs(BROKER, W1)
    pid = place.supervisor()
    os.kill(pid, signal.SIGTERM)
    await until_true(lambda: gone(pid))
    assert place.order()[-1] == "broker-1 ended"
    assert set(desired(place)) == {"broker-1", "w-1"}
    assert await place.local.stop(["w-1"]) is False  # nothing runs, and it is wanted no more all the same
    assert set(desired(place)) == {"broker-1"}
    await resume(place)
    await until_true(lambda: place.alive().keys() == {"broker-1"})
    await place.local.stop()
    assert desired(place) == {}
    assert not (place.folder / "desired.json").exists()


@pytest.fixture
async def beginning(place: Place) -> AsyncIterator[Beginning]:
    """A supervisor that comes back, as after a boot, and has its lock: it waits to read what is wanted."""
    place.folder.mkdir(parents=True, exist_ok=True)
    file = place.folder / "desired.json"
    os.mkfifo(file)
    process = start_again(place)
    feed = await asyncio.to_thread(file.open, "wb")  # once it reads
    yield Beginning(process, feed)
    feed.close()
    process.kill()
    process.wait()


async def test_a_stop_waits_for_a_supervisor_that_begins_and_ends_what_it_starts(
    place: Place, beginning: Beginning
) -> None:
    stopping = asyncio.create_task(place.local.stop())
    await asyncio.wait([stopping], timeout=0.3)  # time to think that there is nothing to stop
    beginning.read(W1)
    assert await stopping
    assert await asyncio.to_thread(beginning.process.wait) == 0
    assert place.order() in ([], ["w-1 began", "w-1 ended"], ["w-1 began", "w-1 asked", "w-1 ended"])
    assert not (place.folder / "desired.json").exists()


async def test_what_is_started_while_the_supervisor_is_ended_runs_under_the_next_one(place: Place) -> None:
    slow = unit("w-1", "--leave", "0.5")
    await place.runs(BROKER, slow)
    pid = place.supervisor()
    os.kill(pid, signal.SIGTERM)
    await until_true(lambda: "w-1 asked" in place.order())
    await place.runs(slow)
    assert gone(pid)
    assert place.alive().keys() == {"w-1"}


async def test_what_is_attached_is_not_wanted_by_the_next_boot(place: Place) -> None:
    await place.runs(W2)
    await kill_supervisor(place)
    await place.runs(W1, attached=True)
    assert not (place.folder / "desired.json").exists()
    await place.runs(W2)
    assert not (place.folder / "desired.json").exists()


# ---- Another program


@pytest.fixture
def builds(place: Place) -> list[Local]:
    """Two builds of the same program."""
    found = []
    for build in ("one", "two"):
        file = place.root / f"{build}.pyz"
        stub.write_zipapp(file, build)
        found.append(Local(place.root, "c", [sys.executable, str(file), json.dumps(PACE)]))
    place.local = found[0]
    return found


def held(place: Place) -> IO[bytes]:
    """Have a supervisor that becomes another program stand still at that until this is closed."""
    file = (place.root / "hold").open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def program(pid: int) -> str:
    """The file that a process was started from."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[1]).name if len(words) > 1 else ""  # in the middle of an exec, there are none


def digest(place: Place) -> str:
    file = place.folder / "supervisor.json"
    return msgspec.json.decode(file.read_bytes(), type=SupervisorProcess).digest


async def test_the_supervisor_becomes_the_program_of_who_starts_and_units_go_on(
    place: Place, builds: list[Local]
) -> None:
    await place.runs(*CLUSTER)
    pid, before = place.supervisor(), place.alive()
    assert digest(place) == program_digest(builds[0]._program)
    place.local = builds[1]
    await place.runs(W3)
    assert (place.supervisor(), digest(place)) == (pid, program_digest(builds[1]._program))
    assert program(pid) == "two.pyz"
    after = place.alive()
    assert {name: after[name] for name in before} == before
    assert {name: program(pid) for name, pid in after.items()} == dict.fromkeys(before, "one.pyz") | {
        "w-3": "two.pyz"
    }
    assert desired(place) == dict.fromkeys(before, "one.pyz") | {"w-3": "two.pyz"}
    # One that crashes comes back as what it was, and goes over when it is started anew.
    os.kill(after["w-1"], signal.SIGKILL)
    await until_true(lambda: place.alive().get("w-1", after["w-1"]) != after["w-1"])
    assert program(place.alive()["w-1"]) == "one.pyz"
    assert place.status("w-1").restarts == 1
    await place.local.start([unit("w-1", "--leave=0")])
    await until_true(lambda: len(place.began("w-1")) == 3)
    assert program(place.alive()["w-1"]) == "two.pyz"
    assert await place.local.stop()
    assert gone(pid)


async def test_no_unit_outlives_a_supervisor_that_became_another_program(
    place: Place, builds: list[Local]
) -> None:
    await place.runs(*CLUSTER)
    await builds[1].start([W3])
    await kill_supervisor(place)
    assert await place.local.observe() == []


async def test_what_happens_while_the_supervisor_becomes_another_program_is_seen_to(
    place: Place, builds: list[Local]
) -> None:
    hold = held(place)
    await place.runs(BROKER, W1, W2)
    pid, before = place.supervisor(), place.alive()
    starting = asyncio.create_task(builds[1].start([W3]))
    await until_true(lambda: program(pid) == "two.pyz")
    os.kill(before["w-1"], signal.SIGKILL)
    await until_true(lambda: gone(before["w-1"]))
    stopping = asyncio.create_task(place.local.stop(["w-2"]))
    with pytest.raises(LockHeld):
        await supervisor.supervise(place.folder, Desired(), ["x"], {}, ready=lambda: None)
    assert not starting.done()
    hold.close()
    await asyncio.gather(starting, stopping)
    await until_true(lambda: len(place.began("w-1")) == 2 and place.began("w-3"))
    assert (place.status("w-1").restarts, place.status("w-1").last_exit) == (1, -signal.SIGKILL)
    assert place.order().count("w-2 ended") == 1
    assert set(place.pids()) == {"broker-1", "w-1", "w-3"}
    assert place.alive()["broker-1"] == before["broker-1"]


async def test_a_signal_that_comes_while_it_becomes_another_program_is_heeded(
    place: Place, builds: list[Local]
) -> None:
    hold = held(place)
    await place.runs(BROKER, W1)
    pid = place.supervisor()
    starting = asyncio.create_task(builds[1].start([BROKER]))
    await until_true(lambda: program(pid) == "two.pyz")
    os.kill(pid, signal.SIGTERM)
    hold.close()
    await until_true(lambda: gone(pid))
    await starting  # by another supervisor, once that one was gone
    assert [one for one in place.order() if "ended" in one][:2] == ["w-1 ended", "broker-1 ended"]


async def test_what_is_attached_stays_so_when_the_supervisor_becomes_another_program(
    place: Place, builds: list[Local]
) -> None:
    command = [sys.executable, "-c", ATTACHED, str(place.root), *builds[0]._program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as up:  # noqa: ASYNC220
        assert up.stdin is not None
        assert up.stdout is not None
        up.stdin.write("attached\n")
        assert up.stdout.readline() == "applied\n"
        await until_true(lambda: place.began("w-1"))
        pid = place.supervisor()
        await builds[1].start([W2])
        assert (place.supervisor(), program(pid)) == (pid, "two.pyz")
        assert not (place.folder / "desired.json").exists()
        await until_true(lambda: place.began("w-2"))
        up.kill()
    await until_true(lambda: gone(pid))
    assert {"w-1 ended", "w-2 ended"} <= set(place.order())


async def test_a_program_that_does_not_run_here_is_not_taken(place: Place, builds: list[Local]) -> None:
    await place.runs(BROKER, W1)
    before = (place.supervisor(), digest(place), place.alive())
    broken = place.root / "broken.pyz"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("__main__.py", "raise SystemExit('Error: it needs another Python')")
    for words, why in (
        ([sys.executable, str(broken)], "it needs another Python"),
        (["/nowhere/python", str(broken)], "/nowhere/python cannot be started: No such file or directory"),
    ):
        with pytest.raises(MvmciError, match=f"cannot go over to {broken}: {why}"):
            await Local(place.root, "c", words).start([W2])
    assert (place.supervisor(), digest(place), place.alive()) == before


async def test_a_pause_and_a_unit_that_was_given_up_are_taken_over(place: Place, builds: list[Local]) -> None:
    refused = unit("w-1", "--exit", "7", "--print", "Error: the credential of w-1 was revoked")
    await place.local.start([BROKER, refused, unit("w-2", "--exit", "3")])
    await until_true(lambda: place.units() and place.status("w-1").given_up)
    await until_true(lambda: place.status("w-2").restarts >= 2)
    await builds[1].start([BROKER])
    began = len(place.began("w-2"))
    await until_true(lambda: len(place.began("w-2")) > began)
    assert place.status("w-2").restarts > began - 1
    assert place.status("w-1").given_up
    assert len(place.began("w-1")) == 1


async def test_units_of_a_supervisor_that_cannot_be_replaced_start_again(
    place: Place, builds: list[Local]
) -> None:
    """It is of a build that did not know of it: its file says no digest."""
    await place.runs(BROKER, W1)
    pid = place.supervisor()
    messages.write(place.folder / "supervisor.json", Known(pid=pid, started=_start_time(pid)[0]))
    place.local = builds[1]
    await place.runs(W2)
    assert gone(pid)
    await until_true(lambda: {"broker-1", "w-1", "w-2"} == set(place.alive()))
    assert {program(pid) for pid in place.alive().values()} == {"two.pyz"}


# ---- Logs


async def test_a_log_is_private_appended_to_and_bounded_with_one_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.runs(unit("w-1", "--print", "hello"))
    log = place.folder / "units" / "w-1" / "log"
    await until_true(lambda: log.read_text() == "hello\n")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    await place.kill("w-1")
    await until_true(lambda: log.read_text().count("hello\n") == 2)
    with log.open("ab") as file:
        file.truncate(supervisor.LOG_BYTES_MAX + 1)
    await until_true(lambda: log.stat().st_size == 0)
    kept = log.with_name("log.1")
    assert kept.stat().st_size == supervisor.LOG_BYTES_MAX + 1
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    await place.kill("w-1")
    await until_true(lambda: log.read_text().endswith("hello\n"))
    assert log.stat().st_size < 200  # what is open goes on at the new end


async def test_who_follows_a_log_that_is_moved_aside_goes_on_with_the_new_one(place: Place) -> None:
    await place.runs(unit("w-1", "--print", "hello"))
    log, came = place.folder / "units" / "w-1" / "log", bytearray()

    async def follow() -> None:
        async for piece in place.local.log("w-1", follow=True):
            came.extend(piece)

    following = asyncio.create_task(follow())
    await until_true(lambda: came == b"hello\n")
    log.with_name("log.1").write_bytes(log.read_bytes())
    os.truncate(log, 0)
    with log.open("ab") as file:
        file.write(b"new\n")
    await until_true(lambda: came == b"hello\nnew\n")
    await cancel(following)


# ---- Places

E1, E2 = unit("e-1", LISTENS, role="executor"), unit("e-2", LISTENS, role="executor")


def again(place: Place) -> Local:
    """The same runtime, as the next call of the program sees it."""
    return Local(place.root, "c", place.local._program)


async def resolved(local: Local, *configs: UnitConfig) -> tuple[UnitConfig, ...]:
    deployment = Deployment(units=tuple(one.unit for one in configs))
    places = {one.name: await local.place(one) for one in listening(deployment)}
    return tuple(UnitConfig(unit=one) for one in resolve(deployment, places).units)


async def test_a_unit_has_a_place_of_its_own_on_the_loopback_before_it_ever_ran(place: Place) -> None:
    places = [await place.local.place(E1.unit), await place.local.place(E2.unit)]
    assert {one.listen == one.address for one in places} == {True}
    hosts, ports = zip(*(one.listen.split(":") for one in places), strict=True)
    assert (set(hosts), len(set(ports))) == ({"127.0.0.1"}, 2)
    later = [await again(place).place(E1.unit), await again(place).place(E2.unit)]
    assert later == places  # `plan` says what `up` does
    assert list(place.folder.iterdir()) == []


async def test_a_port_that_somebody_has_is_not_chosen(place: Place) -> None:
    first = await place.local.place(E1.unit)
    host, _, port = first.listen.partition(":")
    with socket.create_server((host, int(port))):
        assert await again(place).place(E1.unit) != first


async def test_two_units_never_get_one_port(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMCI_PORTS", f"{(port := own_port())}-{port + 19}")
    chosen = [(await place.local.place(unit(f"e-{number}", LISTENS).unit)).listen for number in range(10)]
    assert len(set(chosen)) == 10


async def test_a_unit_keeps_its_place_once_it_was_started_there(place: Place) -> None:
    found = await place.local.place(E1.unit)
    units = await resolved(place.local, E1, W1)
    await place.runs(*units)
    assert (await resolved(again(place), E1, W1)) == units  # it is this unit that listens there
    await place.local.stop()
    assert await again(place).place(E1.unit) == found
    await place.runs(W1)
    assert await again(place).place(E1.unit) == found


async def test_a_place_that_somebody_else_took_is_refused_in_a_sentence(place: Place) -> None:
    await place.runs(*(await resolved(place.local, E1)))
    found = await place.local.place(E1.unit)
    await place.local.stop()
    host, _, port = found.listen.partition(":")
    with socket.create_server((host, int(port))):
        with pytest.raises(Usage) as caught:
            await again(place).place(E1.unit)
        assert caught.value.message == f"e-1 cannot listen where it did: port {port} of {host} is in use"
        assert str(caught.value.hint).startswith(f"stop what listens there, or remove {place.folder}/ports")
        (place.folder / "ports.json").unlink()
        assert await again(place).place(E1.unit) != found


async def test_a_balancer_is_ready_once_its_port_answers(place: Place) -> None:
    listens = (await resolved(place.local, unit("b-1", LISTENS, role="executor")))[0].unit.options
    balancer = unit("b-1", *listens, role="balancer")
    await place.runs(balancer, W1)
    await until_true(lambda: place.status("b-1").state == "ready")
    assert place.status("w-1").state == "starting"
    await place.local.start((unit("b-2", "--listen=127.0.0.1:1", "--deaf", role="balancer"),))
    await until_true(lambda: "b-2 began" in place.order())
    await asyncio.sleep(2 * unit_process.PORT_ANSWER_S)
    assert place.status("b-2").state == "starting"


async def test_so_is_one_that_listens_at_ipv6(place: Place) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        await place.runs(unit("b-1", f"--listen=[::1]:{port}", "--deaf", role="balancer"))
        await until_true(lambda: place.status("b-1").state == "ready")


async def test_a_stop_is_told_of_when_all_that_it_names_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hears of one of them finds no other at work."""
    told: list[Report] = []
    monkeypatch.setattr(supervisor, "write", lambda _, value: told.append(value))
    async with asyncio.TaskGroup() as tasks:
        one = supervisor.Supervisor(SupervisorFiles(tmp_path), ["none"], {}, Pace(), tasks)
        one.begin(desired_by(Start(units=(W1, W3)), ["none"]))
        for process in one.units.values():  # as if both had been started
            process.seen = msgspec.structs.replace(process.seen, state="starting", pid=1)
        await one.stop(None, 0)
    after = itertools.dropwhile(lambda tale: not any(u.state == "draining" for u in tale.units), told)
    assert {unit.state for unit in next(after).units} == {"draining"}


def test_one_whose_starter_died_in_the_middle_of_a_word_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mvmci", "supervise", "--cluster", "c", "--state", str(tmp_path)]
    told = msgspec.json.encode(Start(units=(BROKER, W1)))
    done = subprocess.run(command, input=told[: len(told) // 2], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Error: what is to run was not told to its end" in done.stderr


def test_one_whose_cluster_was_removed_as_it_was_started_ends_without_a_word(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mvmci", "supervise", "--resume", "--cluster", "c"]
    done = subprocess.run([*command, "--state", str(tmp_path)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(tmp_path.iterdir()) == []


async def test_who_is_interrupted_as_it_begins_has_something_to_stop(place: Place) -> None:
    starting = asyncio.create_task(place.local.start(await resolved(place.local, W1), attached=True))
    await until_true((place.folder / "supervisor.log").exists)  # its process is not far yet
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await place.local.stop()
    assert not (place.folder / "supervisor.json").exists()
