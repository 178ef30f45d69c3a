"""The life of a unit, on a cluster that is made up: it joins, follows, drains, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mvmci.cli import units
from mvmci.cluster.identity import Identity, Login
from mvmci.cluster.witness import Loss
from mvmci.errors import (
    EXIT_LOCKED,
    LockHeld,
    MvmciError,
    StoreUnavailable,
    TicketRefused,
    Usage,
    VersionsDiffer,
)
from mvmci.roles import unit
from mvmci.roles.unit import Role, UnitOptions, join, run_unit
from mvmci.store import About, ClusterSettings
from mvmci.stores.nats.config import Setting
from mvmci.system.files import private_folder
from mvmci.system.lock import hold

IDENTITY = Identity(cluster="demo", unit="w1", role="worker", login=Login(urls=("nats://x",)))
LONG_S = 30.0
LONG_MS = 3_600_000


class Config:
    """The bucket of a cluster, in memory. Who watches hears of every change."""

    def __init__(self) -> None:
        self.values = {"settings": msgspec.json.encode(ClusterSettings())}
        self.newer = False  # whether the cluster speaks at a level that is not known here
        self._watching: list[tuple[str, Callable[[str], None]]] = []

    async def get(self, key: str) -> Setting | None:
        return Setting(self.values[key], 1) if key in self.values else None

    async def settings(self) -> ClusterSettings:
        if self.newer:
            raise VersionsDiffer("the cluster is newer")
        return msgspec.json.decode(self.values["settings"], type=ClusterSettings)

    async def loss(self) -> Loss | None:
        return msgspec.json.decode(self.values["loss"], type=Loss) if "loss" in self.values else None

    async def watch(self, pattern: str, changed: Callable[[str], None]) -> None:
        self._watching.append((pattern, changed))

    def change(self, key: str, value: bytes | None) -> None:
        if value is None:
            del self.values[key]
        else:
            self.values[key] = value
        for pattern, changed in self._watching:
            if pattern == key or (key == "loss" and pattern == "settings"):  # that is how it is told
                changed(key)


class Fake:
    """A cluster and a role in it. `events` are what happened, in order; `saw` waits for one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[str] = []
        self._happened = asyncio.Condition()
        self.about = About()  # what it told last of itself
        self.away = 0  # how often the broker is away yet
        self.idle = asyncio.Event()  # ends a drain
        self.failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.config = Config()
        self.link = SimpleNamespace(refused=asyncio.Event(), failure=None, on_reconnect=[])
        presence = SimpleNamespace(unit="w1", describe=self._describe)
        self.cluster: Any = SimpleNamespace(
            config=self.config, link=self.link, store=SimpleNamespace(presence=presence), close=self._close
        )

    async def event(self, event: str) -> None:
        async with self._happened:
            self.events.append(event)
            self._happened.notify_all()

    async def saw(self, event: str, times: int = 1) -> None:
        async with asyncio.timeout(LONG_S), self._happened:
            await self._happened.wait_for(lambda: self.events.count(event) >= times)

    async def open(self, identity: Identity, *, maintains: bool) -> Any:
        assert identity is IDENTITY
        if self.away:
            self.away -= 1
            await self.event("away")
            raise StoreUnavailable("no broker answers")
        return self.cluster

    async def _close(self) -> None:
        await self.event("closed")

    async def _describe(self, about: About) -> None:
        self.about = about
        await self.event(about.state)

    async def _run(self) -> None:
        await self.event("runs")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fail())
        finally:
            await self.event("handed back")

    async def _fail(self) -> None:
        await self.failing

    async def _apply(self, settings: ClusterSettings) -> None:
        await self.event(f"engine {settings.engine}")

    async def _drain(self) -> None:
        await self.event("drains")
        await self.idle.wait()
        await self.event("drained")

    def _resume(self) -> None:
        self.events.append("resumed")

    @asynccontextmanager
    async def role(self, cluster: Any) -> AsyncIterator[Role]:
        assert cluster is self.cluster
        try:
            yield Role(
                about=About(role="worker"),
                run=self._run,
                apply_settings=self._apply,
                drain=self._drain,
                resume=self._resume,
            )
        finally:
            await self.event("engine closed")

    def start(self, grace_ms: int = LONG_MS) -> asyncio.Task[Any]:
        return asyncio.create_task(
            run_unit(IDENTITY, self.folder / "identity.json", self.role, grace_ms=grace_ms)
        )


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    made = Fake(tmp_path)
    monkeypatch.setattr(unit, "open_cluster", made.open)
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("gc.set_threshold", lambda _: None)
    return made


async def ended(running: asyncio.Task[Any]) -> BaseException | None:
    """How a unit ended, which has to be by raising."""
    async with asyncio.timeout(LONG_S):
        await asyncio.wait([running])
    return None if running.cancelled() else running.exception()


LEFT = ["handed back", "engine closed", "closed"]


async def test_a_unit_waits_for_its_broker_and_then_says_what_it_is(fake: Fake) -> None:
    fake.away = 2
    running = fake.start()
    await fake.saw("runs")
    assert fake.events[:3] == ["away", "away", "ready"]
    fake.idle.set()
    running.cancel()
    assert await ended(running) is None


async def test_the_first_signal_drains_while_the_role_goes_on(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("runs")
    running.cancel()
    await fake.saw("drains")
    assert "handed back" not in fake.events
    fake.idle.set()
    assert await ended(running) is None
    assert running.cancelled()
    assert fake.events[-4:] == ["drained", *LEFT]


async def test_the_second_signal_hands_back_what_is_in_work(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("runs")
    running.cancel()
    await fake.saw("drains")
    running.cancel()
    assert await ended(running) is None
    assert "drained" not in fake.events
    assert fake.events[-3:] == LEFT


async def test_a_drain_ends_with_the_grace(fake: Fake) -> None:
    running = fake.start(grace_ms=1)
    await fake.saw("runs")
    running.cancel()
    assert await ended(running) is None
    assert "drained" not in fake.events
    assert fake.events[-4:] == ["drains", *LEFT]


async def test_a_refused_credential_ends_it_with_its_exit_code_and_without_a_drain(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("runs")
    fake.link.failure = TicketRefused("w1 was revoked")
    fake.link.refused.set()
    failure = await ended(running)
    assert failure is fake.link.failure
    assert failure.exit_code == 7
    assert "drains" not in fake.events
    assert fake.events[-3:] == LEFT


async def test_what_fails_in_a_group_of_the_role_ends_it_as_itself(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("runs")
    failure = Usage("the port is in use")
    fake.failing.set_exception(failure)
    assert await ended(running) is failure
    assert "drains" not in fake.events
    assert fake.events[-3:] == LEFT


async def test_settings_are_applied_when_they_change(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("engine embedded")
    fake.config.change("settings", msgspec.json.encode(ClusterSettings(engine="broker")))
    await fake.saw("engine broker")
    running.cancel()
    fake.idle.set()
    await ended(running)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("drain.w1", b"1", (True, "")),
        (
            "loss",
            msgspec.json.encode(Loss(at=1, what=("JOBS is gone",))),
            (False, "the store lacks records: see `mvmci recover`"),
        ),
    ],
    ids=["by the verb", "for want of records"],
)
async def test_it_drains_as_long_as_the_cluster_says_so_or_lacks_records_and_tells_which(
    fake: Fake, key: str, value: bytes, why: tuple[bool, str]
) -> None:
    running = fake.start()
    await fake.saw("engine embedded")
    fake.config.change(key, value)
    await fake.saw("draining")
    told = fake.about.drained, fake.about.trouble
    fake.config.change(key, None)
    await fake.saw("ready", times=3)  # announced, at first, and again
    assert [event for event in fake.events if event in ("drains", "drained", "resumed")] == [
        "drains",
        "resumed",
    ]
    running.cancel()
    fake.idle.set()
    await ended(running)
    assert told == why


async def test_it_touches_the_file_that_says_it_is_ready(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVMCI_READY_FILE", str(tmp_path / "ready"))
    running = fake.start()
    async with asyncio.timeout(LONG_S):
        while not (tmp_path / "ready").exists():  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.01)
    running.cancel()
    fake.idle.set()
    await ended(running)


async def test_a_unit_is_one_process_of_a_machine_and_the_second_is_told_which(
    fake: Fake, tmp_path: Path
) -> None:
    path = tmp_path / "w1" / "identity.json"
    with hold(private_folder(path.parent) / "lock", "is w1", "stop it"):
        with pytest.raises(LockHeld, match=f"process {os.getpid()} of .* is w1 already") as caught:
            await run_unit(IDENTITY, path, fake.role, grace_ms=1)
        assert caught.value.exit_code == EXIT_LOCKED
        assert "--name" in str(caught.value.hint)
    assert fake.events == []


async def test_only_who_is_patient_waits_for_a_cluster_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[MvmciError] = []

    async def identity_of(*_: Any, **__: Any) -> tuple[Identity, Path]:
        if not tries:
            tries.append(StoreUnavailable("nobody answers"))
            raise tries[0]
        return IDENTITY, Path("nowhere")

    monkeypatch.setattr(unit, "identity_of", identity_of)
    monkeypatch.setattr(unit, "JOIN_PAUSE_S", 0.0)
    options = UnitOptions(state=Path("state"), grace_ms=1)
    with pytest.raises(StoreUnavailable, match="nobody answers"):
        await join(options, "worker")
    tries.clear()
    patient = UnitOptions(state=Path("state"), patient=True, grace_ms=1)
    assert await join(patient, "worker") == (IDENTITY, Path("nowhere"))


VERBS = pytest.mark.parametrize(
    "verb", [units.worker_verb, units.executor_verb, units.control_plane_verb], ids=lambda verb: verb.name
)


@VERBS
def test_a_level_of_the_log_that_there_is_not_is_refused_in_a_sentence(
    verb: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MVMCI_LOG", "loud")
    with pytest.raises(Usage, match="MVMCI_LOG is 'loud'") as refused:
        verb.main(["--state", str(tmp_path)], standalone_mode=False)
    assert refused.value.exit_code == 2
    assert refused.value.hint


@pytest.mark.parametrize("level", ["debug", "Info", "WARNING", "error", ""])
def test_the_usual_levels_are_taken_in_any_case(
    level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[int] = []

    def take(**options: Any) -> None:
        taken.append(logging.getLevelNamesMapping()[options["level"]])

    monkeypatch.setattr(logging, "basicConfig", take)
    monkeypatch.setenv("MVMCI_LOG", level)
    with pytest.raises(StoreUnavailable, match="no cluster is known"):
        units.worker_verb.main(["--state", str(tmp_path)], standalone_mode=False)
    assert taken == [logging.getLevelNamesMapping()[level.upper() or "INFO"]]


async def test_where_the_cluster_becomes_newer_it_sees_to_what_is_in_work_and_ends(fake: Fake) -> None:
    running = fake.start()
    await fake.saw("engine embedded")
    fake.config.newer = True
    fake.config.change("settings", b"{}")
    await fake.saw("drains")
    assert "handed back" not in fake.events
    assert fake.about.state == "draining"
    fake.idle.set()
    failure = await ended(running)
    assert isinstance(failure, VersionsDiffer)
    assert failure.exit_code == 8
    assert fake.events[-4:] == ["drained", *LEFT]


async def test_where_the_cluster_is_newer_it_does_not_begin(fake: Fake) -> None:
    fake.config.newer = True
    assert isinstance(await ended(fake.start()), VersionsDiffer)
    assert fake.events == ["closed"]
