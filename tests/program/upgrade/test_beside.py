"""The release before and this build in one cluster: each job ends once, whoever runs beside whom."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

from mvmci.wire import WIRE
from tests.harness.cluster import BUSY
from tests.harness.program import Mvmci
from tests.harness.waiting import LONG_S, until
from tests.program.upgrade.conftest import BESIDE_S, Mixed

Make = Callable[[str], Mixed]
WORKERS = "cluster: demo\nworkers: {{count: 2, slots: 4}}\nallow: {{http: ['{url}/*']}}\n"
EXECUTORS = (
    "cluster: demo\naccess: peer\nexecutors: {{slots: 4}}\nworkers: {{count: 1, slots: 4}}\n"
    "allow: {{http: ['{url}/*']}}\n"
)
ASLEEP = ({"once": 0}, {"sleep": 20_000}, {"once": 1})
AT_WORK = ({"once": 0}, *[{"sleep": 2_000}] * 5, {"once": 1})


def test_old_workers_beside_a_new_control_plane_and_back(mixed: Make) -> None:
    demo = mixed(WORKERS)
    old, new = demo.programs
    before = demo.old.pids()
    jobs = [demo.submit(old, *what) for what in (ASLEEP, AT_WORK)]
    demo.swap("control-plane-1", new)
    done = demo.load(BESIDE_S)
    for job in jobs:
        demo.ended_once(job, 2)
    assert demo.level() == 0  # the old ones do not understand the next
    assert demo.levels_of(*jobs, *done) == {0}
    now = demo.old.pids()
    assert {name: now[name] for name in before if name.startswith("worker")} == {
        name: pid for name, pid in before.items() if name.startswith("worker")
    }
    # Back to the release before, which is possible as long as the level was not raised.
    jobs = [demo.submit(new, *what) for what in (ASLEEP, AT_WORK)]
    demo.swap("control-plane-1", old)
    demo.load(BESIDE_S / 3)
    for job in jobs:
        demo.ended_once(job, 2)
    assert demo.level() == 0


def test_new_workers_beside_an_old_control_plane(mixed: Make) -> None:
    demo = mixed(WORKERS)
    old, new = demo.programs
    jobs = [demo.submit(old, *what) for what in (ASLEEP, AT_WORK)]
    for name in ("worker-1", "worker-2"):
        demo.swap(name, new)
        demo.load(BESIDE_S / 3)
    # One of them is killed in the middle of an effect of a job that another program began.
    killed = threading.Event()
    demo.server.on_request = lambda path: path.startswith("/held") and killed.wait(LONG_S)
    jobs.append(demo.submit(old, *AT_WORK, name="held"))
    until(lambda: demo.server.count(f"/{jobs[-1]}/0"))
    demo.runs.pop(demo.status(jobs[-1])["worker"]).kill()
    killed.set()
    for job in jobs:
        demo.ended_once(job, 2)
    assert demo.level() == 0


def test_executors_and_workers_of_either_build(mixed: Make) -> None:
    demo = mixed(EXECUTORS)
    old, new = demo.programs
    jobs = [demo.submit(old, *what) for what in (ASLEEP, AT_WORK)]
    demo.swap("worker-1", new)  # beside an old executor
    demo.load(BESIDE_S / 3)
    demo.swap("executor-1", new)
    demo.load(BESIDE_S / 3)
    demo.swap("worker-1", old)  # beside a new executor
    demo.load(BESIDE_S / 3)
    for job in jobs:
        demo.ended_once(job, 2)
    assert demo.level() == 0


def test_a_cluster_is_upgraded_by_the_new_file_and_then_speaks_at_the_new_level(
    mixed: Make, tmp_path: Path
) -> None:
    demo = mixed(WORKERS)
    old, new = demo.programs
    jobs = [demo.submit(old, *what) for what in (ASLEEP, AT_WORK)]
    until(lambda: all(demo.server.count(f"/{job}/0") for job in jobs))
    upgrading = new.start("up", demo.cluster.file, "--detach", *BUSY)
    more = [demo.submit(new, {"once": 0}) for _ in range(10)]
    done = upgrading.end()
    assert done.code == 0, done
    assert {unit["version"] for unit in demo.cluster.ps()["units"] if unit["version"]} == {"0.2.0"}
    for job in jobs:
        demo.ended_once(job, 2)
    for job in more:
        demo.ended_once(job, 1)
    until(lambda: demo.level() == WIRE)
    job = demo.submit(new, *ASLEEP)
    demo.ended_once(job, 2)
    assert demo.levels_of(job) == {WIRE}
    # Whoever knows level 0 alone reads it all the same, and is told that it is too old to be a unit.
    assert old.look("status", job)["status"] == "succeeded"
    assert [one["record"] for one in old.look("history", job)][-1] == "done"
    _is_too_old(dataclasses.replace(old, state=tmp_path / "elsewhere"), demo)
    # `up` writes the settings again, and keeps the level.
    demo.cluster.up()
    assert demo.level() == WIRE


def _is_too_old(program: Mvmci, demo: Mixed) -> None:
    made = demo.cluster.mvmci("ticket", "create", "--role", "worker")
    assert made.code == 0, made
    joining = program.start("worker", "--join", made.text.strip(), "--slots", "1")
    done = joining.end()
    assert done.code == 8, done
    assert "do not understand each other" in done.err
