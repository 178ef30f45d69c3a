"""Jobs on a cluster, from outside: given to it, waited for, cancelled, read, from any machine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.identity import Identity
from mvmci.deploy.state import ClusterState
from mvmci.stores import open_cluster
from mvmci.trust.authority import Authority, read_identity
from mvmci.trust.enrol.client import is_due
from tests.harness.cluster import Cluster
from tests.harness.program import STATUS_KEYS, TIME, Mvmci, assert_sentence, at, fresh, steps
from tests.harness.waiting import until

Guest = Callable[[str], Path]
CANCEL_S = 10.0  # two seconds are promised; a loaded machine takes longer
NOBODY = ("--queue", "nobody")  # a queue that no worker takes from
AWAY_S = 20.0
SHORT_S, OLD_S = 60.0, 45.0  # the life of a credential, and how much of it is over
BLOB_MESSAGES = 2  # of a small blob: its bytes, and what is told of them


@pytest.fixture
def mvmci(demo: Cluster) -> Mvmci:
    return demo.mvmci


@pytest.fixture
def long_jobs(mvmci: Mvmci) -> Iterator[list[str]]:
    """Ids of jobs that would run for long: they are cancelled at the end."""
    ids: list[str] = []
    yield ids
    if ids:
        mvmci("cancel", *ids)


def submit(mvmci: Mvmci, *args: str | Path) -> str:
    """Submit, and the id that was printed, alone."""
    done = mvmci("submit", *args)
    assert (done.code, done.err) == (0, ""), done
    (job,) = done.text.splitlines()
    return job


def kinds(mvmci: Mvmci, job: str) -> list[str]:
    return [record["record"] for record in mvmci.look("history", job)]


def status(mvmci: Mvmci, job: str) -> dict[str, object]:
    found: dict[str, object] = mvmci.look("status", job)
    return found


def stands(mvmci: Mvmci, job: str, wanted: str) -> None:
    """Wait until the job stands so."""
    until(lambda: status(mvmci, job)["status"] == wanted, lambda: status(mvmci, job))


# ---- submit


def test_submit_prints_the_id_alone_and_the_job_runs(mvmci: Mvmci, guest: Guest) -> None:
    job = submit(mvmci, guest("exit"))
    done = mvmci("wait", job)
    assert (done.code, done.out, done.err) == (0, b"", "")
    found = status(mvmci, job)
    assert list(found) == STATUS_KEYS
    assert (found["status"], found["exit_code"], found["attempts"], found["epoch"]) == ("succeeded", 0, 1, 1)
    assert found["worker"] == found["executor"]
    assert str(found["worker"]).startswith("worker-")
    assert all(TIME.fullmatch(str(found[key])) for key in ("submitted_at", "started_at", "ended_at"))


def test_an_id_of_ones_own_is_kept(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("own")
    assert submit(mvmci, guest("exit"), "--id", job) == job
    assert mvmci("submit", guest("exit"), "--json").json != [job]


def test_workers_log_when_a_job_began_and_how_it_ended(demo: Cluster, guest: Guest) -> None:
    """A job that is over at once has one line."""
    long, short = (
        submit(demo.mvmci, guest("loop"), "--timeout", "1s"),
        submit(demo.mvmci, guest("exit"), "--", "3"),
    )
    assert (demo.mvmci("wait", long).code, demo.mvmci("wait", short).code) == (124, 1)

    def lines(job: str) -> list[str]:
        logs = (path.read_text() for path in (demo.folder / "units").glob("worker-*/log"))
        return [line for log in logs for line in log.splitlines() if f"job {job} " in line]

    # A short job has taken long where the machine was busy.
    until(
        lambda: len(lines(long)) == 2 and " failed in " in "".join(lines(short)[-1:]),
        lambda: lines(long) + lines(short),
    )
    began, ended = lines(long)
    assert began.endswith(f"INFO job {long} began (attempt 1)")
    assert re.search(rf"INFO job {long} timed_out in [1-9][0-9]*\.[0-9]{{2}} s \(attempt 1\)$", ended)
    assert re.search(rf"INFO job {short} failed in [0-9]+\.[0-9]{{2}} s \(attempt 1\)$", lines(short)[-1])


def test_what_is_wrong_with_an_order_is_said_before_a_cluster_is_looked_for(
    program: Mvmci, tmp_path: Path
) -> None:
    alone = dataclasses.replace(program, state=tmp_path / "state")
    assert_sentence(alone("submit", tmp_path / "none.wasm"), 2, "none.wasm cannot be read")
    assert_sentence(alone("submit"), 2, "there is no MODULE, and no --batch")


def test_ctrl_c_leaves_the_job_running_and_says_what_to_do(
    mvmci: Mvmci, guest: Guest, long_jobs: list[str]
) -> None:
    job = fresh("interrupted")
    long_jobs.append(job)
    waiting = mvmci.start("submit", guest("sleeper"), "--id", job, "--wait", "--", "20")
    waiting.hears("tick 5\n")
    waiting.signal(signal.SIGINT)
    done = waiting.end()
    assert done.code == 130
    assert f"`mvmci logs {job} -f`" in done.err
    assert f"`mvmci cancel {job}`" in done.err
    assert status(mvmci, job)["status"] == "running"


# ---- Workspaces


async def stored(demo: Cluster) -> int:
    """How many messages the cluster's blobs are."""
    identity = msgspec.json.decode((demo.folder / "client.json").read_bytes(), type=Identity)
    cluster = await open_cluster(identity, announce=False)
    try:
        answer = await cluster.link.api(f"STREAM.INFO.{cluster.layout.blobs}")
        return int(answer["state"]["messages"])
    finally:
        await cluster.close()


def blobs(demo: Cluster) -> int:
    return asyncio.run(stored(demo))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory of many small files that no other test has."""
    for number in range(200):
        path = tmp_path / "tree" / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fresh("content"))
    return tmp_path / "tree"


def test_a_second_submit_of_the_same_tree_uploads_nothing(demo: Cluster, guest: Guest, tree: Path) -> None:
    order = (guest("exit"), "--dir", tree, *NOBODY)
    before = blobs(demo) if (demo.folder / "client.json").exists() else 0
    submit(demo.mvmci, *order)
    first = blobs(demo)
    assert first >= before + BLOB_MESSAGES * 201  # the files, and the list of them
    submit(demo.mvmci, *order)
    assert blobs(demo) == first


def test_of_a_changed_tree_only_what_changed_is_uploaded(demo: Cluster, guest: Guest, tree: Path) -> None:
    order = (guest("exit"), "--dir", tree, *NOBODY)
    submit(demo.mvmci, *order)
    first = blobs(demo)
    (tree / "d0" / "f0").write_text(fresh("changed"))
    (tree / "d0" / "f7").rename(tree / "renamed")
    (tree / "copy").write_bytes((tree / "renamed").read_bytes())
    submit(demo.mvmci, *order)
    assert blobs(demo) == first + BLOB_MESSAGES * 2  # the changed file, and the list


def test_a_worker_fetches_a_tree_once(demo: Cluster, guest: Guest, tree: Path) -> None:
    """What it fetched lies in its cache, for the next job on the same files."""
    order = (guest("hello"), "--dir", tree, "--wait")
    assert demo.mvmci("submit", *order).code == 0
    cache = demo.mvmci.state / "_host" / "blobs"
    kept = {path.name for path in cache.rglob("*") if path.is_file()}
    assert len(kept) >= 201
    assert demo.mvmci("submit", *order).code == 0
    assert {path.name for path in cache.rglob("*") if path.is_file()} == kept


# ---- Many at once


def batch(mvmci: Mvmci, *orders: dict[str, object], options: tuple[str, ...] = ()) -> list[str]:
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    done = mvmci("submit", "--batch", "-", *options, stdin=lines.encode())
    assert (done.code, done.err) == (0, ""), done
    return done.text.splitlines()


def test_a_batch_prints_ids_in_order_and_all_run(mvmci: Mvmci, guest: Guest, script: Path) -> None:
    own = fresh("batch")
    exits, flow = str(guest("exit")), str(script)
    ids = batch(
        mvmci,
        {"module": exits},
        {"module": exits, "args": ["3"], "id": own},
        {"module": flow, "input": {"steps": [{"sleep": 1}]}},
        *({"module": exits} for _ in range(300)),
    )
    assert (len(ids), len(set(ids)), ids[1]) == (303, 303, own)
    assert mvmci("wait", ids[0], *ids[2:]).code == 0
    assert mvmci("wait", own).code == 1
    assert status(mvmci, ids[2])["result"] == [None]


def test_what_several_lines_name_is_stored_once(demo: Cluster, guest: Guest, tree: Path) -> None:
    submit(demo.mvmci, guest("exit"), *NOBODY)
    before = blobs(demo)
    line = {"module": str(guest("exit")), "dir": str(tree)}
    batch(demo.mvmci, *[line] * 50, options=NOBODY)
    assert blobs(demo) == before + BLOB_MESSAGES * 201


def test_options_hold_for_each_line_that_does_not_say_otherwise(mvmci: Mvmci, guest: Guest) -> None:
    exits = str(guest("exit"))
    ids = batch(
        mvmci,
        {"module": exits},
        {"module": exits, "queue": "other", "timeout": 60, "memory": "64MiB", "output-limit": 1000},
        options=(*NOBODY, "--timeout", "5m"),
    )
    specs = [mvmci.look("history", job)[0] for job in ids]
    assert [spec["queue"] for spec in specs] == ["nobody", "other"]
    assert [spec["limits"]["timeout_ms"] for spec in specs] == [300_000, 60_000]
    assert (specs[1]["limits"]["memory_bytes"], specs[1]["limits"]["output_bytes"]) == (64 << 20, 1000)


def test_a_batch_with_bad_lines_names_them_all_and_submits_nothing(
    demo: Cluster, guest: Guest, tmp_path: Path
) -> None:
    before = demo.jobs()
    exits = str(guest("exit"))
    lines = [
        json.dumps({"module": exits, "id": "good"}),
        "not json",
        json.dumps({"modul": exits}),
        json.dumps({"module": exits, "timeout": "never"}),
        json.dumps({"module": "none.wasm"}),
        "",
        json.dumps({"module": exits, "args": [1]}),
        json.dumps({"module": exits, "id": "good"}),
        json.dumps({"module": exits, "input": 1}),
        json.dumps({"module": exits, "stdin": "-"}),
        json.dumps({"module": exits, "attempts": 0}),
        json.dumps({"module": exits, "artifact": "../*"}),
        json.dumps({"module": exits, "env": ["HOME"]}),
        json.dumps([exits]),
        "{}",
    ]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(lines))
    done = demo.mvmci("submit", "--batch", file)
    assert (done.code, done.out) == (2, b"")
    named = [int(number) for number in re.findall(r"jobs\.jsonl:(\d+): ", done.err)]
    assert named == [2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert "did you mean `module`?" in done.err
    assert demo.jobs() == before


def test_of_a_batch_what_is_taken_is_named_and_the_rest_accepted(mvmci: Mvmci, guest: Guest) -> None:
    taken = submit(mvmci, guest("exit"), "--id", fresh("taken"), "--", "9")
    lines = [{"module": str(guest("exit"))}, {"module": str(guest("exit")), "id": taken}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    done = mvmci("submit", "--batch", "-", stdin=data)
    assert done.code == 2
    assert f"<stdin>:2: the id {taken} is taken by another job" in done.err
    (accepted,) = done.text.splitlines()
    assert mvmci("wait", accepted).code == 0


@pytest.mark.parametrize("options", [["--wait"], ["--id", "a"], ["x.wasm"], ["--stdin", "-"]])
def test_what_a_batch_cannot_have_is_refused(mvmci: Mvmci, options: list[str]) -> None:
    assert_sentence(mvmci("submit", "--batch", "-", *options), 2, "batch")


def test_an_empty_batch_is_refused(mvmci: Mvmci) -> None:
    assert_sentence(mvmci("submit", "--batch", "-", stdin=b"\n \n"), 2, "<stdin> has no jobs")


# ---- wait


def test_wait_is_over_when_all_have_ended(mvmci: Mvmci, guest: Guest) -> None:
    ids = [submit(mvmci, guest("sleeper"), "--", "20", str(count)) for count in (1, 20, 40)]
    done = mvmci("wait", *ids, "--json")
    assert done.code == 0
    assert [one["id"] for one in done.json] == ids
    assert {one["status"] for one in done.json} == {"succeeded"}
    assert all(list(one) == STATUS_KEYS for one in done.json)


def test_the_worst_end_is_the_exit_code(mvmci: Mvmci, guest: Guest) -> None:
    good, bad = submit(mvmci, guest("exit")), submit(mvmci, guest("exit"), "--", "4")
    late = submit(mvmci, guest("loop"), "--timeout", "1s")
    assert mvmci("wait", good, bad).code == 1
    done = mvmci("wait", good, bad, late)
    assert (done.code, done.out) == (124, b"")
    assert [line.split()[:2] for line in done.err.splitlines()] == [[bad, "failed:"], [late, "timed_out:"]]


def test_the_time_of_waiting_can_be_up_while_the_job_goes_on(mvmci: Mvmci, guest: Guest) -> None:
    job = submit(mvmci, guest("exit"), *NOBODY)
    done = mvmci("wait", job, "--timeout", "500ms")
    assert_sentence(done, 124, f"after 500ms, {job} has not ended", f"`mvmci wait {job}`")
    assert status(mvmci, job)["status"] == "queued"


def test_who_waits_waits_on_while_the_broker_is_away(demo: Cluster, guest: Guest) -> None:
    """Its keeper is stopped meanwhile, or it would be back at once."""
    mvmci = demo.mvmci
    supervisor = json.loads((demo.folder / "supervisor.json").read_bytes())["pid"]
    job = fresh("away")
    waiting = mvmci.start("submit", guest("sleeper"), "--id", job, "--wait", "--", "100", "100")
    waiting.hears("tick 5\n")
    more = mvmci.start("wait", job)
    until(more.is_connected)  # and has read the job long before another program has come as far
    following = mvmci.start("logs", job, "-f")
    following.hears("tick 5\n")
    broker = demo.pids()["broker-1"]
    assert broker is not None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(broker, signal.SIGKILL)
        time.sleep(AWAY_S)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    for one in (waiting, more, following):
        assert one.end().code == 0
    ticks = [f"tick {number}" for number in range(100)]
    for reader in (waiting, following):
        assert reader.said().decode().splitlines()[-100:] == ticks, reader.said("err")
    assert status(mvmci, job)["status"] == "succeeded"
    demo.all_ready()


# ---- cancel


def test_a_queued_job_is_cancelled_at_once(mvmci: Mvmci, guest: Guest) -> None:
    job = submit(mvmci, guest("exit"), *NOBODY)
    assert status(mvmci, job)["reason"] == "waiting: no worker takes from queue nobody"
    done = mvmci("cancel", job)
    assert (done.code, done.out, done.err) == (0, b"", f"{job} is cancelled\n")
    found = status(mvmci, job)
    assert (found["status"], found["attempts"]) == ("cancelled", 0)
    assert str(found["reason"]).startswith("cancelled by ")
    assert mvmci("wait", job).code == 1


def test_a_running_job_is_cancelled_soon(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("cancelled")
    waiting = mvmci.start("submit", guest("sleeper"), "--id", job, "--wait", "--", "20")
    waiting.hears("tick 30\n")
    done = mvmci("cancel", job)
    assert (done.code, done.out) == (0, b"")
    ended = waiting.end()
    assert ended.code == 1
    assert at(mvmci, job, "done") - at(mvmci, job, "cancel") < CANCEL_S
    assert f"{job} cancelled: cancelled by " in ended.err
    assert status(mvmci, job)["status"] == "cancelled"
    printed = len(ended.text.splitlines())
    assert len(mvmci("logs", job).text.splitlines()) == printed


def test_an_ended_job_stays_as_it_ended(mvmci: Mvmci, guest: Guest) -> None:
    job = submit(mvmci, guest("exit"), "--", "3")
    assert mvmci("wait", job).code == 1
    before = mvmci.look("history", job)
    done = mvmci("cancel", job, "--json")
    assert (done.code, done.err) == (0, f"{job} had already ended: failed\n")
    assert [one["status"] for one in done.json] == ["failed"]
    assert mvmci.look("history", job) == before


def test_several_are_cancelled_together_or_none_if_one_is_unknown(mvmci: Mvmci, guest: Guest) -> None:
    ids = batch(mvmci, *[{"module": str(guest("exit"))}] * 3, options=NOBODY)
    assert_sentence(mvmci("cancel", *ids, "unknown"), 2, "there is no job unknown")
    assert {status(mvmci, job)["status"] for job in ids} == {"queued"}
    assert mvmci("cancel", *ids).code == 0
    assert {status(mvmci, job)["status"] for job in ids} == {"cancelled"}


def test_a_cancelled_job_never_runs(mvmci: Mvmci, guest: Guest) -> None:
    sleeper = {"module": str(guest("sleeper")), "args": ["100"]}
    ids = batch(mvmci, *[sleeper] * 8)  # more than there are slots
    assert mvmci("cancel", *ids).code == 0
    assert mvmci("wait", *ids).code == 1
    for job in ids:
        assert status(mvmci, job)["status"] == "cancelled"
        assert kinds(mvmci, job).count("lease") <= 1


# ---- Reading


def test_logs_follow_a_job_from_before_it_begins(mvmci: Mvmci, guest: Guest) -> None:
    job = submit(mvmci, guest("exit"), *NOBODY)
    following = mvmci.start("logs", job, "-f")
    time.sleep(1)
    assert following.alive
    assert mvmci("cancel", job).code == 0
    assert following.end().code == 0


def test_list_has_the_newest_first_and_can_be_narrowed(mvmci: Mvmci, guest: Guest) -> None:
    ids = [submit(mvmci, guest("exit"), "--queue", "listed") for _ in range(4)]
    found = mvmci("list", "--queue", "listed", "--json").json
    assert [one["id"] for one in found] == ids[::-1]
    assert found[0] == status(mvmci, ids[-1])
    assert mvmci("cancel", *ids[:2]).code == 0
    narrowed = mvmci("list", "--queue", "listed", "--status", "cancelled", "--limit", "1", "--json").json
    assert [one["id"] for one in narrowed] == [ids[1]]


def test_a_job_says_why_it_waits(mvmci: Mvmci, guest: Guest, long_jobs: list[str]) -> None:
    sleeper = {"module": str(guest("sleeper")), "args": ["100"]}
    long_jobs += batch(mvmci, *[sleeper] * 6)
    for job in long_jobs:
        stands(mvmci, job, "running")
    waiting = submit(mvmci, guest("sleeper"), "--", "100", "1")
    until(lambda: status(mvmci, waiting)["reason"] == "waiting: workers busy")
    assert mvmci("cancel", *long_jobs).code == 0
    assert mvmci("wait", waiting).code == 0


# ---- From another machine


def test_every_verb_works_from_a_machine_that_logged_in(
    demo: Cluster, guest: Guest, script: Path, tmp_path: Path
) -> None:
    made = demo.mvmci("ticket", "create", "--role", "client", "--output", tmp_path / "ticket")
    assert made.code == 0, made
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    laptop = dataclasses.replace(demo.mvmci, state=tmp_path / "laptop", home=home)
    assert_sentence(laptop("list"), 6, "no cluster is known here", "`mvmci login @ticket`")
    logged = laptop("login", f"@{tmp_path / 'ticket'}")
    assert logged.code == 0, logged
    assert (laptop.state / "demo" / "client.json").stat().st_mode & 0o777 == 0o600
    here = submit(demo.mvmci, guest("exit"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "top.txt").write_text("mine")
    done = laptop("submit", guest("files"), "--dir", tmp_path / "in", "--artifact", "a", "--wait")
    there = done.err.split()[0]
    assert done.code == 0
    assert laptop("wait", here, there).code == 0
    assert {here, there} <= {one["id"] for one in laptop("list", "--json").json}
    assert status(demo.mvmci, there) == status(laptop, there)
    assert laptop("logs", there).text == done.text
    assert kinds(laptop, there) == kinds(demo.mvmci, there)
    assert laptop("artifacts", there, "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "a" / "d.txt").exists()
    flow = laptop("submit", script, "--wait", "--input", steps({"sleep": 1})).err.split()[0]
    assert laptop("replay", flow).text == "identical\n"
    queued = submit(laptop, guest("exit"), *NOBODY)
    assert laptop("cancel", queued).code == 0
    assert status(demo.mvmci, queued)["status"] == "cancelled"
    by = str(status(demo.mvmci, queued)["reason"])
    assert by.startswith("cancelled by ")
    assert not (laptop.state / "demo" / "keys").exists()


def test_a_login_that_is_used_stays_good(
    demo: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.load(demo.folder)
    facts = ClusterState(demo.mvmci.state, demo.name).facts()
    assert facts is not None
    laptop = dataclasses.replace(demo.mvmci, state=tmp_path / "laptop")
    path = laptop.state / demo.name / "client.json"
    monkeypatch.setattr("mvmci.trust.signer.CLIENT_S", SHORT_S)
    old = dataclasses.replace(authority, now=lambda: time.time() - OLD_S)
    short = old.identity("short", "client", (), facts.login, path)
    ends = time.time() + SHORT_S - OLD_S
    assert is_due(short, time.time())

    def renewed() -> bool:
        # A verb that is not answered in time goes on with the token that it has, and the next one asks again.
        assert laptop("list", "--limit", "1").code == 0
        found = read_identity(path)
        return found is not None and found.login.jwt != short.login.jwt

    until(renewed)
    time.sleep(max(0.0, ends - time.time()))
    assert laptop("list", "--limit", "1").code == 0
    longer = read_identity(path)
    assert longer is not None
    assert (longer.unit, longer.login.seed) == (short.unit, short.login.seed)


def test_a_client_is_no_member(demo: Cluster, guest: Guest, long_jobs: list[str]) -> None:
    long_jobs.append(fresh("member"))
    waiting = demo.mvmci.start("submit", guest("sleeper"), "--id", long_jobs[0], "--wait", "--", "50")
    waiting.hears("tick 1\n")
    assert {unit["role"] for unit in demo.units().values()} == {"broker", "control-plane", "worker"}
    waiting.signal(signal.SIGINT)
    waiting.end()
