"""What a runtime promises, on every one that there is: it does to the units that are named what it is told.

Units are a stub, which tells in a file when it began, was asked to go, and went. On containers it is the one
file that their image is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster import topology
from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import LOCAL_HOST, RoleName, Unit, UnitConfig
from mvmci.cluster.topology import HostSection
from mvmci.errors import NotFound
from mvmci.runtime import Provisioning, Runtime
from mvmci.runtimes.compose import docker as docker_line
from mvmci.runtimes.compose.runtime import Containers
from mvmci.runtimes.local.runtime import Local
from mvmci.runtimes.ssh.runtime import Ssh
from mvmci.trust.authority import Authority
from tests.harness import sshd, stub
from tests.harness.docker import Docker
from tests.harness.waiting import LONG_S, until_true

RUNTIMES = ("local", "compose", "ssh")
NAME = "contract"


def config(name: str, *options: str, role: RoleName = "worker", **more: Any) -> UnitConfig:
    queue = ("--queue=default",) if role == "worker" else ()
    unit = Unit(name=name, role=role, host=LOCAL_HOST, options=(*queue, *options))
    return UnitConfig(unit=unit, dial=("tls://broker-a:4222",), program="a build", **more)


BROKER = config("broker-a", role="broker", broker=BrokerSettings(name=NAME, port=4222))
PLANE = config("plane-a", role="control-plane")
WA, WB = config("w-a"), config("w-b")
CLUSTER = (BROKER, PLANE, WA, WB)


class World:
    """One cluster on a runtime, made anew by `open`, as each call of the program makes it."""

    def __init__(
        self,
        name: str,
        root: Path,
        said: Callable[[], list[stub.Said]],
        base: str,
        hosts: dict[str, HostSection],
    ) -> None:
        self.name = name
        self.root = root
        self.said = said
        self._hosts = hosts
        self._opened: list[Runtime] = []
        self.runtime = self.open()
        self._authority = Authority.create(root / NAME)
        text = f"cluster: {NAME}\nworkers: {{slots: 1}}\ncompose: {{base: '{base}'}}\n"
        self._topology = topology.read_topology(text, name="a.yaml")
        self._wanted: dict[str, UnitConfig] = {}

    def open(self) -> Runtime:
        if self.name == "compose":
            return Containers(self.root, NAME)
        if self.name == "ssh":
            self._opened.append(Ssh(self.root, NAME, self._hosts, self.root / "mvmci.pyz"))
            return self._opened[-1]
        program = [sys.executable, stub.__file__, json.dumps(stub.PACE)]
        return Local(self.root, NAME, program)

    async def close(self) -> None:
        """Let go of all connections."""
        for runtime in self._opened:
            await runtime.close()

    def upgrade(self) -> None:
        """Have the next call be of another build."""
        stub.write_zipapp(self.root / "mvmci.pyz", "another", here=self.name == "ssh")
        if self.name == "ssh":
            self.runtime = self.open()
        if self.name == "local":
            file = str(self.root / "mvmci.pyz")
            self.runtime = Local(self.root, NAME, [sys.executable, file, json.dumps(stub.PACE)])

    async def start(self, *configs: UnitConfig) -> None:
        """Provision and start, and wait until each has begun once more."""
        before = {one.unit.name: self.began(one.unit.name) for one in configs}
        self._wanted |= {one.unit.name: one for one in configs}
        wanted = tuple(self._wanted.values())
        await self.runtime.provision(
            Provisioning(authority=self._authority, topology=self._topology, wanted=wanted, starting=configs)
        )
        await self.runtime.start(configs)
        await until_true(lambda: all(self.began(name) > count for name, count in before.items()))

    def began(self, name: str) -> int:
        return len([one for one in self.said() if (one.name, one.what) == (name, "began")])

    def order(self) -> list[str]:
        return [f"{one.name} {one.what}" for one in sorted(self.said(), key=lambda one: one.at)]

    async def seen(self, name: str) -> Observed:
        (found,) = [one for one in await self.runtime.observe() if one.name == name]
        return found

    async def see(self, name: str, there: Callable[[Observed], object]) -> Observed:
        """Wait until a unit is so."""

        async def is_so() -> bool:
            return bool(there(await self.seen(name)))

        await until_true(is_so)
        return await self.seen(name)

    async def pids(self) -> dict[str, int | None]:
        return {one.name: one.pid for one in await self.runtime.observe()}


@pytest.fixture(scope="module")
def engine(docker: Docker) -> Iterator[tuple[Docker, str]]:
    """Docker, and the image that containers are made on here."""
    yield docker, docker.base_of(NAME)
    if images := docker.kept(f"mvmci-{NAME}"):
        docker("image", "rm", *images)


@pytest.fixture(params=RUNTIMES)
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    said, base = (lambda: stub.read(tmp_path / "said")), ""
    engine: Docker | None = None
    if request.param == "compose":
        engine, base = request.getfixturevalue("engine")
        stub.write_zipapp(tmp_path / "mvmci.pyz")
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "mvmci.pyz")])
        volumes = [engine.volumes / f"mvmci-{NAME}_{name}" / "_data" / "said" for name in ("broker", "state")]
        said = lambda: list(itertools.chain.from_iterable(map(stub.read, volumes)))  # noqa: E731
        docker_line.check_docker.cache_clear()
    async with contextlib.AsyncExitStack() as stack:
        hosts: dict[str, HostSection] = {}
        if request.param == "ssh":
            machine = await stack.enter_async_context(sshd.serve(tmp_path / "sshd"))
            machine.authorized_keys.write_text(sshd.make_key(tmp_path / "key"))
            told = {"key": str(tmp_path / "key"), "host_key": machine.host_keys[0], "python": sys.executable}
            hosts = {LOCAL_HOST: machine.section(directory=str(tmp_path / "host"), **told)}
            stub.write_zipapp(tmp_path / "mvmci.pyz", here=True)
            said = lambda: stub.read(tmp_path / "host" / "said")  # noqa: E731
        world = World(request.param, tmp_path, said, base or "unused", hosts)
        yield world
        if engine is not None:
            engine.keep(f"mvmci-{NAME}")
        await world.runtime.stop(grace_s=0)
        await world.runtime.forget()
        await world.close()


def by_name(seen: Collection[Observed]) -> dict[str, Observed]:
    return {one.name: one for one in seen}


# ---- Starting


async def test_what_is_started_is_observed_with_what_it_was_started_with(world: World) -> None:
    assert await world.runtime.observe() == []
    await world.start(*CLUSTER)
    seen = await world.runtime.observe()
    assert [one.name for one in seen] == ["broker-a", "plane-a", "w-a", "w-b"]
    assert [one.config for one in seen] == [*CLUSTER]
    assert {one.config.program for one in seen if one.config} == {"a build"}
    assert {(one.state, one.restarts, one.given_up) for one in seen} == {("starting", 0, False)}
    assert all(one.pid and one.host == LOCAL_HOST for one in seen)


async def test_who_comes_later_sees_the_same(world: World) -> None:
    """Whatever became of who started them."""
    await world.start(BROKER, WA)
    assert await world.open().observe() == await world.runtime.observe()
    await world.open().start([BROKER, WA])
    assert (world.began("broker-a"), world.began("w-a")) == (1, 1)


async def test_a_second_start_changes_nothing(world: World) -> None:
    await world.start(*CLUSTER)
    before = await world.runtime.observe()
    await world.runtime.start(CLUSTER)
    assert await world.runtime.observe() == before


async def test_units_that_are_added_leave_the_others_alone(world: World) -> None:
    await world.start(BROKER, WA)
    before = await world.runtime.observe()
    await world.start(WB)
    assert [one for one in await world.runtime.observe() if one.name != "w-b"] == before


async def test_one_that_runs_with_something_else_is_another_when_it_is_started_again(world: World) -> None:
    await world.start(BROKER, WA)
    other = config("w-a", "--leave=0")
    await world.start(other)
    assert (await world.seen("w-a")).config == other
    assert [one.what for one in world.said() if one.name == "w-a"] == ["began", "asked", "ended", "began"]
    assert world.began("broker-a") == 1


async def test_one_that_is_started_anew_is_of_the_program_of_who_starts_it_and_no_other_is(
    world: World,
) -> None:
    """After an upgrade, neighbours still run what they did."""
    await world.start(BROKER, WA)
    before = await world.pids()
    world.upgrade()
    other = msgspec.structs.replace(WA, program="another build")
    await world.start(other)
    after = await world.pids()
    assert (await world.seen("w-a")).config == other
    assert (await world.seen("broker-a")).config == BROKER
    assert after.pop("w-a") != before.pop("w-a")
    assert after == before


# ---- Stopping


async def test_exactly_those_that_are_named_are_stopped(world: World) -> None:
    await world.start(*CLUSTER)
    before = await world.pids()
    assert await world.runtime.stop(["w-b", "nobody"])
    assert before.pop("w-b")
    assert await world.pids() == before
    assert "w-b ended" in world.order()
    assert not await world.runtime.stop(["w-b"])
    await world.start(WB)  # and it comes back, alone
    assert {name: pid for name, pid in (await world.pids()).items() if name != "w-b"} == before


async def test_a_stop_goes_from_the_workers_to_the_broker_and_waits(world: World) -> None:
    await world.start(*CLUSTER[:2], config("w-a", "--leave=0.2"), config("w-b", "--leave=0.2"))
    assert await world.runtime.stop()
    order = world.order()[4:]
    assert set(order[:4]) == {f"w-{name} {what}" for name in "ab" for what in ("asked", "ended")}
    assert order[4:] == ["plane-a asked", "plane-a ended", "broker-a asked", "broker-a ended"]
    assert await world.runtime.observe() == []
    assert not await world.runtime.stop()


async def test_who_does_not_go_within_its_grace_is_asked_again(world: World) -> None:
    await world.start(BROKER, config("w-a", "--stubborn=1"))
    began = time.monotonic()
    await world.runtime.stop(["w-a"], 1.0)
    assert time.monotonic() - began >= 1.0
    assert [one.what for one in world.said() if one.name == "w-a"] == ["began", "asked", "asked", "ended"]
    assert world.order()[-1] == "w-a ended"


async def test_what_stopped_units_left_stays_unless_it_is_to_be_forgotten(world: World) -> None:
    await world.start(BROKER, WA)
    await world.runtime.stop(grace_s=0)
    said = world.said()
    await world.runtime.forget(world.runtime.absent())
    assert world.said() == said != []


# ---- Crashes


async def test_one_that_was_killed_comes_back_and_no_other_is_touched(world: World) -> None:
    await world.start(*CLUSTER)
    before = await world.pids()
    pid = before["w-a"]
    assert pid
    os.kill(pid, signal.SIGKILL)
    await until_true(lambda: world.began("w-a") == 2)
    found = await world.see("w-a", lambda one: one.restarts == 1 and one.pid)
    assert found.config == WA
    after = await world.pids()
    assert after.pop("w-a") != before.pop("w-a")
    assert after == before


async def test_the_pauses_between_crashes_grow(world: World) -> None:
    await world.start(config("w-a", "--exit=3"))
    await until_true(lambda: world.began("w-a") >= 5)
    times = [one.at for one in world.said() if one.what == "began"]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    first_s = 0.1 if world.name == "compose" else 0.05
    assert all(pause >= first_s * 2**number for number, pause in enumerate(pauses[:4]) if number < 4)


async def test_one_that_was_refused_is_given_up_and_says_why_until_it_is_started_again(world: World) -> None:
    """What to do about it is another's to say: under the same key, it would be refused again."""
    await world.start(BROKER, config("w-a", "--exit=7", "--print=Error: the credential was revoked"))
    found = await world.see("w-a", lambda one: one.given_up)
    assert (found.state, found.refused, found.reason) == ("down", True, "the credential was revoked")
    await world.runtime.stop(["w-a"])
    assert "w-a" not in await world.pids()
    await world.start(WA)
    found = await world.see("w-a", lambda one: one.pid)
    assert (found.given_up, found.refused, found.state) == (False, False, "starting")


# ---- What units print


async def test_what_a_unit_printed_can_be_read_and_followed(world: World) -> None:
    await world.start(BROKER, config("w-a", "--print=hello from w-a"))

    async def printed() -> bytes:
        return b"".join([piece async for piece in world.runtime.log("w-a")])

    async def is_there() -> bool:
        return b"hello from w-a\n" in await printed()

    await until_true(is_there)
    came = b""
    async with contextlib.aclosing(world.runtime.log("w-a", follow=True)) as pieces:
        async for piece in pieces:
            came += piece
            if b"hello" in came:
                break
    assert came.startswith(b"hello from w-a\n")
    with pytest.raises(NotFound, match="no unit w-b of contract"):
        await anext(world.runtime.log("w-b"))


# ---- Watching


async def test_a_watch_tells_how_they_are_now_and_whenever_that_changes(world: World) -> None:
    await world.start(BROKER, WA)
    told: list[list[Observed]] = []

    async def watch() -> None:
        async for seen in world.runtime.watch():
            told.append(seen)

    watching = asyncio.create_task(watch())
    try:
        await until_true(lambda: told)
        assert list(by_name(told[0])) == ["broker-a", "w-a"]
        await world.start(config("w-b", "--stubborn=1"))
        await until_true(lambda: (one := by_name(told[-1]).get("w-b")) and one.pid)
        killed, asked = (by_name(told[-1])[name].pid for name in ("w-a", "w-b"))
        assert killed
        assert asked
        os.kill(killed, signal.SIGKILL)
        await until_true(lambda: by_name(told[-1])["w-a"].restarts == 1)
        stopping = asyncio.create_task(world.runtime.stop(["w-b"], LONG_S))
        await until_true(lambda: by_name(told[-1])["w-b"].state == "draining")
        await until_true(lambda: "w-b asked" in world.order())
        os.kill(asked, signal.SIGTERM)  # it goes once that was seen
        await stopping
        await until_true(lambda: "w-b" not in by_name(told[-1]))
        await world.runtime.stop()
        await until_true(lambda: told[-1] == [])
        await world.start(WA)
        await until_true(lambda: "w-a" in by_name(told[-1]))
        assert not watching.done()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
