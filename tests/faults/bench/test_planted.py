"""What bounds a cluster is found by its name where it was planted, and nothing is named where nothing was.

Nothing else is to run beside: what the rest of a test run takes of the machine is found, and named. One round
in one access by default, MVMCI_PLANTED=3 for three in two.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvmci.bench.bottleneck import Finding
from mvmci.bench.points import Points
from mvmci.bench.profiles import PROFILES, prepare
from mvmci.bench.report import Diagnosis
from mvmci.bench.run import Run
from mvmci.bench.service import serving
from mvmci.bench.stage import Staged, Wanted, staged
from mvmci.cluster.topology import read_topology
from tests.faults.bench import planting
from tests.harness.broker import serve
from tests.harness.places import need
from tests.harness.proxy import Proxy

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        "PYTEST_XDIST_WORKER" in os.environ, reason="tests beside it would be found, and named"
    ),
]

WORKERS, SLOTS = 4, 2
ROUNDS = int(os.environ.get("MVMCI_PLANTED", "1"))
ACCESSES = ("shared", "peer") if ROUNDS > 1 else ("shared",)

Plant = Callable[[Staged, list[int]], AbstractContextManager[object]]
"""What is done to a cluster that is up, whose units of the case's role have these families of processes."""


def _nothing(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Case:
    """What is planted, where, and what is to be said of it."""

    cause: str
    whose: str = ""
    plant: Plant = _nothing
    role: str = "executor"  # whose processes are planted on
    profile: str = "effects"
    executor_slots: int = 0  # 0: so many that they do not bind
    broker_delay_s: float = 0.0
    stands: bool | None = None  # once it is raised; None: that is not possible here


def _quota(share: float) -> Plant:
    return lambda one, pids: planting.quota(pids, share)


def _of_generator(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.quota([os.getpid()], 0.1)


def _stutter(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.stuttering(pids[:1], stopped_s=0.045, runs_s=0.005)


def _slow_disk(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.slow_disk(pids, one.state.folder, 60)


CASES = {
    "one slot": Case("slots", executor_slots=1, stands=True),
    "three slots": Case("slots", executor_slots=3, stands=True),
    "a tenth of a core for the executor": Case("quota", "executor", _quota(0.1), stands=True),
    "a quarter of a core for the executor": Case("quota", "executor", _quota(0.25), stands=True),
    "a tenth of a core for the workers": Case(
        "quota", "worker", _quota(0.1), role="worker", profile="light", stands=True
    ),
    "a quarter of a core for the workers": Case(
        "quota", "worker", _quota(0.25), role="worker", profile="light", stands=True
    ),
    "the executor stopped nine tenths of the time": Case("stopped", "executor", _stutter),
    "20 ms on the way to the broker": Case("network", broker_delay_s=0.01),
    "6 ms on the way to the broker": Case("network", broker_delay_s=0.003),
    "a throttled disk": Case("sync", "broker", _slow_disk, role="broker"),
    "a generator held to a tenth of a core": Case("generator", "", _of_generator, profile="light"),
    "another program": Case("others", "", lambda one, pids: planting.computing()),
    "little memory for the executor": Case(
        "memory", "", lambda one, pids: planting.memory(pids, 260 << 20), profile="memory"
    ),
    "nothing": Case("", profile="waiting"),
}


@asynccontextmanager
async def _broker(folder: Path, delay_s: float) -> AsyncIterator[str]:
    """A line of a cluster file that names a broker behind a slow way; none without a delay."""
    if not delay_s:
        yield ""
        return
    async with serve(folder) as url, Proxy(url).serve() as proxy:
        proxy.delay_s = delay_s
        yield f"broker: {{url: '{proxy.url}'}}"


@asynccontextmanager
async def running(case: Case, access: str, folder: Path) -> AsyncIterator[tuple[Run, Staged]]:
    """A run on one cluster, whose slots are warm."""
    folder.chmod(0o711)
    async with contextlib.AsyncExitStack() as stack:
        line = await stack.enter_async_context(_broker(folder / "broker", case.broker_delay_s))
        text = f"cluster: planted\naccess: {access}\nexecutors: {{slots: {case.executor_slots or 4}}}\n"
        text += f"workers: {{count: {WORKERS}, slots: {SLOTS}}}\n{line}\n"
        url = stack.enter_context(serving())
        wanted = Wanted(workers=WORKERS, slots=SLOTS, http=[f"{url}*"], as_is=bool(case.executor_slots))
        found = {access: read_topology(text.encode(), name="planted.yaml")}
        (one,) = await stack.enter_async_context(staged(folder, found, {}, wanted, print))
        work = await prepare(PROFILES[case.profile], one.client, url)
        key = (one.name, case.profile)
        yield Run([one], {key: work}, Points([one.name], {case.profile: [WORKERS]}), print), one


async def _processes(one: Staged, role: str) -> list[int]:
    seen = await one.state.runtime().observe()
    return planting.families([unit.pid for unit in seen if unit.role == role and unit.pid])


def _named(diagnosis: Diagnosis, case: Case) -> Finding | None:
    """The first finding; what the machine has beside it is passed over where it is not what is looked for."""
    return next((one for one in diagnosis.findings if case.cause == "others" or one.cause != "others"), None)


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_what_was_planted_is_named(name: str, access: str, round_: int, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "limits of cgroups are for root")
    case = CASES[name]
    async with running(case, access, tmp_path) as (run, one):
        key = (one.name, case.profile)
        await run.warm(*key)
        with case.plant(one, await _processes(one, case.role)):
            await run.rest(*key)
            diagnosis = await run.diagnose(*key, WORKERS)
            print(name, access, diagnosis)
            found = _named(diagnosis, case)
            if not case.cause:
                assert found is None
                return
            assert found is not None
            assert found.cause == case.cause
            assert not case.whose or found.whose == case.whose
            if case.stands is not None:
                await run.raise_(0)
                print(run.found.diagnoses[0].findings[0])
                assert run.found.diagnoses[0].findings[0].stands is case.stands
