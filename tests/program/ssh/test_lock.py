"""Two at once on a cluster, or two clusters of one name: the second is told, and changes nothing."""

from __future__ import annotations

import asyncio

from mvmci.system.lock import hold
from tests.harness.waiting import until_true
from tests.program.ssh.conftest import Farm

WHO = "process 7 of ci on elsewhere"


async def test_the_second_is_told_who_is_at_work_from_where_and_since_when(farm: Farm) -> None:
    assert (await farm.up()).code == 0
    farm.workers = "count: 4, slots: 1"
    before = await farm.units()
    with hold(farm["h2"].folder / "lock", "", "", WHO):
        done = await farm.up()
        assert done.code == 5, done
        assert f"Error: h2: {WHO}, since 2" in done.err
        assert "Z, is at work on demo\nhint: wait until it has finished, then try again" in done.err
        down = await farm.down()
        assert down.code == 5, down
    assert await farm.units() == before
    assert (await farm.up()).code == 0  # nobody kept the lock of the other host


async def test_a_down_while_an_up_runs_is_told(farm: Farm) -> None:
    running = farm.start_up()
    lock = farm["h1"].folder / "lock"
    await until_true(lambda: lock.exists() and lock.read_text())
    done = await farm.down()
    assert done.code == 5, done
    assert "is at work on demo" in done.err
    assert (await asyncio.to_thread(running.end)).code == 0


async def test_an_up_that_is_killed_leaves_no_lock(farm: Farm) -> None:
    running = farm.start_up()
    lock = farm["h2"].folder / "lock"
    await until_true(lambda: lock.exists() and lock.read_text())
    running.kill()
    assert (await farm.up()).code == 0


async def test_another_cluster_of_that_name_is_refused_before_anything_is_changed(farm: Farm) -> None:
    assert (await farm.up()).code == 0
    before, units = farm.settled(), await farm.units()
    done = await farm.up(state=farm.folder / "another")
    assert done.code == 2, done
    assert "another cluster named demo is there, which was brought up from elsewhere" in done.err
    assert farm.settled() == before
    assert await farm.units() == units
