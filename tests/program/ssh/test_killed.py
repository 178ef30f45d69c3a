"""`up` that is killed with -9 at each of its steps, and run again: the same cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from tests.harness.places import ROOT
from tests.harness.program import Running
from tests.program.ssh.conftest import Farm

pytestmark = pytest.mark.soak
# Of the steps, each makes a cluster from nothing and removes it: MVMCI_KILLED_EVERY=1 takes all of them.
EVERY = int(os.environ.get("MVMCI_KILLED_EVERY", "20"))
MORTAL = ROOT / "tests" / "program" / "ssh" / "mortal.py"


def up_until(farm: Farm, step: int) -> int:
    """The exit code of an `up` that kills itself at its `step`-th step."""
    process = subprocess.Popen(
        [sys.executable, MORTAL, str(step), farm.mvmci.zipapp, "up", farm.write(), "--detach"],
        env=farm.mvmci.environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    done = Running(process).end()
    assert done.code in (0, -9), (step, done)
    return done.code


async def see_that_it_is_whole(farm: Farm) -> None:
    """Each unit is there once, ready, and nothing of anybody who was killed is."""
    units = await farm.units()
    assert {name: one["state"] for name, one in units.items()} == dict.fromkeys(
        ("broker-1", "control-plane-1", "worker-1", "worker-2"), "ready"
    )
    assert [one["host"] for one in units.values()] == ["h1", "h1", "h1", "h2"]
    left = [path for path in farm.files() if "/." in path and "/store/" not in path and "_cache" not in path]
    left = [path for path in left if not path.endswith("/bin/.lock")]
    assert left == []
    done = await asyncio.to_thread(farm.mvmci, "up", farm.write(), "--detach")
    assert "nothing to change: 4 units of demo are ready" in done.text, done


async def test_it_goes_on_from_wherever_it_was_killed(farm: Farm) -> None:
    """Each time a step later, on what the one before left: all that was begun is taken up."""
    step = 1
    while await asyncio.to_thread(up_until, farm, step):
        step += 1
    assert step > 20, "it has fewer steps than there are things to be done"
    await see_that_it_is_whole(farm)


async def test_from_nothing_it_is_killed_at_each_step_and_the_next_makes_it_whole(farm: Farm) -> None:
    step = EVERY
    while await asyncio.to_thread(up_until, farm, step):
        done = await farm.up()
        assert done.code == 0, (step, done)
        await see_that_it_is_whole(farm)
        done = await farm.down("--purge")
        assert done.code == 0, (step, done)
        assert farm.files() == {}, step
        step += EVERY
