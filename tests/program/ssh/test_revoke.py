"""`revoke HOST`: the units of a host lose their connections at once, and the others go on."""

from __future__ import annotations

import asyncio
import os
import shutil
import time

from tests.harness.places import need
from tests.harness.program import is_connected
from tests.harness.waiting import until_true
from tests.program.ssh.conftest import Farm

CUT_S_MAX = 10.0  # two seconds is the promise; a busy machine has its own ideas


async def test_all_units_of_a_host_are_cut_off_two_seconds_after_the_verb_began(farm: Farm) -> None:
    farm.workers = "count: 4, slots: 1"
    assert (await farm.up()).code == 0
    by_host: dict[str, list[int]] = {}
    for unit in (await farm.units()).values():
        if unit["role"] != "broker":
            by_host.setdefault(unit["host"], []).append(unit["pid"])
    assert [len(by_host[host]) for host in ("h1", "h2")] == [3, 2]
    assert all(is_connected(pid) for pids in by_host.values() for pid in pids)
    began = time.monotonic()
    verb = farm.mvmci.start("revoke", "h2")
    await until_true(lambda: not any(map(is_connected, by_host["h2"])))
    took = time.monotonic() - began
    done = await asyncio.to_thread(verb.end)
    assert done.code == 0, done
    assert "worker-2, worker-4 on h2 are revoked" in done.err
    assert took < CUT_S_MAX
    assert all(map(is_connected, by_host["h1"]))


async def test_the_token_of_executors_outlives_it_and_is_changed_as_the_verb_says(farm: Farm) -> None:
    need(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "no haproxy: apt-get install it")
    farm.more = "access: pool\nexecutors: {count: 1, slots: 1, balancer: haproxy}"
    assert (await farm.up()).code == 0
    token = farm.state / "keys/engine.token"
    before = token.read_text()
    config = farm["h1"].folder / "units/executor-1/config.json"
    assert before in config.read_text()
    done = await asyncio.to_thread(farm.mvmci, "revoke", "executor-1")
    assert done.code == 0, done
    assert f"hint: `mvmci down`, removing {token}, and `mvmci up` make another one" in done.err
    assert (await farm.up()).code == 0  # it has a key again
    assert before in config.read_text()
    assert (await farm.down()).code == 0
    token.unlink()
    done = await farm.up()
    assert done.code == 0, done
    assert before not in config.read_text()
    assert token.read_text() in config.read_text()
