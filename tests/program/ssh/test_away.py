"""A host that is away, at each moment: the rest is done, and told; again, and all is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.program import Mvmci, other_build
from tests.harness.waiting import until_true
from tests.program.ssh.conftest import Farm, Host


async def test_a_host_that_is_away_is_left_out_and_the_same_again_finishes(farm: Farm) -> None:
    farm["h2"].line.go()
    done = await farm.up()
    assert done.code == 4, done
    assert "nothing is done on h2: h2 ([127.0.0.1]:" in done.err
    assert "hint: the same command finishes it once they can be reached" in done.err
    units = await farm.units()
    assert {name: one["state"] for name, one in units.items()} == {
        "broker-1": "ready",
        "control-plane-1": "ready",
        "worker-1": "ready",
    } | ({"worker-2": "down"} if "worker-2" in units else {})
    assert farm["h2"].files() == {}

    farm["h2"].line.is_cut = False
    done = await farm.up()
    assert done.code == 0, done
    units = await farm.units()
    assert {one["state"] for one in units.values()} == {"ready"}
    assert units["worker-2"]["host"] == "h2"

    # Settings are applied while one is away; what is to leave it waits; `ps` says why it is as it is.
    before = (await farm.units())["worker-2"]
    farm["h2"].line.go()
    wanted = ["control-plane-1", "worker-1", "worker-2"]

    async def all_tell() -> bool:  # over the broker, as ever
        told = await asyncio.to_thread(farm.mvmci.look, "metrics", "--over", "100ms")
        return [one["unit"] for one in told["units"]] == wanted and told["broker"]["connected"] >= 3

    await until_true(all_tell)
    farm.more = "retain: {jobs: 3d}"
    farm["h2"].settings["state"] = "absent"
    done = await farm.up()
    assert done.code == 4, done
    assert "retain.jobs becomes 3d" in done.text
    assert "nothing is done on h2" in done.err
    units = await farm.units()
    assert units["worker-2"]["pid"] in (None, before["pid"])
    shown = await asyncio.to_thread(farm.mvmci, "ps")
    assert "worker-2" in shown.text

    farm["h2"].line.is_cut = False
    done = await farm.up()
    assert done.code == 0, done
    units = await farm.units()
    assert units["worker-2"]["host"] == "h1"
    assert not farm["h2"].directory.exists()


async def test_nothing_is_begun_where_the_broker_cannot_be(farm: Farm) -> None:
    farm["h1"].line.go()
    done = await farm.up()
    assert done.code == 6, done
    assert "hint: the broker is to run there" in done.err
    assert farm.files() == {}


@pytest.mark.parametrize("mark", ["bin", "demo/lock", "demo/authority", "demo/units"])
async def test_a_host_that_goes_in_the_middle_of_it_is_left_out(farm: Farm, mark: str) -> None:
    going = asyncio.create_task(farm.up())
    await until_true(lambda: (farm["h2"].directory / mark).exists() or going.done())
    farm["h2"].line.go()
    done = await going
    assert done.code == 4, done
    assert "nothing is done on h2: the connection to h2 is lost" in done.err
    farm["h2"].line.is_cut = False
    done = await farm.up()
    assert done.code == 0, done
    assert {one["state"] for one in (await farm.units()).values()} == {"ready"}


@contextlib.contextmanager
def held_at_the_start(host: Host, mvmci: Mvmci) -> Iterator[None]:
    """Let the host stop its units and start none: whoever opens the log of its supervisor waits there."""
    log = host.folder / "supervisor.log"
    log.unlink()
    os.mkfifo(log)
    try:
        yield
    finally:
        for process in dataclasses.replace(mvmci, state=host.directory).processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split()[0]), signal.SIGKILL)
        log.unlink()


async def test_a_host_that_goes_as_its_units_are_started_again_is_followed_by_no_other(
    farm: Farm, tmp_path: Path
) -> None:
    """What it was given may be what took it."""
    farm.workers = "count: 2, slots: 1, hosts: [h2, h1]"
    assert (await farm.up()).code == 0
    before = await farm.units()
    farm.mvmci = dataclasses.replace(farm.mvmci, zipapp=other_build(farm.mvmci.zipapp, tmp_path))
    with held_at_the_start(farm["h2"], farm.mvmci):
        going = asyncio.create_task(farm.up())
        await until_true(lambda: going.done() or not (farm["h2"].folder / "desired.json").exists())
        farm["h2"].line.go()
        done = await going
    assert done.code == 4, done
    assert "h2 went away as units there were started again: " in done.err
    farm["h2"].line.is_cut = False
    units = await farm.units()
    assert units["worker-2"]["pid"] == before["worker-2"]["pid"]
    assert units["control-plane-1"]["pid"] != before["control-plane-1"]["pid"]
    done = await farm.up()
    assert done.code == 0, done
    units = await farm.units()
    assert {one["state"] for one in units.values()} == {"ready"}
    assert units["worker-2"]["pid"] != before["worker-2"]["pid"]


async def test_down_with_a_host_away_keeps_what_finishes_it_later(farm: Farm) -> None:
    assert (await farm.up()).code == 0
    for purge in ((), ("--purge",)):
        farm["h2"].line.go()
        done = await farm.down(*purge)
        assert done.code == 4, done
        assert "demo is down in part: nothing is done on h2: " in done.err
        assert (farm.state / "keys").exists()
        farm["h2"].line.is_cut = False
        done = await farm.down(*purge)
        assert done.code == 0, done
        if not purge:
            assert (await farm.up()).code == 0
    assert farm.files() == {}
    assert not farm.state.exists()


async def test_no_host_at_all_is_one_sentence(farm: Farm) -> None:
    for host in farm.hosts.values():
        host.line.go()
    done = await farm.up()
    assert done.code == 6, done
    assert done.err.count("Error: ") == 1
    assert "hint: no host of the file can be reached" in done.err
    assert not farm.state.exists() or not (farm.state / "keys").exists()
