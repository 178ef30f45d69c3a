"""A host that is dead for good: nobody waits for it, and it takes no part when it comes back after all.

Only the line of ssh is cut here. So what runs on a lost host runs on, and reaches the broker: the worst case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shlex

from tests.harness.program import is_connected
from tests.harness.waiting import until_true
from tests.program.ssh.conftest import Farm, Host


def lose(host: Host) -> None:
    host.line.go()
    host.settings["state"] = "lost"


def workers_on(farm: Farm, host: str) -> list[str]:
    """The workers of which a process runs there."""
    there = dataclasses.replace(farm.mvmci, state=farm[host].directory).processes()
    return sorted({name for one in there for name in re.findall(r"worker-\d+", one)})


async def test_a_host_that_is_lost_is_given_up_and_comes_back_as_a_new_one(farm: Farm) -> None:
    farm.workers = "count: 3, slots: 1, hosts: [h1, h2]"
    assert (await farm.up()).code == 0
    before = await farm.units()
    assert before["worker-2"]["host"] == "h2"
    lose(farm["h2"])
    farm.workers = "count: 3, slots: 1"
    planned = await asyncio.to_thread(farm.mvmci, "plan", farm.write())
    line = "* host h2 is lost: what ran there is given up (worker-2), and its keys are revoked"
    assert line in planned.text.splitlines()
    done = await farm.up()
    assert done.code == 0, done
    assert line in done.text.splitlines()
    units = await farm.units()
    assert {(one["host"], one["state"]) for one in units.values()} == {("h1", "ready")}
    assert units.keys() == before.keys()
    await until_true(lambda: not is_connected(before["worker-2"]["pid"]))

    # Nobody asks it, also where it could be reached again.
    farm["h2"].line.is_cut = False
    asked = len(farm["h2"].sshd.log)
    done = await farm.up()
    assert (done.code, done.text.splitlines()[0][:17]) == (0, "nothing to change"), done
    assert "h2" not in (await asyncio.to_thread(farm.mvmci, "ps")).text
    assert len(farm["h2"].sshd.log) == asked

    # It is one of them again: what it has of the time before is not.
    del farm["h2"].settings["state"]
    done = await farm.up()
    assert done.code == 0, done
    assert "* host h2 is back" in done.text
    units = await farm.units()
    assert {one["state"] for one in units.values()} == {"ready"}
    assert [units[f"worker-{number}"]["host"] for number in (1, 2, 3)] == ["h1", "h2", "h1"]
    assert (workers_on(farm, "h1"), workers_on(farm, "h2")) == (["worker-1", "worker-3"], ["worker-2"])
    assert (await farm.up()).text.startswith("nothing to change")


async def test_the_host_of_the_broker_is_refused_and_down_ends_without_it(farm: Farm) -> None:
    assert (await farm.up()).code == 0
    lose(farm["h1"])
    done = await farm.up()
    assert done.code == 2, done
    file = farm.write()
    lines = file.read_text().splitlines()
    number, line = next((at, line) for at, line in enumerate(lines, 1) if "state: lost" in line)
    place = f"{file}:{number}:{line.index('state: lost') + len('state: ') + 1}"
    assert f"Error: {place}: the broker is on `h1`, and all jobs with it" in done.err
    assert workers_on(farm, "h2") == ["worker-2"]

    done = await asyncio.to_thread(farm.mvmci, "down", file, "--purge")
    assert done.code == 0, done
    assert not farm.state.exists()
    assert farm["h2"].files() == {}
    (command,) = re.findall(r"h1 is lost, and was not asked: .* `mvmci (host .* --forget)`", done.err)
    assert workers_on(farm, "h1") == ["worker-1"]
    done = await asyncio.to_thread(farm.mvmci, *shlex.split(command))
    assert done.code == 0, done
    assert not farm["h1"].folder.exists()
    done = await asyncio.to_thread(farm.mvmci, *shlex.split(command))
    assert done.code == 2, done
    assert "is not of a cluster that was brought up from another machine" in done.err
