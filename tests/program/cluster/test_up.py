"""`up` and what goes with it: a cluster is what its file says, and twice is once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.deploy.state import ClusterState
from mvmci.store import ClusterSettings
from mvmci.stores import open_cluster
from mvmci.trust.authority import Authority
from tests.harness.cluster import BUSY, SMALLEST, Cluster
from tests.harness.program import TIME, Mvmci, assert_sentence, files_in
from tests.harness.server import serving
from tests.harness.waiting import until

Make = Callable[..., Cluster]
Guest = Callable[[str], Path]
UNITS = ["broker-1", "control-plane-1", "worker-1", "worker-2", "worker-3"]
PLANE = ["broker-1", "control-plane-1"]
WORKERS = ["worker-1", "worker-2", "worker-3"]
STATUS_KEYS = ["cluster", "access", "runtime", "units", "loss", "trouble", "store", "hosts"]
KEYS = ["name", "role", "host", "state", "pid", "slots", "busy", "queues", "isolation", "version"]
KEYS += ["reason", "labels", "address", "drained", "build"]


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Any:
    """The cluster that tests share is left as it was found."""
    yield
    if "demo" in request.fixturenames:
        demo: Cluster = request.getfixturevalue("demo")
        assert demo.file.read_text() == SMALLEST
        demo.all_ready()


def snapshot(cluster: Cluster) -> dict[Path, int]:
    """When each file of the cluster was written last; without what its units write by themselves."""
    return {
        path: path.stat().st_mtime_ns
        for path in files_in(cluster.folder)
        if "broker" not in path.parts and path.name not in ("log", "client.json", "witness.json")
    }


# ---- A cluster that runs


def test_up_returns_when_every_unit_is_ready_and_a_real_job_has_run(cluster: Make) -> None:
    demo = cluster()
    told = demo.up("--json").json
    assert list(told) == [*STATUS_KEYS, "ticket_file", "url"]
    assert (told["cluster"], told["access"], told["runtime"]) == ("demo", "per-worker", "local")
    assert [unit["name"] for unit in told["units"]] == UNITS
    assert {unit["state"] for unit in told["units"]} == {"ready"}
    assert told["url"].startswith("nats://127.0.0.1:")
    ticket = Path(told["ticket_file"])
    assert ticket.read_text().startswith("mvmci1_")
    assert stat.S_IMODE(ticket.stat().st_mode) == 0o600
    assert stat.S_IMODE(demo.folder.stat().st_mode) == 0o700
    (job,) = demo.mvmci("list", "--all", "--json").json
    assert (job["status"], job["worker"] in WORKERS) == ("succeeded", True)
    assert demo.mvmci("list", "--json").json == []  # among one's own jobs it is not


def test_what_units_say_can_be_read_with_times_in_utc(demo: Cluster) -> None:
    for unit, words in (("worker-1", "has joined demo"), ("supervisor", "worker-3 is started: process")):
        done = demo.mvmci("logs", "--unit", unit, TZ="Asia/Tokyo")
        assert (done.code, done.err) == (0, "")
        assert words in done.text
        assert all(TIME.match(line) for line in done.text.splitlines())
    assert "[INF] Server is ready" in demo.mvmci("logs", "--unit", "broker-1").text
    following = demo.mvmci.start("logs", "--unit", "worker-2", "-f")
    following.hears("has joined demo")
    following.signal(signal.SIGINT)
    assert following.end().code == 130
    assert_sentence(
        demo.mvmci("logs", "--unit", "worker-9"), 2, "no unit worker-9 of demo", "broker-1, control-plane-1"
    )
    assert demo.mvmci("logs", "--unit", "worker-1", "a").code == 2
    assert demo.mvmci("logs").code == 2


def test_the_shell_is_offered_what_the_cluster_has(demo: Cluster) -> None:
    def offered(words: str) -> list[str]:
        asked = {"COMP_WORDS": f"mvmci {words}", "COMP_CWORD": str(words.count(" ") + 1)}
        done = demo.mvmci(**asked, _MVMCI_COMPLETE="bash_complete")
        assert done.err == ""
        return [line.partition(",")[2] for line in done.text.splitlines()]

    (job,) = demo.jobs()
    # A shell does not wait for a cluster for longer than a second, which a busy machine may take.
    until(lambda: offered(f"logs {job[:3]}") == [job])
    assert offered("drain w") == WORKERS
    assert offered("logs --unit ") == [*UNITS, "supervisor"]
    until(lambda: offered("submit --queue ") == ["default"])
    assert offered("ps --cluster ") == ["demo"]


def test_ps_tells_of_each_unit(demo: Cluster) -> None:
    told = demo.ps()
    assert list(told) == STATUS_KEYS
    for unit in told["units"]:
        assert list(unit) == KEYS
        assert Path(f"/proc/{unit['pid']}").exists()
        assert unit["host"] == "local"
        assert (unit["address"] or "").startswith("nats://127.0.0.1:") == (unit["role"] == "broker")
    roles = [unit["role"] for unit in told["units"]]
    assert roles == ["broker", "control-plane", "worker", "worker", "worker"]
    for unit in told["units"][2:]:
        assert (unit["slots"], unit["busy"], unit["queues"]) == (2, 0, ["default"])
        assert unit["isolation"]
        assert unit["version"]
    server = Path(f"/proc/{told['units'][0]['pid']}/cmdline").read_bytes().split(b"\0")[0]
    assert server.endswith(b"/nats-server")  # the process that does the work, and none around it
    assert "worker-3" in demo.mvmci("ps").text


def test_up_again_changes_nothing_and_says_so(demo: Cluster) -> None:
    before, pids = snapshot(demo), demo.pids()
    done = demo.up()
    assert done.text == "nothing to change: 5 units of demo are ready\n"
    assert (snapshot(demo), demo.pids()) == (before, pids)
    told = demo.up("--json")
    assert told.json["units"] == demo.ps()["units"]
    assert "nothing to change" in told.err


def test_plan_says_what_up_would_do_and_changes_nothing(demo: Cluster) -> None:
    before, pids = snapshot(demo), demo.pids()
    same = demo.mvmci("plan", demo.file, "--exit-code")
    assert (same.code, same.text) == (0, "nothing to change\n")
    demo.write("cluster: demo\nworkers: {count: 2, slots: 1}\nretain: {logs: 1h}\n")
    other = demo.mvmci("plan", demo.file, "--exit-code")
    assert other.code == 3
    assert other.text.splitlines() == [
        "* retain.logs becomes 1h",
        "~ restart worker-1 on local: without --slots=2, with --slots=1",
        "~ restart worker-2 on local: without --slots=2, with --slots=1",
        "- stop worker-3 on local",
    ]
    assert demo.mvmci("plan", demo.file).code == 0
    told = demo.mvmci("plan", demo.file, "--json").json
    assert told["settings"] == ["retain.logs becomes 1h"]
    assert [(one["kind"], one["name"]) for one in told["changes"]] == [
        ("restart", "worker-1"),
        ("restart", "worker-2"),
        ("stop", "worker-3"),
    ]
    demo.write(SMALLEST)
    assert (snapshot(demo), demo.pids()) == (before, pids)


def test_a_worker_that_was_drained_is_as_it_is_to_be(demo: Cluster) -> None:
    assert demo.mvmci("drain", "worker-2").code == 0
    assert demo.mvmci("plan", demo.file, "--exit-code").code == 0
    same = "nothing to change: 5 units of demo are ready, but worker-2: drained by `mvmci drain`\n"
    assert demo.up().text == same
    demo.write(SMALLEST + "retain: {logs: 1h}\n")
    done = demo.up()
    assert "worker-2 is drained: `mvmci drain worker-2 --undo` lets it take jobs\n" in done.text
    assert "demo is ready: a job has run\n" in done.text
    assert demo.units()["worker-2"]["drained"]
    assert demo.mvmci("drain", "worker-2", "--undo").code == 0
    demo.write(SMALLEST)
    demo.up()


def test_each_up_leaves_the_one_ticket_that_lies_there(demo: Cluster) -> None:
    def still_open() -> list[str]:
        return [one["id"] for one in demo.mvmci("ticket", "ls", "--json").json if one["state"] == "open"]

    there = still_open()
    demo.write(SMALLEST + "retain: {logs: 2h}\n")
    demo.up()
    assert still_open() == there
    demo.write("cluster: demo\nworkers: {count: 3, slots: 2, queues: [default, more]}\n")
    demo.up()
    (changed,) = still_open()
    assert changed not in there
    demo.write(SMALLEST)
    demo.up()
    assert len(still_open()) == 1


def test_another_count_touches_only_those_that_come_or_go(demo: Cluster, guest: Guest) -> None:
    before = demo.pids()
    demo.write(SMALLEST.replace("3", "4"))
    assert "+ start worker-4 on local\n" in demo.up().text
    more = demo.pids()
    assert more.pop("worker-4")
    assert more == before
    # Fewer: those that go finish what they have.
    jobs = sleepers(demo, guest, 8)
    until(lambda: max(unit["busy"] for unit in list(demo.units().values())[-2:]), demo.ps)
    demo.write(SMALLEST.replace("3", "2"))
    done = demo.up()
    assert [status["name"] for status in told_by_the_supervisor(demo)] == UNITS[:-1]
    assert "- stop worker-3 on local\n- stop worker-4 on local\n" in done.text
    fewer = demo.pids()
    assert list(fewer) == UNITS[:-1]
    assert fewer.items() <= before.items()
    assert demo.mvmci("wait", *jobs).code == 0
    demo.write(SMALLEST)
    demo.up()
    assert list(demo.pids()) == UNITS


def sleepers(cluster: Cluster, guest: Guest, count: int, ticks: int = 100) -> list[str]:
    """So many jobs of 50 ms a tick, which may be tried once."""
    line = json.dumps({"module": str(guest("sleeper")), "args": ["50", str(ticks)], "attempts": 1}) + "\n"
    return cluster.mvmci("submit", "--batch", "-", stdin=(count * line).encode()).text.split()


def told_by_the_supervisor(cluster: Cluster) -> Any:
    return json.loads((cluster.folder / "units.json").read_text())["units"]


def test_other_slots_restart_the_workers_and_nobody_else(demo: Cluster) -> None:
    before = demo.pids()
    demo.write(SMALLEST.replace("slots: 2", "slots: 3"))
    demo.up()
    after = demo.units()
    assert {after[name]["slots"] for name in WORKERS} == {3}
    assert {name for name in UNITS if after[name]["pid"] == before[name]} == set(PLANE)
    demo.write(SMALLEST)
    demo.up()


def test_another_durability_restarts_the_broker_and_nobody_else(demo: Cluster) -> None:
    before, jobs = demo.pids(), demo.jobs()
    demo.write(SMALLEST + "durability: relaxed\n")
    done = demo.up()
    assert "~ restart broker-1 on local: durability becomes relaxed\n" in done.text
    assert "warning: durability is relaxed: a power cut can lose" in done.text
    after = demo.pids()
    assert {name for name in UNITS if after[name] == before[name]} == set(UNITS) - {"broker-1"}
    assert set(jobs) < set(demo.jobs())
    demo.write(SMALLEST)
    demo.up()


def test_what_the_cluster_allows_changes_without_a_restart(demo: Cluster) -> None:
    before = demo.pids()
    demo.write(SMALLEST + "allow: {exec: [git], http: ['https://example.com/*']}\n")
    done = demo.up()
    assert done.text.splitlines()[:2] == [
        "* allow.http becomes [https://example.com/*]",
        "* allow.exec becomes [git]",
    ]
    assert demo.pids() == before
    assert settings(demo).allow_exec == ("git",)
    assert demo.up().text.startswith("nothing to change")
    demo.write(SMALLEST)
    demo.up()
    raised = settings(demo).wire  # by the control plane, once all understand more
    assert settings(demo) == ClusterSettings(store_bytes=10 << 30, wire=raised)


def settings(cluster: Cluster) -> ClusterSettings:
    """What its units read."""

    async def read() -> ClusterSettings:
        home = ClusterState(cluster.mvmci.state, cluster.name)
        facts = home.facts()
        assert facts is not None
        found = await open_cluster(Authority.load(home.folder).admin(facts.login), announce=False)
        try:
            setting = await found.config.get("settings")
            assert setting is not None
            return msgspec.json.decode(setting.value, type=ClusterSettings)
        finally:
            await found.close()

    return asyncio.run(read())


@pytest.mark.parametrize("name", ["worker-2", "control-plane-1", "broker-1"])
def test_a_killed_unit_comes_back_under_its_name(demo: Cluster, name: str) -> None:
    before, jobs = demo.pids(), demo.jobs()
    os.kill(before[name] or 0, signal.SIGKILL)
    until(lambda: demo.pids()[name] not in (None, before[name]))
    demo.all_ready()
    after = demo.pids()
    assert {other for other in UNITS if after[other] == before[other]} == set(UNITS) - {name}
    assert demo.jobs() == jobs
    assert demo.up().text.startswith("nothing to change")


def test_a_revoked_unit_stays_down_until_up_gives_it_another_key(demo: Cluster) -> None:
    assert demo.mvmci("revoke", "worker-3").code == 0
    until(lambda: demo.states()["worker-3"] == "down")
    demo.up()
    assert demo.states()["worker-3"] == "ready"


def test_a_silent_unit_is_not_ready(demo: Cluster) -> None:
    """Its process is there, but nobody hears of it."""
    pid = demo.pids()["worker-1"] or 0
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: demo.states()["worker-1"] == "down")
        assert demo.pids()["worker-1"] == pid
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_drained_worker_finishes_its_jobs_and_takes_no_more(demo: Cluster, guest: Guest) -> None:
    jobs = sleepers(demo, guest, 6, ticks=400)
    until(lambda: all(demo.units()[name]["busy"] for name in WORKERS[:2]), demo.ps)
    for name in WORKERS[:2]:
        done = demo.mvmci("drain", name)
        assert (done.code, done.text) == (0, f"{name} is drained: it has no job, and takes none\n")
        assert demo.units()[name]["busy"] == 0
    assert demo.mvmci("wait", *jobs).code == 0
    assert [demo.states()[name] for name in WORKERS] == ["draining", "draining", "ready"]
    jobs = [demo.mvmci("submit", _nothing(demo), "--wait", "--json").json["worker"] for _ in range(4)]
    assert set(jobs) == {"worker-3"}
    for name in WORKERS[:2]:
        assert demo.mvmci("drain", name, "--undo").code == 0
    assert_sentence(demo.mvmci("drain", "worker-9"), 2, "no unit worker-9", "worker-1, worker-2, worker-3")
    assert_sentence(demo.mvmci("drain", "control-plane-1"), 2, "control-plane-1 is a control-plane")


def test_a_worker_that_was_killed_can_be_drained_and_is_when_it_is_back(demo: Cluster) -> None:
    """Its keeper is stopped meanwhile, or it would be back at once."""
    killed = demo.pids()["worker-1"]
    assert killed is not None
    supervisor = json.loads((demo.folder / "supervisor.json").read_bytes())["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(killed, signal.SIGKILL)
        assert demo.mvmci("drain", "worker-1").code == 0
        until(lambda: demo.states()["worker-1"] == "down", demo.ps)
        done = demo.mvmci("drain", "worker-1")
        assert (done.code, done.text) == (0, "worker-1 is drained: it has no job, and takes none\n")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    until(lambda: demo.units()["worker-1"]["pid"] not in (killed, None), demo.ps)
    until(lambda: demo.states()["worker-1"] == "draining", demo.ps)
    assert demo.mvmci("drain", "worker-1", "--undo").code == 0
    demo.all_ready()


def _nothing(cluster: Cluster) -> Path:
    """A module that does nothing."""
    from mvmci.deploy.up import NOTHING

    path = cluster.file.parent / "nothing.wasm"
    path.write_bytes(NOTHING)
    return path


def test_a_worker_that_joined_by_hand_is_seen(cluster: Make, tmp_path: Path) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    ticket = demo.up("--json").json["ticket_file"]
    elsewhere = Mvmci(demo.mvmci.zipapp, tmp_path / "elsewhere", demo.mvmci.home)
    worker = elsewhere.start("worker", "--join", f"@{ticket}", "--name", "extra", "--slots", "1")
    until(lambda: "extra" in demo.units(), lambda: worker.said("err"))
    unit = demo.units()["extra"]
    assert (unit["role"], unit["state"], unit["slots"], unit["pid"]) == ("worker", "ready", 1, worker.pid)
    assert demo.up().text.startswith("nothing to change")
    worker.signal(signal.SIGTERM)
    worker.end()
    assert "extra" not in demo.units()


# ---- One at a time


def test_a_second_up_at_the_same_time_says_who_is_at_work(cluster: Make) -> None:
    demo = cluster()
    first = demo.mvmci.start("up", demo.file, "--detach", *BUSY)
    until((demo.folder / "supervisor.json").exists)
    first.signal(signal.SIGSTOP)  # however long the others take, it is at work
    try:
        who = f"process {first.pid} of "
        assert_sentence(demo.mvmci("up", demo.file, "--detach"), 5, who, "since 20", "is at work on demo")
        assert_sentence(demo.mvmci("down", demo.file), 5, who)
    finally:
        first.signal(signal.SIGCONT)
    assert first.end().code == 0
    demo.all_ready()


# ---- Bad input


BAD = {
    "alias": (SMALLEST + "access: *a\n", "topology-0.yaml:3:9: `*a` is an alias"),
    "tag": ("cluster: !x demo\nworkers: {}\n", "`!x` is a tag"),
    "twice": (SMALLEST + "workers: {}\n", "`workers` is given twice"),
    "unknown": ("cluster: demo\nworkrs: {}\n", "Did you mean `workers`?"),
    "type": ("cluster: demo\nworkers: {count: many}\n", "must be a whole number"),
    "no workers": ("cluster: demo\n", "there is no `workers`"),
    "access": (SMALLEST + "access: per\n", "topology-0.yaml:3:9: `access` must be one of peer, per-worker, "),
    "runtime": (
        SMALLEST + "runtime: ssh\n",
        "runtime ssh needs hosts",
    ),
    "no plugin": (SMALLEST + "plugin: ./mine.py\n", "mine.py, which `plugin` names, cannot be read: No such"),
    "no executors": (SMALLEST + "access: pool\n", "access `pool` needs executors"),
    "replicas": (
        SMALLEST + "hosts: {a: {}, b: {}, c: {}}\nbroker: {hosts: [a, b, c]}\n",
        "a replicated broker is not in this version",
    ),
    "address": (SMALLEST + "broker: {listen: 203.0.113.1}\n", "does not have that address"),
    "credentials": (
        SMALLEST + "broker: {url: 'nats://127.0.0.1:1', credentials: nowhere.creds}\n",
        "nowhere.creds, which `broker.credentials` names, cannot be read",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("verb", ["up", "plan"])
def test_a_bad_file_gets_a_sentence_before_anything_was_changed(cluster: Make, what: str, verb: str) -> None:
    text, sentence = BAD[what]
    demo = cluster(text)
    assert_sentence(demo.mvmci(verb, demo.file), 2, sentence)
    assert not demo.folder.exists()


def test_a_file_that_is_not_there_is_named(cluster: Make) -> None:
    demo = cluster()
    assert_sentence(demo.mvmci("up", "nowhere.yaml"), 2, "nowhere.yaml cannot be read", "`mvmci init`")


def test_a_port_in_use_is_named_before_anything_was_changed(cluster: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        demo = cluster(SMALLEST + f"broker: {{listen: '127.0.0.1:{port}'}}\n")
        assert_sentence(demo.mvmci("up", demo.file, "--detach"), 2, f"port {port} of 127.0.0.1 is in use")
        assert not demo.folder.exists()


def test_a_plugin_that_raises_is_named_with_its_line_before_anything_was_changed(cluster: Make) -> None:
    demo = cluster(SMALLEST + "plugin: mine.py\n")
    plugin = demo.file.parent / "mine.py"
    plugin.write_text("def plan(topology):\n    return 1 / 0\n")
    for verb in ("up", "plan"):
        sentence = f"{plugin}:2: the plan function raised ZeroDivisionError: division by zero"
        assert_sentence(demo.mvmci(verb, demo.file), 2, sentence)
    assert not demo.folder.exists()


def test_a_balancer_that_is_not_there_is_named_before_anything_was_changed(cluster: Make) -> None:
    demo = cluster(SMALLEST + "access: pool\nexecutors: {url: 'http://127.0.0.1:1'}\n")
    sentence = "no executor can be reached at http://127.0.0.1:1: "
    assert_sentence(demo.mvmci("up", demo.file, "--detach"), 2, sentence, "balancer which you run")
    done = demo.mvmci("plan", demo.file)  # it says what to put behind the balancer
    assert done.code == 0
    assert done.err.startswith(f"warning: {sentence}")
    assert "+ start executor-1 on local, at 127.0.0.1:" in done.text
    assert not demo.folder.exists()


def test_what_answers_at_a_url_and_is_no_executor_is_named_before_anything_was_changed(
    cluster: Make,
) -> None:
    with serving() as server:
        demo = cluster(SMALLEST + f"access: pool\nexecutors: {{url: '{server.url}'}}\n")
        sentence = f"what answers at {server.url} is no executor of mvmci (HTTP 200)"
        assert_sentence(demo.mvmci("up", demo.file, "--detach"), 2, sentence)
        tls = server.url.replace("http:", "https:")  # which it does not speak
        demo.write(demo.file.read_text().replace(server.url, tls))
        assert_sentence(demo.mvmci("up", demo.file, "--detach"), 2, f"no executor can be reached at {tls}: ")
        assert not demo.folder.exists()


def test_a_state_directory_of_another_version_is_left_alone(cluster: Make) -> None:
    demo = cluster()
    demo.folder.mkdir(parents=True)
    (demo.folder / "version").write_text("2")
    for verb in (("up", demo.file, "--detach"), ("plan", demo.file)):
        assert_sentence(demo.mvmci(*verb), 8, "another format: '2'")
    assert [path.name for path in demo.folder.iterdir()] == ["version"]


# ---- Halfway


def test_what_cannot_be_finished_is_said_and_the_same_command_goes_on(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "2"))
    log = demo.folder / "units" / "worker-2" / "log"
    log.mkdir(parents=True)  # nothing can be started there
    done = demo.mvmci("up", demo.file, "--detach")
    assert done.code == 4, done
    why = "worker-2 went down 5 times: it cannot be started: Is a directory"
    for word in ("demo is up in part", "broker-1", "worker-2 is down", why):
        assert word in done.err
    assert done.err.count("Error: ") == 1
    assert "hint: the same command goes on from here" in done.err
    assert demo.mvmci("plan", demo.file, "--exit-code").code == 3
    log.rmdir()
    demo.up()
    demo.all_ready()


def test_what_does_not_become_ready_in_time_is_said_with_its_last_words(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    done = demo.mvmci("up", demo.file, "--detach", "--within", "50ms")
    assert done.code == 4, done
    assert "demo is up in part" in done.err
    assert "this is so after 0.05 s" in done.err
    demo.up()
    demo.all_ready()


# ---- First steps


def test_init_writes_a_cluster_and_a_job_that_work(cluster: Make, tmp_path: Path) -> None:
    mvmci = cluster().mvmci
    done = mvmci("init", "ci", cwd=tmp_path)
    assert done.code == 0
    assert done.text.splitlines() == [
        "ci/topology.yaml",
        "ci/topology.schema.json",
        "ci/hello/hello.wat",
        "ci/hello/hello.wasm",
        "ci/hello/README.md",
    ]
    assert "mvmci up ci/topology.yaml" in done.err
    assert "cluster: ci\n" in (tmp_path / "ci" / "topology.yaml").read_text()
    assert mvmci("validate", "ci/topology.yaml", "ci/hello/hello.wasm", cwd=tmp_path).code == 0
    assert mvmci("run", "ci/hello/hello.wasm", cwd=tmp_path).text == "hello from mvmci\n"
    (tmp_path / "ci" / "hello" / "hello.wat").write_text("mine")
    assert_sentence(mvmci("init", "ci", cwd=tmp_path), 2, "ci/topology.yaml already exists")
    (tmp_path / "ci" / "topology.yaml").unlink()
    (tmp_path / "ci" / "topology.schema.json").unlink()
    assert_sentence(mvmci("init", "ci", cwd=tmp_path), 2, "ci/hello/hello.wat already exists")
    assert (tmp_path / "ci" / "hello" / "hello.wat").read_text() == "mine"
    assert not (tmp_path / "ci" / "topology.yaml").exists()


@pytest.mark.parametrize("access", ["peer", "per-worker", "pool", "shared"])
def test_init_writes_the_file_of_the_access_that_is_asked_for(
    cluster: Make, tmp_path: Path, access: str
) -> None:
    mvmci = cluster().mvmci
    assert mvmci("init", "ci", "--access", access, cwd=tmp_path).code == 0
    done = mvmci("validate", "ci/topology.yaml", cwd=tmp_path)
    assert done.text == f"ci/topology.yaml: a topology, access {access} on local\n"


def test_init_of_an_access_that_is_not_there_writes_nothing(cluster: Make, tmp_path: Path) -> None:
    mvmci = cluster().mvmci
    done = mvmci("init", "ci", "--access", "ring", cwd=tmp_path)
    assert_sentence(done, 2, "access ring is not installed", "there is peer, per-worker, pool, shared")
    assert not (tmp_path / "ci").exists()


def test_topologies_lists_the_accesses_and_what_each_is_for(cluster: Make) -> None:
    mvmci = cluster().mvmci
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in mvmci("topologies").text.splitlines()}
    assert list(told) == ["peer", "per-worker", "pool", "shared"]
    assert told["per-worker"].startswith("Every worker has its engine inside")
    listed = mvmci("topologies", "--json").json
    assert {one["name"]: one["about"] for one in listed} == told
    assert [set(one) for one in listed] == [{"name", "about"}] * 4
