"""The process dies, at any instant: the same command again comes to the same end, every effect once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.places import EXAMPLES
from tests.harness.program import Mvmci, fresh, steps
from tests.harness.server import Server
from tests.harness.waiting import until

Guest = Callable[[str], Path]
RANDOM_KILLS = 8
ATTEMPTS = str(RANDOM_KILLS + 2)
LIFE_S = 2.5  # about as long as the job of the random kills takes


@pytest.fixture(autouse=True)
def nothing_is_left(mvmci: Mvmci) -> Any:
    """After each test all processes are gone, and no slot holds what a job left."""
    yield
    mvmci.assert_nothing_runs()
    mvmci.assert_slots_are_clean()


# ---- kill -9


@pytest.mark.parametrize("heard", ["", "tick 0\n", "tick 9\n"])
def test_a_command_starts_over_after_a_kill(mvmci: Mvmci, guest: Guest, tmp_path: Path, heard: str) -> None:
    job = fresh("killed")
    (tmp_path / "file").write_text("")
    order = ["run", guest("sleeper"), "--id", job, "--dir", tmp_path, "--", "50", "20"]
    running = mvmci.start(*order)
    running.hears(heard or job, "out" if heard else "err")
    running.kill()
    mvmci.assert_nothing_runs()
    done = mvmci(*order)
    assert done.code == 0
    assert done.text.splitlines() == [f"tick {number}" for number in range(20)]
    assert mvmci.status(job)["status"] == "succeeded"


def test_a_kill_counts_as_an_attempt(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("killed")
    order = ["run", guest("sleeper"), "--id", job, "--attempts", "2", "--", "20"]
    for attempt in (1, 2):
        running = mvmci.start(*order)
        running.hears("tick 0\n")
        # Its lease is written a little later.
        until(lambda attempt=attempt: mvmci.status(job)["attempts"] == attempt)
        running.kill()
    done = mvmci(*order)
    assert done.code == 125
    assert f"{job} errored: attempts: 2 holders were lost" in done.err


KILLED_IN = ["/first", "/second", "/last"]


@pytest.mark.parametrize("killed_in", KILLED_IN)
def test_a_request_in_flight_is_interrupted_and_never_sent_again(
    mvmci: Mvmci, script: Path, server: Server, killed_in: str
) -> None:
    job = fresh("flight")
    several = [{"http": {"method": "POST", "url": server.url + path}} for path in KILLED_IN]
    order = ["run", script, "--id", job, *server.allow, "--input", steps(*several)]
    running = mvmci.start(*order)
    server.on_request = lambda path: running.signal(signal.SIGKILL) if path == killed_in else None
    assert running.end().code == -signal.SIGKILL
    mvmci.assert_nothing_runs()
    done = mvmci(*order)
    assert done.code == 0
    assert server.paths() == KILLED_IN
    for path, answer in zip(KILLED_IN, done.json, strict=True):
        assert answer.get("error") == ("interrupted" if path == killed_in else None)
    assert mvmci("replay", job, "--local").text == "identical\n"


def test_an_idempotent_request_is_sent_again_under_its_key(
    mvmci: Mvmci, script: Path, server: Server
) -> None:
    job = fresh("again")
    step = {"http": {"url": f"{server.url}/a", "idempotent": True}}
    order = ["run", script, "--id", job, *server.allow, "--input", steps(step, {"sleep": 1})]
    running = mvmci.start(*order)
    server.on_request = lambda path: running.signal(signal.SIGKILL) if running.alive else None
    running.end()
    done = mvmci(*order)
    assert (done.code, done.json[0]["status"]) == (0, 200)
    assert server.paths() == ["/a", "/a"]
    (key,) = {key for _, key in server.requests}
    assert key


def test_a_program_dies_with_its_holder_and_is_not_started_again(
    mvmci: Mvmci, script: Path, outside: Path
) -> None:
    job = fresh("program")
    shell = f"echo began >>{outside}/count; sleep 61.5 & sleep 61.5; echo ended >>{outside}/count"
    several = [{"exec": {"argv": ["sh", "-c", shell], "timeout_ms": 90_000}}, {"log": "after"}]
    order = ["run", script, "--id", job, "--allow-exec", "sh", "--input", steps(*several)]
    running = mvmci.start(*order)
    until((outside / "count").exists)
    running.kill()
    mvmci.assert_nothing_runs()
    done = mvmci(*order)
    assert (done.code, done.json[0]["error"]) == (0, "interrupted")
    assert (outside / "count").read_text() == "began\n"


def test_what_a_program_left_in_the_workspace_is_there_after_a_kill(
    mvmci: Mvmci, script: Path, server: Server, tmp_path: Path
) -> None:
    job = fresh("workspace")
    (tmp_path / "given.txt").write_text("given\n")
    several = [
        {"exec": {"argv": ["sh", "-c", "cat given.txt >made.txt; chmod +x made.txt; ln -s made.txt link"]}},
        {"http": {"url": f"{server.url}/kill", "idempotent": True}},
        {"exec": {"argv": ["sh", "-c", "ls; cat link; test -x made.txt"]}},
    ]
    options = ["--id", job, "--dir", tmp_path, *server.allow, "--allow-exec", "sh"]
    order = ["run", script, *options, "--input", steps(*several)]
    running = mvmci.start(*order)
    server.on_request = lambda path: running.signal(signal.SIGKILL) if running.alive else None
    running.end()
    done = mvmci(*order)
    assert done.code == 0
    assert done.json[2] == {"code": 0, "stdout": "given.txt\nlink\nmade.txt\ngiven\n", "stderr": ""}


def test_kills_at_random_instants_change_nothing(
    mvmci: Mvmci, script: Path, server: Server, outside: Path
) -> None:
    job = fresh("random")
    several: list[dict[str, Any]] = []
    for number in range(6):
        several += [
            {"http": {"method": "POST", "url": f"{server.url}/once/{number}"}},
            {"http": {"method": "POST", "url": f"{server.url}/key/{number}", "idempotent": True}},
            {"log": f"at {number}"},
            {
                "exec": {
                    "argv": ["sh", "-c", f"echo {number} >>{outside}/count; echo {number} >>kept; cat kept"]
                }
            },
            {"sleep": 50},
            {"now": None},
            {"random": None},
        ]
    options = ["--id", job, *server.allow, "--allow-exec", "sh", "--attempts", ATTEMPTS]
    order = ["run", script, *options, "--input", steps(*several)]
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(RANDOM_KILLS):
        running = mvmci.start(*order)
        try:
            running.process.wait(chance.uniform(0.2, LIFE_S))
        except Exception:
            running.kill()
        mvmci.assert_nothing_runs()
    done = mvmci(*order)
    assert done.code == 0, done
    results = [done.json[at : at + 7] for at in range(0, len(done.json), 7)]
    paths = server.paths()
    counted = (outside / "count").read_text().split()
    kept: list[str] = []
    for number, (once, key, _, program, _, _, _) in enumerate(results):
        came = paths.count(f"/once/{number}")
        assert came == 1 if once.get("status") == 200 else (once["error"] == "interrupted" and came <= 1)
        assert key["status"] == 200
        assert len({one for path, one in server.requests if path == f"/key/{number}"}) == 1
        ran = counted.count(str(number))
        if "error" in program:
            assert (program["error"], ran <= 1) == ("interrupted", True)
        else:
            kept.append(str(number))
            assert (program["stdout"].split(), ran) == (kept, 1)
    assert mvmci("logs", job, "--local").err == "".join(f"at {number}\n" for number in range(6))
    assert mvmci("replay", job, "--local").text == "identical\n"


def test_a_kill_while_compiling_leaves_nothing_behind(alone: Mvmci, guest: Guest) -> None:
    job = fresh("compiling")
    running = alone.start("run", EXAMPLES / "python-workflow.wasm", "--id", job)  # 19 MB: it takes long
    running.hears("compiling", "err")
    until(lambda: list((alone.state / "_host" / "code").glob("new-*")))
    running.kill()
    alone.assert_nothing_runs()
    assert alone("run", guest("exit")).code == 0
    alone.assert_slots_are_clean()
    assert alone.status(job)["status"] == "queued"


# ---- Signals


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_lets_a_command_go_and_says_how_to_go_on(
    mvmci: Mvmci, guest: Guest, signum: int, code: int
) -> None:
    job = fresh("signal")
    order = ["run", str(guest("sleeper")), "--id", job, "--attempts", "1", "--", "20", "300"]
    running = mvmci.start(*order)
    running.hears("tick 0\n")
    until(lambda: b'"lease"' in _journal(mvmci, job))
    running.signal(signum)
    done = running.end()
    assert done.code == code
    assert f"interrupted; `mvmci {' '.join(order)}` resumes it" in done.err
    assert "Traceback" not in done.err
    mvmci.assert_nothing_runs()
    mvmci.assert_slots_are_clean()
    assert mvmci.status(job)["status"] == "queued"
    # One attempt is all it has, so this one was not counted.
    again = mvmci(*order)
    assert (again.code, len(again.text.splitlines())) == (0, 300)
    assert mvmci.status(job)["attempts"] == 1


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_lets_a_workflow_go_at_its_effect(
    mvmci: Mvmci, script: Path, server: Server, signum: int, code: int
) -> None:
    job = fresh("signal")
    several = [{"http": {"url": f"{server.url}/a"}}, {"log": "asleep"}, {"sleep": 2000}, {"log": "awake"}]
    order = ["run", script, "--id", job, *server.allow, "--attempts", "1", "--input", steps(*several)]
    running = mvmci.start(*order)
    running.hears("asleep\n", "err")
    running.signal(signum)
    assert running.end().code == code
    done = mvmci(*order)
    assert done.code == 0
    assert server.paths() == ["/a"]
    assert done.err.splitlines()[-2:] == ["asleep", "awake"]


def test_an_interrupted_job_without_an_id_can_be_gone_on_with(mvmci: Mvmci, guest: Guest) -> None:
    running = mvmci.start("run", guest("sleeper"), "--", "20")
    running.hears("tick 1\n")
    running.signal(signal.SIGINT)
    done = running.end()
    job = done.err.split()[0]
    assert f"`mvmci run --id {job} " in done.err


def test_two_signals_end_it_at_once(mvmci: Mvmci, guest: Guest) -> None:
    running = mvmci.start("run", guest("sleeper"), "--", "20")
    running.hears("tick 1\n")
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)
    assert running.end().code in (130, 143)
    mvmci.assert_nothing_runs()
    assert mvmci("run", guest("exit")).code == 0  # which cleans up the slot


def test_a_signal_to_the_whole_terminal_is_one_interruption(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("terminal")
    running = mvmci.start("run", guest("sleeper"), "--id", job, "--", "20", new_session=True)
    running.hears("tick 30\n")
    os.killpg(running.pid, signal.SIGINT)
    done = running.end()
    assert done.code == 130
    assert "Traceback" not in done.err
    assert mvmci.status(job)["status"] == "queued"


# ---- Long sleeps


def killed_asleep(mvmci: Mvmci, job: str, script: Path, sleep_ms: int) -> list[str | Path]:
    """Begin a workflow that sleeps, and kill it as soon as it does and has said so; how it was begun."""
    several = [{"log": "asleep"}, {"sleep": sleep_ms}, {"log": "awake"}]
    order = ["run", script, "--id", job, "--input", steps(*several)]
    running = mvmci.start(*order)
    until(lambda: b'"released"' in _journal(mvmci, job))
    running.hears("asleep\n", "err")  # which comes after what is on disk
    running.kill()
    mvmci.assert_nothing_runs()
    return order


def test_a_long_sleep_is_suspended(mvmci: Mvmci, script: Path) -> None:
    job = fresh("sleep")
    killed_asleep(mvmci, job, script, 3_600_000)
    status = mvmci.status(job)
    assert (status["status"], status["reason"]) == ("suspended", "sleep")
    assert mvmci("logs", job, "--local").err == "asleep\n"
    assert mvmci("cancel", job, "--local").code == 0


def test_a_long_sleep_goes_on_after_a_kill(mvmci: Mvmci, script: Path) -> None:
    job = fresh("sleep")
    start = time.monotonic()
    done = mvmci(*killed_asleep(mvmci, job, script, 16_000))
    took = time.monotonic() - start
    assert done.code == 0
    assert done.err.splitlines()[-1] == "awake"
    records = mvmci("history", job, "--local", "--json").json
    (released,) = [one for one in records if one["record"] == "released"]
    (intent,) = [one for one in records if one["record"] == "intent"]
    (result,) = [one for one in records if one["record"] == "result"]
    assert result["at"] >= _rfc3339(released["until"])
    assert intent["at"] <= released["at"] < result["at"]  # the first two are often one message
    assert took >= 16
    assert mvmci.status(job)["attempts"] == 1


def _journal(mvmci: Mvmci, job: str) -> bytes:
    path = mvmci.journal(job)
    return path.read_bytes() if path.exists() else b""


def _rfc3339(ms: int) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms // 1000))
    return f"{whole}.{ms % 1000:03d}Z"
