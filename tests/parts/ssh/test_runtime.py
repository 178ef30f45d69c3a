"""Units on hosts over ssh, with what else may be there: real sshds, and stubs as units."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster import topology
from mvmci.cluster.deployment import Place, Unit, UnitConfig
from mvmci.cluster.topology import HostSection
from mvmci.errors import MvmciError, Usage
from mvmci.runtime import Provisioning
from mvmci.runtimes.local.agent import Observe, Request
from mvmci.runtimes.local.messages import SupervisorFiles, Watch
from mvmci.runtimes.ssh import runtime
from mvmci.runtimes.ssh.client import AgentClient
from mvmci.runtimes.ssh.runtime import Ssh
from mvmci.system.processes import program_digest
from mvmci.trust.authority import Authority
from tests.harness import stub
from tests.harness.places import need
from tests.harness.sshd import Sshd
from tests.harness.waiting import until_true

NAME = "demo"
TOPOLOGY = topology.read_topology(f"cluster: {NAME}\nworkers: {{slots: 1}}\n", name="a.yaml")


class Fleet:
    """Hosts, which share a machine and have a directory each, and a cluster on them."""

    def __init__(self, folder: Path, sshd: Sshd, opened: AsyncExitStack) -> None:
        self.folder = folder
        self.sshd = sshd
        self.root = folder / "state"
        self.authority = Authority.create(self.root / NAME)
        self._opened = opened
        stub.write_zipapp(folder / "mvmci.pyz", here=True)

    @property
    def digest(self) -> str:
        """Of the program that hosts get."""
        return program_digest(["", str(self.folder / "mvmci.pyz")])

    def directory(self, host: str) -> Path:
        return self.folder / "hosts" / host

    def files(self, host: str) -> SupervisorFiles:
        return SupervisorFiles(self.directory(host) / NAME)

    def section(self, host: str, **told: Any) -> HostSection:
        usual = {"directory": str(self.directory(host)), "python": sys.executable, "service": "none"}
        return self.sshd.section(**(usual | told))

    def open(self, **hosts: HostSection) -> Ssh:
        """The runtime, as each call of the program makes it."""
        found = Ssh(self.root, NAME, hosts, self.folder / "mvmci.pyz")
        self._opened.push_async_callback(found.close)
        return found

    async def start(self, on: Ssh, **units: str) -> None:
        """Start workers, each on its host."""
        configs = [
            UnitConfig(unit=Unit(name=name, role="worker", host=host, options=("--queue=default",)))
            for name, host in units.items()
        ]
        async with on.lock({*units.values()}, "me"):
            await on.provision(
                Provisioning(authority=self.authority, topology=TOPOLOGY, wanted=configs, starting=configs)
            )
            await on.start(configs)
        await until_true(lambda: all(self.began(units[name], name) for name in units))

    def began(self, host: str, name: str) -> int:
        said = stub.read(self.directory(host) / "said")
        return len([one for one in said if (one.name, one.what) == (name, "began")])

    async def kill_supervisor(self, host: str, on: Ssh) -> None:
        os.kill(json.loads(self.files(host).supervisor.read_bytes())["pid"], signal.SIGKILL)

        async def nothing_runs() -> bool:
            return await on.observe() == []

        await until_true(nothing_runs)


@pytest.fixture
async def fleet(tmp_path: Path, sshd: Sshd) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as opened:
        fleet = Fleet(tmp_path, sshd, opened)
        yield fleet
        last = fleet.open()
        await last.stop(grace_s=0)
        await last.forget()


async def test_what_is_stopped_does_not_come_with_the_next_boot_though_its_supervisor_was_killed(
    fleet: Fleet,
) -> None:
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1", b="h1")
    await fleet.kill_supervisor("h1", on)
    assert fleet.files("h1").desired.exists()
    await fleet.open().stop(["a"])
    assert [one["config"]["unit"]["name"] for one in desired(fleet, "h1")] == ["b"]
    assert fleet.files("h1").boot_script.exists()
    assert not await fleet.open().stop()  # there was nothing to be stopped
    assert not fleet.files("h1").desired.exists()
    assert not fleet.files("h1").boot_script.exists()


def desired(fleet: Fleet, host: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(fleet.files(host).desired.read_bytes())["units"]
    return found


async def test_what_starts_units_after_a_boot_is_of_the_program_that_was_started_last(fleet: Fleet) -> None:
    """A line of cron stays as it is, and programs go."""
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    (told,) = on.notes
    assert told.endswith(f"sh {fleet.files('h1').boot_script}")
    before = fleet.files("h1").boot_script.read_text()
    stub.write_zipapp(fleet.folder / "mvmci.pyz", "another", here=True)
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, b="h1")
    (again,) = on.notes
    assert again == told
    assert fleet.digest not in before
    assert fleet.digest in fleet.files("h1").boot_script.read_text()


async def test_what_a_unit_printed_is_told_also_when_nothing_runs_there_any_more(fleet: Fleet) -> None:
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    await fleet.kill_supervisor("h1", on)
    later = fleet.open()
    assert isinstance(b"".join([piece async for piece in later.log("a")]), bytes)


async def test_units_are_not_left_behind_in_another_directory(fleet: Fleet) -> None:
    """Two of each would run, and nobody would know of the first."""
    await fleet.start(fleet.open(h1=fleet.section("h1")), a="h1")
    moved = fleet.section("h1", directory=str(fleet.directory("elsewhere")))
    with pytest.raises(Usage, match=f"h1: its units are in {fleet.directory('h1')}, and not in") as caught:
        await fleet.open(h1=moved).check()
    assert "mvmci down" in caught.value.message
    await fleet.open().stop()
    await fleet.open(h1=moved).check()


@pytest.mark.parametrize(
    ("address", "listen", "dialled"),
    [
        ("192.0.2.1", "0.0.0.0", "192.0.2.1"),
        ("a.example", "0.0.0.0", "a.example"),
        ("2001:db8::1", "[::]", "[2001:db8::1]"),
    ],
)
async def test_units_listen_where_their_host_is_dialled(
    fleet: Fleet, address: str, listen: str, dialled: str
) -> None:
    on = fleet.open(h1=HostSection(address=address))
    place = await on.place(Unit(name="executor-1", role="executor", host="h1"))
    assert place == Place(listen=f"{listen}:27288", address=f"{dialled}:27288")


async def test_nor_under_another_service(fleet: Fleet) -> None:
    """A boot would start them by either."""
    await fleet.start(fleet.open(h1=fleet.section("h1")), a="h1")
    other = fleet.section("h1", service="user")
    told = "h1: its units are kept running by `service: none`, and not user: `mvmci down` before that changes"
    with pytest.raises(Usage, match=told):
        await fleet.open(h1=other).check()
    await fleet.open().stop()
    await fleet.open(h1=other).check()


async def test_a_host_has_one_name(fleet: Fleet) -> None:
    """Else emptying the one would empty the other, and their locks be in each other's way."""
    section = fleet.section("h1")
    await fleet.start(fleet.open(h1=section), a="h1")
    for first in ("present", "absent"):
        twice = fleet.open(h1=msgspec.structs.replace(section, state=first), h2=section)
        with pytest.raises(Usage, match=r"^(h1 and h2|h2 and h1) are one place: give each a `directory`"):
            await twice.check()
    with pytest.raises(Usage, match="h2 is where h1 was, and has its units: `mvmci down` before"):
        await fleet.open(h2=section).check()
    await fleet.open().stop()
    named = fleet.open(h2=section)
    await named.check()
    fleet.directory("h2").symlink_to(fleet.directory("h1"))  # where is seen that its units began
    await fleet.start(named, b="h2")
    last = fleet.open()
    async with last.lock(None, "me"):
        assert await last.stop(grace_s=0)
        await last.forget()
    assert not fleet.files("h1").folder.exists()


async def test_a_host_that_is_reached_otherwise_is_so_from_then_on(fleet: Fleet) -> None:
    """Whoever comes without the file knows it from what is kept."""
    await fleet.start(fleet.open(h1=fleet.section("h1")), a="h1")
    told = fleet.section("h1", labels={"disk": "nvme"})
    assert fleet.open(h1=told).rerouted() == []
    on = fleet.open(h1=fleet.section("h1", python=os.path.realpath(sys.executable)))
    assert on.rerouted() == ["h1"]
    async with on.lock((), "me"):
        pass
    assert on.rerouted() == []
    kept = json.loads((fleet.root / NAME / "hosts.json").read_bytes())
    assert kept["h1"]["section"]["python"] == os.path.realpath(sys.executable)
    assert [one.name for one in await fleet.open().observe()] == ["a"]


async def test_a_host_that_is_lost_is_not_asked_by_anybody_any_more(fleet: Fleet) -> None:
    h1, h2 = fleet.section("h1"), fleet.section("h2")
    await fleet.start(fleet.open(h1=h1, h2=h2), a="h1", b="h2")
    (key,) = kept(fleet)["h2"]["keys"].values()
    lost = msgspec.structs.replace(h2, state="lost", port=1)  # where nobody answers
    on = fleet.open(h1=h1, h2=lost)
    assert on.lost() == {"h2": {"b": "worker"}}
    assert not fleet.authority.ledger.revoked("workers")
    on.give_up(fleet.authority)
    assert key in fleet.authority.ledger.revoked("workers")
    assert on.lost() == {}
    for each in (on, fleet.open(), fleet.open(h1=h1)):  # whoever comes without the file, or without that host
        assert [(one.name, one.host) for one in await each.observe()] == [("a", "h1")]
        async with each.lock(None, "me"):
            pass
        assert (each.away, each.returned()) == ({}, [])
        (told,) = each.left()
        assert f"mvmci host --cluster {NAME} --state {fleet.directory('h2')} --forget" in told
    async with fleet.open(h1=h1, h2=h2).lock(["h2"], "me"):  # it is empty again, for the end of this test
        pass


async def test_a_host_that_comes_back_has_nothing_of_the_time_before(fleet: Fleet) -> None:
    """Its units run elsewhere, or under other keys."""
    h1, h2 = fleet.section("h1"), fleet.section("h2")
    await fleet.start(fleet.open(h1=h1, h2=h2), a="h1", b="h2", c="h2")
    before = kept(fleet)["h2"]["keys"]
    fleet.open(h1=h1, h2=fleet.section("h2", state="lost")).give_up(fleet.authority)
    await fleet.start(fleet.open(h1=h1), b="h1")
    with pytest.raises(Usage, match="h3 is where h2 was, which is lost: call it h2, `state: present`"):
        await fleet.open(h1=h1, h3=h2).check()

    on = fleet.open(h1=h1, h2=h2)
    assert (on.returned(), on.rerouted()) == (["h2"], [])
    assert [(one.name, one.host) for one in await on.observe()] == [("a", "h1"), ("b", "h1")]
    await on.close()
    assert kept(fleet)["h2"]["section"]["state"] == "lost"  # until it is empty
    await fleet.open(h1=h1, h2=fleet.section("h2", service="auto")).check()  # what runs there is to go

    on = fleet.open(h1=h1, h2=h2)
    await fleet.start(on, c="h2")
    assert on.returned() == []
    assert [(one.name, one.host) for one in await on.observe()] == [("a", "h1"), ("b", "h1"), ("c", "h2")]
    assert kept(fleet)["h2"]["units"] == {"c": "worker"}
    (after,) = kept(fleet)["h2"]["keys"].values()
    assert after not in before.values()
    assert not fleet.files("h2").config("b").exists()


async def test_a_host_that_comes_back_to_be_emptied_is(fleet: Fleet) -> None:
    on = fleet.open(h2=fleet.section("h2"))
    await fleet.start(on, b="h2")
    await fleet.kill_supervisor("h2", on)  # as at the end of its power
    fleet.open(h2=fleet.section("h2", state="lost")).give_up(fleet.authority)
    on = fleet.open(h2=fleet.section("h2", state="absent"))
    assert (on.absent(), on.returned()) == (["h2"], ["h2"])
    async with on.lock(["h2"], "me"):
        await on.forget(on.absent())
    assert not fleet.files("h2").folder.exists()
    assert kept(fleet) == {}


async def test_keys_that_a_build_before_did_not_write_down_are_named(fleet: Fleet) -> None:
    h1, h2 = fleet.section("h1"), fleet.section("h2")
    await fleet.start(fleet.open(h1=h1, h2=h2), a="h1", b="h2")
    known = kept(fleet)
    del known["h2"]["keys"]
    (fleet.root / NAME / "hosts.json").write_bytes(msgspec.json.encode(known))
    on = fleet.open(h1=h1, h2=fleet.section("h2", state="lost"))
    await on.check()
    (note,) = on.notes
    assert note.startswith("the keys of b on h2, which is lost, were not written down")
    await fleet.open(h1=h1, h2=h2).stop()


def kept(fleet: Fleet) -> dict[str, Any]:
    """What is written down of hosts."""
    found: dict[str, Any] = json.loads((fleet.root / NAME / "hosts.json").read_bytes())
    return found


async def test_a_record_of_hosts_that_cannot_be_read_is_not_taken_for_none(fleet: Fleet) -> None:
    await fleet.start(fleet.open(h1=fleet.section("h1")), a="h1")
    file = fleet.root / NAME / "hosts.json"
    kept = file.read_bytes()
    newer = json.loads(kept)
    newer["h1"]["section"]["of_a_newer_build"] = 1
    for text in (b"nonsense", kept[:-9], msgspec.json.encode(newer)):
        file.write_bytes(text)
        with pytest.raises(Usage, match=r"hosts\.json cannot be read: it is damaged, or of a newer mvmci"):
            fleet.open()
    file.write_bytes(kept)


async def test_an_agent_is_asked_to_tell_of_its_units_once_however_often_somebody_watches(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    follow = AgentClient.follow

    def counted(self: AgentClient, ask: Any, kind: Any) -> Any:
        asked.append(ask)
        return follow(self, ask, kind)

    monkeypatch.setattr(AgentClient, "follow", counted)
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    for _ in range(3):
        watching = on.watch()
        assert [one.name for one in await anext(watching)] == ["a"]
        await watching.aclose()
    await until_true(lambda: asked)
    assert asked == [Watch()]


async def test_a_program_is_sent_to_few_hosts_at_a_time_and_looked_for_on_all(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow line, each of a hundred would get it too late."""
    monkeypatch.setattr(runtime, "SENDING_MAX", 1)
    put, begun, most = runtime.put_program, 0, 0
    together: Callable[[], object] = lambda: True  # noqa: E731

    async def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal begun, most
        begun += 1
        most = max(most, begun)
        await until_true(together)
        path = await put(*args, **kwargs)
        begun -= 1
        return path

    monkeypatch.setattr(runtime, "put_program", counted)
    hosts = {name: fleet.section(name) for name in ("h1", "h2", "h3")}
    await fleet.start(fleet.open(**hosts), a="h1", b="h2", c="h3")
    assert most == 1
    together = lambda: begun == 3 or most == 3  # noqa: E731
    on = fleet.open(**hosts)
    await on.observe()
    async with asyncio.timeout(300), on.lock(list(hosts), "me"):
        assert most == 3


async def test_a_host_that_was_emptied_is_not_away_because_somebody_watched(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent that was asked how its units are had nothing more to say."""
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    await on.stop(grace_s=0)
    send, unanswered = AgentClient._send, []

    async def lossy(self: AgentClient, request: Request) -> None:
        if isinstance(request.ask, Observe):
            unanswered.append(request)
        else:
            await send(self, request)

    monkeypatch.setattr(AgentClient, "_send", lossy)
    looking = asyncio.create_task(on.observe())
    await until_true(lambda: unanswered)
    await on.forget(["h1"])
    await looking
    assert on.away == {}


@pytest.fixture
def mounted(fleet: Fleet) -> Iterator[Path]:
    """A host's directory that cannot be removed, as something is mounted there."""
    need(os.geteuid() == 0, "only root can mount")
    directory = fleet.directory("h1")
    directory.mkdir(parents=True)
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


async def test_a_directory_that_is_a_mount_is_emptied(fleet: Fleet, mounted: Path) -> None:
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    await on.stop(grace_s=0)
    (mounted / "said").unlink()
    await on.forget()
    assert list(mounted.iterdir()) == []


async def test_what_cannot_be_removed_is_not_forgotten(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    await on.stop(grace_s=0)
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_CLEAR", "echo it is busy >&2; exit 1")
        with pytest.raises(
            MvmciError, match=f"{fleet.directory('h1')} on h1 cannot be removed: .*it is busy"
        ):
            await on.forget()
    assert "h1" in json.loads((fleet.root / NAME / "hosts.json").read_bytes())


async def test_a_host_that_goes_as_it_is_examined_is_told_of(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = fleet.open(h1=fleet.section("h1"))
    await fleet.start(on, a="h1")
    on = fleet.open(h1=fleet.section("h1"))
    monkeypatch.setattr(runtime, "COMMAND_S", 0.0)
    found = await on.examine()
    (check,) = found["h1"]
    assert (check.name, check.ok) == ("ssh", False)
    assert check.found.startswith("h1 ends no `mvmci doctor` within 0 s")
