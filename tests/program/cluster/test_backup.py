"""A cluster whose disk was lost, from outside: backed up while jobs ran, destroyed, restored elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.harness.cluster import Cluster
from tests.harness.program import steps
from tests.harness.waiting import until

Guest = Callable[[str], Path]
ONE = "cluster: demo\nworkers: {count: 1, slots: 3}\n"


def last_known(cluster: Cluster) -> int:
    """The last sequence of JOBS of which the witness beside the control plane knows."""
    told = json.loads((cluster.folder / "units" / "control-plane-1" / "witness.json").read_bytes())
    return int(told["jobs"]["last"])


def destroy(cluster: Cluster) -> None:
    """Kill all of it, and remove its folder but for what a control plane remembers."""
    unit = cluster.folder / "units" / "control-plane-1"
    kept = (unit / "witness.json").read_bytes()
    os.kill(json.loads((cluster.folder / "supervisor.json").read_bytes())["pid"], signal.SIGKILL)
    cluster.mvmci.assert_nothing_runs()
    shutil.rmtree(cluster.folder)
    unit.mkdir(parents=True)
    (unit / "witness.json").write_bytes(kept)


def test_jobs_of_a_back_up_end_once_after_the_disk_was_lost(
    cluster: Callable[..., Cluster], guest: Guest, tmp_path: Path
) -> None:
    demo, mvmci, folder = (found := cluster(ONE)), found.mvmci, tmp_path / "backup"
    demo.up()
    assert mvmci("submit", guest("hello"), "--id", "ended", "--wait").code == 0
    history = mvmci("history", "ended").out
    assert mvmci("submit", guest("script"), "--id", "asleep", "--input", steps({"sleep": 20_000})).code == 0
    assert mvmci("submit", guest("script"), "--id", "short", "--input", steps({"sleep": 3_000})).code == 0
    until(lambda: mvmci.look("status", "asleep")["status"] == "suspended", lambda: mvmci.look("list"))
    told = mvmci.look("backup", folder, "--keys")
    assert told["jobs"] is None  # not counted, which is not none
    assert mvmci("submit", guest("hello"), "--id", "after", "--wait").code == 0
    until(lambda: last_known(demo) > told["messages"]["jobs"], lambda: told)
    destroy(demo)
    done = mvmci("restore", folder)
    assert done.code == 0, done
    assert "what came after is gone: demo-JOBS ends at" in done.err
    refused = mvmci("up", demo.file, "--detach")
    assert refused.code == 4
    assert "lacks records" in refused.err
    assert mvmci("submit", guest("hello"), "--id", "early").code == 125
    assert "records were lost" in mvmci("ps").err
    assert mvmci("recover", "--yes").code == 0
    demo.up()
    assert set(demo.jobs()) >= {"ended", "asleep", "short"}
    assert "after" not in demo.jobs()
    assert mvmci("history", "ended").out == history
    assert mvmci("wait", "asleep", "short", "--timeout", "120s").code == 0
    assert mvmci.look("ps")["loss"] == []
