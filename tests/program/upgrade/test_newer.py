"""What a later build wrote, met by this one: it is called newer, and left as it is."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvmci.cluster.identity import Login
from mvmci.deploy.state import ClusterState
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster as Joined
from mvmci.trust.authority import Authority
from tests.harness.cluster import Cluster
from tests.harness.newer import NEWER, append_newer, newer_settings
from tests.harness.program import Mvmci, assert_sentence, fresh, steps
from tests.harness.waiting import until

SMALL = "cluster: demo\nworkers: {count: 1, slots: 2}\n"
VERBS = (
    ("status",),
    ("status", "--json"),
    ("history",),
    ("logs",),
    ("logs", "-f"),
    ("wait",),
    ("cancel",),
    ("artifacts",),
    ("replay",),
)


@pytest.fixture
def demo(program: Mvmci, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(dataclasses.replace(program, state=tmp_path / "state"), tmp_path / "topology.yaml")
    found.write(SMALL)
    found.up()
    yield found
    found.mvmci("down", "--cluster", "demo", "--grace", "1s")
    found.mvmci.assert_nothing_runs()


def at_the_broker(demo: Cluster, work: Callable[[Joined], Awaitable[Any]]) -> Any:
    """Do `work` with the rights of whoever brought the cluster up, as a later build would."""

    async def main() -> Any:
        facts = ClusterState(demo.mvmci.state, "demo").facts()
        assert facts is not None
        login: Login = facts.login
        joined = await open_cluster(Authority.load(demo.folder).admin(login), announce=False)
        try:
            return await work(joined)
        finally:
            await joined.close()

    return asyncio.run(main())


@pytest.mark.parametrize("wire", NEWER)
def test_a_job_that_a_newer_build_wrote_to_is_told_apart_by_every_verb(
    demo: Cluster, script: Path, wire: int
) -> None:
    job, other = fresh("newer"), fresh("other")
    for one, queue in ((job, "nobody"), (other, "default")):
        given = ("submit", script, "--id", one, "--queue", queue, "--input", steps({"now": True}))
        assert demo.mvmci(*given).code == 0
    at_the_broker(demo, lambda joined: append_newer(joined.store, job, wire, "cancel", "nobody"))
    words = (f"of {job} is newer than this mvmci", f"level {wire}")
    for verb, *more in VERBS:
        assert_sentence(demo.mvmci(verb, job, *more), 8, *words, "hint: ")
    # A list shows what it knows, and says that there is more.
    until(lambda: demo.mvmci.look("status", other)["status"] == "succeeded")
    listed = demo.mvmci("list", "--json")
    found = {one["id"]: (one["status"], one["reason"]) for one in listed.json}
    assert found[other] == ("succeeded", "")
    assert found[job][0] == "queued"
    assert words[0] in found[job][1]
    assert listed.code == 8
    assert words[0] in listed.err


def test_an_older_up_leaves_the_streams_of_a_cluster_that_was_down_as_they_are(demo: Cluster) -> None:
    """Of what runs it asks before it begins; here it has to start a broker to see."""

    async def become_newer(joined: Joined) -> None:
        stream = joined.layout.jobs
        there = (await joined.link.api(f"STREAM.INFO.{stream}"))["config"]
        await joined.link.api(
            f"STREAM.UPDATE.{stream}", **there | {"description": "as a newer build wants it"}
        )
        await joined.config.put("settings", newer_settings(NEWER[0]))

    async def description(joined: Joined) -> Any:
        told = await joined.link.api(f"STREAM.INFO.{joined.layout.jobs}")
        return told["config"].get("description")

    at_the_broker(demo, become_newer)
    demo.down()
    done = demo.mvmci("up", demo.file, "--detach")
    assert done.code == 4, done
    assert "the cluster is newer than this mvmci" in done.err
    assert at_the_broker(demo, description) == "as a newer build wants it"


@pytest.mark.parametrize("wire", NEWER)
def test_units_of_a_cluster_that_became_newer_let_go_of_their_jobs_and_end_for_good(
    demo: Cluster, script: Path, wire: int
) -> None:
    job = fresh("goes-on")
    napping = steps(*[{"sleep": 1_000}] * 8)
    assert demo.mvmci("submit", script, "--id", job, "--input", napping).code == 0
    until(lambda: demo.mvmci.look("status", job)["status"] == "running")
    settings = at_the_broker(demo, lambda joined: joined.config.get("settings"))
    at_the_broker(demo, lambda joined: joined.config.put("settings", newer_settings(wire)))

    def given_up() -> bool:
        units = {one["name"]: one for one in json.loads((demo.folder / "units.json").read_text())["units"]}
        ours = [units[name] for name in ("control-plane-1", "worker-1")]
        return all(one.get("given_up") and one.get("last_exit") == 8 for one in ours)

    until(given_up, demo.ps)
    reasons = [unit["reason"] for unit in demo.ps()["units"] if unit["state"] == "down"]
    assert len(reasons) == 2
    assert all("the cluster is newer than this mvmci" in reason for reason in reasons)
    for verb in (("list",), ("submit", script), ("up", demo.file, "--detach")):
        done = demo.mvmci(*verb)
        assert done.code == 8, done
        assert f"level {wire}" in done.err
    found = at_the_broker(demo, lambda joined: joined.config.get("settings"))
    assert json.loads(found.value)["wire"] == wire  # nobody has written over them
    # Were it a build that understands them, it would go on: as this one does, with settings that it knows.
    at_the_broker(demo, lambda joined: joined.config.put("settings", settings.value))
    demo.up()
    until(
        lambda: demo.mvmci.look("status", job)["status"] == "succeeded",
        lambda: demo.mvmci.look("status", job),
    )
    assert demo.mvmci.look("status", job)["attempts"] == 1
