"""What `up` would do, and what is refused before anything is changed: no process, no broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import wasmtime

from mvmci.cli.init import HELLO, HELLO_WASM
from mvmci.cluster.broker import BrokerSettings, url_of
from mvmci.cluster.changes import Action, Observed
from mvmci.cluster.identity import Identity, Login
from mvmci.cluster.topology import BadTopology, read_topology
from mvmci.deploy import operate, up
from mvmci.deploy.plan import Plan, broker_of, configs_of, make_plan, settings_of
from mvmci.deploy.state import ClusterState, Facts
from mvmci.errors import LockHeld, PartlyApplied, StoreUnavailable, Usage, VersionsDiffer
from mvmci.jobs import module
from mvmci.runtimes.local import runtime
from mvmci.store import About, ClusterSettings, Member
from mvmci.system import keys
from mvmci.system.ports import is_loopback
from mvmci.trust.authority import Authority

SMALLEST = "cluster: demo\nworkers: {count: 1, slots: 2}\n"


def short(action: Action) -> str:
    return f"{action.kind} {action.unit.name} {action.why}".strip() if action.unit is not None else action.why


class Place:
    """A state directory, and what is in it before `make_plan` looks."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.state = ClusterState(root / "state", "demo")
        self.file = root / "topology.yaml"
        self.seen: list[Observed] = []

        async def observe(_: object) -> list[Observed]:
            return self.seen

        monkeypatch.setattr(runtime.Local, "observe", observe)

    async def plan(self, text: str = SMALLEST) -> Plan:
        self.file.write_text(text)
        return await make_plan(self.root / "state", self.file)

    async def lines(self, text: str = SMALLEST) -> list[str]:
        """What would change, in short."""
        return [*map(short, (await self.plan(text)).changes)]

    async def applied(self, text: str = SMALLEST, *, runs: bool = True) -> None:
        """As if `text` had been applied."""
        found = await self.plan(text)
        self.state.folder.mkdir(parents=True, exist_ok=True)
        settings = msgspec.structs.replace(
            broker_of(found.topology, None, self.state.runtime("local")), port=4000
        )
        facts = Facts(login=Login(urls=("nats://127.0.0.1:4000",)), broker=settings)
        if found.external is not None:
            facts = Facts(login=Login(urls=found.external.urls))
            authority = Authority.of_external(self.state.folder, found.external)
        else:
            authority = Authority.create(self.state.folder)
        self.state.keep_facts(facts)
        self.state.keep_applied(text.encode(), found.deployment)
        local = self.state.runtime("local")
        who = found.external or authority
        configs = configs_of(found.deployment, found.topology, local, (), who, settings)
        self.seen = [
            Observed(name=one.unit.name, role=one.unit.role, host=one.unit.host, state="ready", config=one)
            for one in configs
            if runs
        ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


@pytest.fixture
def memory_is_bounded() -> Iterator[None]:
    """Whoever takes much more than there was gets MemoryError, and the machine stays whole."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# ---- The modules that are inside


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ('(module (memory (export "memory") 1) (func (export "_start")))', up.NOTHING),
        (HELLO, HELLO_WASM),
    ],
    ids=["nothing", "hello"],
)
def test_the_modules_that_are_inside_are_what_their_text_says(text: str, data: bytes) -> None:
    assert bytes(wasmtime.wat2wasm(text)) == data
    assert module.inspect_module(data, name="x.wasm").kind == "command"


# ---- Plans


async def test_a_cluster_that_is_not_there_is_made(place: Place) -> None:
    assert await place.lines() == [
        f"the cluster demo is made in {place.state.folder}",
        "start broker-1",
        "start control-plane-1",
        "start worker-1",
    ]
    assert not place.state.root.exists()


async def test_a_cluster_that_an_up_has_begun_and_nothing_runs_of_is_said_to_be_down(place: Place) -> None:
    Authority.create(place.state.folder)
    found, local = read_topology(SMALLEST, name="x"), place.state.runtime("local")
    settings = msgspec.structs.replace(broker_of(found, None, local), port=4000)
    login = Login(urls=("nats://127.0.0.1:4000",))
    place.state.keep_facts(Facts(login=login, broker=settings))

    def nobody() -> Identity:
        raise StoreUnavailable("no broker answers")

    with pytest.raises(StoreUnavailable, match="demo is down here"):
        await operate.look(place.state, nobody)


async def test_of_a_file_that_never_ends_no_more_is_read_than_a_topology_may_have(
    place: Place, memory_is_bounded: None
) -> None:
    with pytest.raises(Usage, match=r"zero:1:1: the file has more than the 1,048,576 bytes"):
        await make_plan(place.state.root, Path("/dev/zero"))


async def test_what_is_as_the_file_says_is_left_alone(place: Place) -> None:
    await place.applied()
    for text in (SMALLEST, f"# a comment\n{SMALLEST}"):
        found = await place.plan(text)
        assert not found.changes
        assert not found.disturbs


async def test_what_is_down_is_started_with_the_settings_that_it_has(place: Place) -> None:
    await place.applied(runs=False)
    assert await place.lines() == ["start broker-1", "start control-plane-1", "start worker-1"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("allow: {http: ['*'], exec: []}", "allow.http becomes [*]"),
        ("allow: {exec: [git, make]}", "allow.exec becomes [git, make]"),
        ("retain: {jobs: 30d}", "retain.jobs becomes 30d"),
        ("retain: {logs: 90}", "retain.logs becomes 90s"),
    ],
)
async def test_what_units_read_by_themselves_changes_without_a_restart(
    place: Place, more: str, line: str
) -> None:
    await place.applied()
    found = await place.plan(f"{SMALLEST}{more}\n")
    assert (found.changes, found.disturbs) == ([Action(kind="set", why=line)], False)


async def test_what_the_broker_keeps_restarts_the_broker_alone(place: Place) -> None:
    await place.applied()
    assert await place.lines(f"{SMALLEST}durability: relaxed\n") == [
        "restart broker-1 durability becomes relaxed"
    ]
    assert await place.lines(f"{SMALLEST}broker: {{store: 20GiB}}\n") == [
        "broker.store becomes 20GiB",
        "restart broker-1 its store becomes 20GiB",
    ]
    assert (await place.plan(f"{SMALLEST}durability: relaxed\n")).disturbs


async def test_a_store_that_would_be_smaller_than_its_streams_is_refused_before_anything_is_changed(
    place: Place,
) -> None:
    """JetStream would not bring them back (its error 10047), and the cluster would stay down."""
    await place.applied(f"{SMALLEST}broker: {{store: 20GiB}}\n")
    with pytest.raises(Usage, match=r"can only grow: it is 20GiB, .* and the file says 10GiB"):
        await place.plan()
    assert await place.lines(f"{SMALLEST}broker: {{store: 20GiB}}\n") == []


async def test_a_broker_that_moves_restarts_all_and_keeps_its_port_unless_the_file_names_one(
    place: Place,
) -> None:
    await place.applied()
    found = await place.plan(f"{SMALLEST}broker: {{listen: 0.0.0.0}}\n")
    everybody = ["broker-1", "control-plane-1", "worker-1"]
    assert found.disturbs
    why = "the broker moves to 0.0.0.0, port 4000"
    assert [*map(short, found.changes)] == [f"restart {name} {why}" for name in everybody]
    found = await place.plan(f"{SMALLEST}broker: {{listen: '127.0.0.1:4001'}}\n")
    why = "the broker moves to 127.0.0.1, port 4001"
    assert [*map(short, found.changes)] == [f"restart {name} {why}" for name in everybody]


async def test_a_broker_that_is_to_move_is_dialled_where_it_is_until_somebody_is_at_work(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.applied()
    was = place.state.facts()

    @contextlib.asynccontextmanager
    async def lock(*_: object) -> AsyncIterator[None]:
        raise LockHeld("somebody else is at work on a host of it")
        yield

    monkeypatch.setattr(runtime.Local, "lock", lock)
    plan = await place.plan(f"{SMALLEST}broker: {{listen: '127.0.0.1:4001'}}\n")
    with pytest.raises(LockHeld, match="somebody else"):
        await up.Up(plan, say=lambda _: None, show=lambda _: None).run()
    assert place.state.facts() == was


async def test_the_time_in_which_units_leave_does_not_count_as_that_to_be_ready_in(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may have jobs that take all of its grace."""
    within_s = 0.5
    await place.applied()

    async def stop(*_: object) -> bool:
        await asyncio.sleep(2 * within_s)
        raise Usage("they have left")

    async def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("no broker answers")

    monkeypatch.setattr(runtime.Local, "stop", stop)
    monkeypatch.setattr(up, "open_cluster", away)
    plan = await place.plan(f"{SMALLEST}durability: relaxed\n")
    with pytest.raises(PartlyApplied, match="they have left"):
        await up.Up(plan, say=lambda _: None, show=lambda _: None, within_s=within_s).run()


async def test_a_host_that_is_reached_otherwise_is_written_down(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.applied()
    monkeypatch.setattr(runtime.Local, "rerouted", lambda _: ["h1"])
    found = await place.plan()
    assert [*map(short, found.changes)] == ["host h1 is reached otherwise"]
    assert not found.disturbs


async def test_a_host_that_is_lost_is_given_up_in_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.applied()
    lost = {"h1": {"worker-2": "worker", "worker-3": "worker"}, "h2": {}}
    monkeypatch.setattr(runtime.Local, "lost", lambda _: lost)
    found = await place.plan()
    assert [*map(short, found.changes)] == [
        "host h1 is lost: what ran there is given up (worker-2, worker-3), and its keys are revoked",
        "host h2 is lost: no unit was there",
    ]
    assert not found.disturbs


async def test_the_host_of_the_broker_is_not_given_up_nor_the_last_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.applied()
    monkeypatch.setattr(runtime.Local, "lost", lambda _: {"a": {"broker-1": "broker"}})
    text = f"{SMALLEST}hosts:\n  a:\n    state: lost\n  b: {{}}\n"
    with pytest.raises(BadTopology) as caught:
        await place.plan(text)
    (problem,) = caught.value.problems
    assert (problem.where, problem.message) == (
        f"{place.file}:5:12",
        "the broker is on `a`, and all jobs with it",
    )
    assert "`mvmci restore` makes one of a back-up" in (problem.hint or "")
    monkeypatch.undo()
    with pytest.raises(BadTopology, match=r"topology\.yaml:4:3: no host is left"):
        await place.plan(f"{SMALLEST}hosts:\n  a: {{state: lost}}\n  b: {{state: absent}}\n")


async def test_a_change_of_units_is_said_once(place: Place) -> None:
    await place.applied()
    assert await place.lines("cluster: demo\nworkers: {count: 2, slots: 3}\nbroker: {listen: 0.0.0.0}\n") == [
        "restart broker-1 the broker moves to 0.0.0.0, port 4000",
        "restart control-plane-1 the broker moves to 0.0.0.0, port 4000",
        "restart worker-1 without --slots=2, with --slots=3, the broker moves to 0.0.0.0, port 4000",
        "start worker-2",
    ]


async def test_a_unit_that_was_refused_is_tried_again(place: Place) -> None:
    await place.applied()
    down = {"state": "down", "given_up": True, "last_exit": 7, "reason": "it was revoked"}
    place.seen[-1] = msgspec.structs.replace(place.seen[-1], **down)
    assert await place.lines() == ["start worker-1 is down: it was revoked"]


async def test_another_build_of_the_program_restarts_all_but_a_broker_of_the_same_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.applied()
    monkeypatch.setattr("mvmci.deploy.plan.program_digest", lambda: "another")
    old = msgspec.structs.replace(place.seen[0].config, program="of another server")
    assert await place.lines(SMALLEST.replace("count: 1", "count: 2")) == [
        "restart control-plane-1 the program changes",
        "restart worker-1 the program changes",
        "start worker-2",
    ]
    place.seen[0] = msgspec.structs.replace(place.seen[0], config=old)
    assert "restart broker-1 the program changes" in await place.lines()


# ---- Moves

MOVE = "each worker drains and switches; running jobs finish or are resumed, queued ones stay queued"


async def test_another_access_moves_the_workers_and_what_becomes_of_jobs_is_said(place: Place) -> None:
    await place.applied()
    assert await place.lines(f"{SMALLEST}access: peer\n") == [
        f"engine becomes broker: {MOVE}",
        "start executor-1",
    ]
    found = await place.plan(f"{SMALLEST}access: peer\n")
    assert found.moves
    assert found.disturbs


async def test_what_workers_leave_is_stopped_when_they_have(place: Place) -> None:
    await place.applied(f"{SMALLEST}access: pool\nexecutors: {{count: 2}}\n")
    assert await place.lines() == [
        f"engine becomes embedded: {MOVE}",
        "stop executor-1 once no worker uses it",
        "stop executor-2 once no worker uses it",
    ]


async def test_an_executor_keeps_its_door_open_until_the_last_worker_has_left(place: Place) -> None:
    await place.applied(f"{SMALLEST}access: shared\n")
    (executor,) = (unit for unit in place.state.applied_deployment().units if unit.role == "executor")
    assert await place.lines(f"{SMALLEST}access: peer\n") == [
        f"engine becomes broker: {MOVE}",
        f"restart executor-1 without --listen={executor.listen}, once no worker uses it",
    ]


async def test_a_pool_that_shrinks_moves_nobody(place: Place) -> None:
    await place.applied(f"{SMALLEST}access: pool\nexecutors: {{count: 2}}\n")
    assert await place.lines(f"{SMALLEST}access: pool\nexecutors: {{count: 1}}\n") == ["stop executor-2"]


async def test_a_pool_that_grows_behind_the_broker_moves_nobody(place: Place) -> None:
    await place.applied(f"{SMALLEST}access: pool\nexecutors: {{count: 1}}\n")
    found = await place.plan(f"{SMALLEST}access: pool\nexecutors: {{count: 2}}\n")
    assert (found.moves, found.disturbs) == (False, False)
    assert [*map(short, found.changes)] == ["start executor-2"]


async def test_where_nothing_runs_nobody_moves(place: Place) -> None:
    await place.applied(runs=False)
    found = await place.plan(f"{SMALLEST}access: peer\n")
    assert short(found.changes[0]) == f"engine becomes broker: {MOVE}"
    assert not found.moves


async def test_where_units_listen_is_known_beforehand_and_stays_as_long_as_they_do(place: Place) -> None:
    text = f"{SMALLEST}access: shared\n"
    found = await place.plan(text)
    (executor,) = (unit for unit in found.deployment.units if unit.role == "executor")
    assert executor.listen
    assert executor.listen.startswith("127.0.0.1:")
    assert found.deployment.engine == f"http://{executor.listen}"
    assert await place.plan(text) == found
    assert not place.state.root.exists()


# ---- One broker


async def test_a_cluster_keeps_to_its_broker(place: Place) -> None:
    await place.applied()
    with pytest.raises(Usage, match="cannot change to another broker"):
        await place.plan(f"{SMALLEST}broker: {{url: 'tls://x:1'}}\n")


async def test_a_cluster_of_a_lent_broker_keeps_to_it_too(place: Place) -> None:
    external = f"{SMALLEST}broker: {{url: 'tls://x:1'}}\n"
    await place.applied(external)
    assert await place.lines(external) == []
    for other in (SMALLEST, external.replace("x:1", "x:2")):
        with pytest.raises(Usage, match="cannot change to another broker"):
            await place.plan(other)


async def test_a_cluster_keeps_to_its_runtime_where_its_broker_is(place: Place) -> None:
    await place.applied()
    facts = place.state.facts()
    assert facts is not None
    place.state.keep_facts(msgspec.structs.replace(facts, runtime="elsewhere"))
    with pytest.raises(Usage, match="cannot change to runtime local, from elsewhere: its jobs lie in"):
        await place.plan()


async def test_credentials_are_looked_for_beside_the_file(place: Place) -> None:
    text = f"{SMALLEST}broker: {{url: 'tls://x:1', credentials: my.creds}}\n"
    with pytest.raises(Usage, match=r"my\.creds, which `broker\.credentials` names, cannot be read"):
        await place.plan(text)
    (place.root / "my.creds").write_text("nothing of the kind")
    with pytest.raises(Usage, match=r"my\.creds is no \.creds file"):
        await place.plan(text)


async def test_other_credentials_restart_everybody(place: Place) -> None:
    creds = place.root / "my.creds"
    creds.write_text(f"eyJ.a.b\n{keys.new_seed('user')}\n")
    text = f"{SMALLEST}broker: {{url: 'tls://x:1', credentials: {creds}}}\n"
    await place.applied(text)
    assert await place.lines(text) == []
    creds.write_text(f"eyJ.a.b\n{keys.new_seed('user')}\n")
    assert await place.lines(text) == [
        "restart control-plane-1 the broker's credentials change",
        "restart worker-1 the broker's credentials change",
    ]


async def test_a_folder_of_another_version_is_refused(place: Place) -> None:
    place.state.folder.mkdir(parents=True)
    (place.state.folder / "version").write_text("2\n")
    with pytest.raises(VersionsDiffer) as caught:
        await place.plan()
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("kept", ["client.json", "units/box/identity.json"], ids=["client", "worker"])
async def test_a_cluster_that_was_brought_up_elsewhere_is_neither_hidden_nor_forgotten(
    place: Place, kept: str
) -> None:
    login = place.state.folder / kept
    login.parent.mkdir(parents=True)
    login.write_text("{}")
    for change in (
        place.plan(),
        operate.down(place.state),
        operate.down(place.state, purge=True),
    ):
        with pytest.raises(
            StoreUnavailable, match="the keys of cluster demo are not on this machine"
        ) as caught:
            await change
        assert "--state" in str(caught.value.hint)
    assert [path for path in place.state.root.rglob("*") if path.is_file()] == [login]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "hosts: {a: {}, b: {}, c: {}}\nbroker: {hosts: [a, b, c]}",
            "a replicated broker is not in this version",
        ),
    ],
)
async def test_what_a_later_version_will_do_is_refused_in_a_sentence(
    place: Place, more: str, sentence: str
) -> None:
    with pytest.raises(Usage) as caught:
        await place.plan(f"{SMALLEST}{more}\n")
    assert caught.value.message.endswith(f": {sentence}")
    assert caught.value.hint


def test_settings_are_what_the_file_says() -> None:
    text = f"""{SMALLEST}
allow: {{http: ["https://a/*"], exec: [git]}}
retain: {{jobs: 1h, logs: 1m}}
broker: {{store: 1GiB}}
min_isolation: confined
isolation: per-job
"""
    assert settings_of(read_topology(text, name="a"), "broker") == ClusterSettings(
        allow_http=("https://a/*",),
        allow_exec=("git",),
        jobs_ms=3_600_000,
        logs_ms=60_000,
        store_bytes=1 << 30,
        queues=("default",),
        min_isolation="confined",
        isolation="per-job",
        engine="broker",
    )


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1", "nats://127.0.0.1:4222"),
        ("0.0.0.0", "tls://127.0.0.1:4222"),
        ("::", "tls://127.0.0.1:4222"),
        ("10.0.0.5", "tls://10.0.0.5:4222"),
        ("fd00::1", "tls://[fd00::1]:4222"),
        ("::1", "nats://[::1]:4222"),
    ],
)
def test_units_here_dial_what_is_nearest(listen: str, url: str) -> None:
    tls = not is_loopback(listen)
    assert url_of(BrokerSettings(listen=listen, port=4222), tls=tls) == url


@pytest.mark.parametrize(
    ("url", "far"),
    [
        ("tls://127.0.0.1:1", False),
        ("tls://[::1]:1", False),
        ("tls://[fe80::1]:1", False),
        ("tls://10.0.0.5:1", True),
        ("tls://[fd00::1]:1", True),
        ("tls://ci.example.com:1", True),
    ],
)
def test_other_machines_are_told_addresses_that_they_can_dial(url: str, far: bool) -> None:
    assert up._is_far(url) is far


def test_where_a_broker_is_advertised_it_is_dialled() -> None:
    places = ("ci.example.com", "10.0.0.5:443", "[fd00::1]", "[fd00::1]:443")
    assert up._urls_at(places, 4222) == (
        "tls://ci.example.com:4222",
        "tls://10.0.0.5:443",
        "tls://[fd00::1]:4222",
        "tls://[fd00::1]:443",
    )


async def test_another_address_to_advertise_changes_no_unit(place: Place) -> None:
    open_to_all = SMALLEST + "broker: {listen: '0.0.0.0:4000'}\n"
    await place.applied(open_to_all)
    told = await place.lines(open_to_all.replace("4000'", "4000', advertise: [a, 'b:443']"))
    assert told == ["broker.advertise becomes [a, b:443]"]


def holding(role: str, *jobs: str) -> Member:
    return Member(
        unit=f"{role}-1",
        incarnation="i",
        holds=tuple(f"{job}@1" for job in jobs),
        about=About(role=role, slots=2),
    )


@pytest.mark.parametrize(
    ("members", "engine", "full"),
    [
        ([], "embedded", False),
        ([holding("worker", "a", "b")], "embedded", True),
        ([holding("worker", "a", "b"), holding("worker", "c")], "embedded", False),
        ([holding("worker", "a", "proof")], "embedded", False),
        ([holding("worker", "a", "b")], "broker", False),
        ([holding("worker"), holding("executor", "a", "b", "c")], "http://x", True),
    ],
)
def test_a_cluster_is_full_when_every_engine_that_is_used_is(
    members: list[Member], engine: str, full: bool
) -> None:
    assert up._is_full(members, engine, "proof") is full


# ---- The lock


def test_one_at_a_time_is_at_work_and_the_other_is_told_who(tmp_path: Path) -> None:
    home = ClusterState(tmp_path, "demo")
    home.check_free()
    assert not home.folder.exists()
    with home.lock():
        assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
        for other in (home.check_free, home.lock().__enter__):
            with pytest.raises(LockHeld) as caught:
                other()
            assert caught.value.message.startswith(f"process {os.getpid()} of ")
            assert caught.value.message.endswith("Z, is at work on demo")
            assert caught.value.exit_code == 5
    home.check_free()
    with home.lock():
        pass
    assert (home.folder / "lock").read_text() == ""


def test_a_lock_is_let_go_after_a_failure_too(tmp_path: Path) -> None:
    home = ClusterState(tmp_path, "demo")
    with pytest.raises(ZeroDivisionError), home.lock():
        raise ZeroDivisionError
    home.check_free()


async def test_a_plan_that_has_been_overtaken_is_not_applied(place: Place) -> None:
    plan = await place.plan()
    await place.applied()
    doing = up.Up(plan, say=print, show=print)
    with pytest.raises(up.Overtaken) as caught:
        await doing.run()
    assert caught.value.message == "demo has changed meanwhile"
    assert not doing.begun
    place.state.check_free()


# ---- Who can be drained


def test_a_unit_that_has_just_started_is_what_its_runtime_says() -> None:
    worker = Observed(name="worker-1", role="worker", host="local")
    silent = Member(unit="worker-1", incarnation="new")
    by_hand = Member(unit="mac-7", incarnation="i", about=About(role="executor"))
    assert operate._roles([silent, by_hand], [worker]) == {"worker-1": "worker", "mac-7": "executor"}
    assert operate._roles([silent], []) == {}
