"""What bounds a cluster is found by its name where it was planted, and nothing is named where nothing was.

Nothing else is to run beside: what the rest of a test run takes of the machine is found, and named. A case is
looked at again where that was so, and skipped where it stays so. By default the mildest of each cause in one
access; MVMCI_PLANTED=1 for all of them, MVMCI_PLANTED=3 for three rounds in two accesses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from mvmci.bench.bottleneck import OTHERS_MANY
from mvmci.bench.evidence import look, seen_between
from mvmci.bench.points import Points
from mvmci.bench.profiles import PROFILES, prepare
from mvmci.bench.run import Run
from mvmci.bench.service import serving
from mvmci.bench.stage import Staged, Wanted, staged
from mvmci.cluster.deployment import BROKER
from mvmci.cluster.topology import read_topology
from mvmci.runtimes.local.messages import SupervisorFiles
from mvmci.system import usage
from tests.faults.bench import planting
from tests.harness.broker import serve
from tests.harness.places import need
from tests.harness.proxy import Proxy
from tests.harness.waiting import until_true

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        "PYTEST_XDIST_WORKER" in os.environ, reason="tests beside it would be found, and named"
    ),
]

WORKERS, SLOTS = 4, 2
LOOKS = 3  # at a case, until others take little of the machine
GLANCES, GLANCE_S = 40, 0.5  # at the machine: so long others may take it before, and are seen again after
BUSY = "other programs take too much of the machine"
ROUNDS = int(os.environ.get("MVMCI_PLANTED", "1"))
ACCESSES = ("shared", "peer") if ROUNDS > 1 else ("shared",)

Plant = Callable[[Staged, list[int]], AbstractContextManager[object]]
"""What is done to a cluster that is up, whose units of the case's role have these families of processes."""


def _nothing(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Site:
    """A cluster, and which of its ways are slow. Cases that want the same are on one."""

    access: str = ""
    executor_slots: int = 0  # 0: so many that they do not bind
    broker_latency_s: float = 0.0
    way_latency_s: float = 0.0


@dataclass(frozen=True)
class Case:
    """What is planted, where, and what is to be said of it."""

    cause: str
    whose: str = ""
    plant: Plant = _nothing
    role: str = "executor"  # whose processes are planted on
    profile: str = "effects"
    site: Site = Site()
    stands: bool | None = None  # once it is raised; None: that is not possible here


def _quota(share: float) -> Plant:
    return lambda one, pids: planting.quota(pids, share)


def _for_workers(share: float) -> Plant:
    """Those of `peer` only pass jobs on: they would hardly want a quarter of a core before two are full."""
    return lambda one, pids: planting.quota(pids, share * (0.6 if one.name == "peer" else 1))


def _of_generator(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.quota([os.getpid()], 0.1)


def _stutter(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.stuttering(pids[:1], stopped_s=0.045, runs_s=0.005)


def _slow_disk(one: Staged, pids: list[int]) -> AbstractContextManager[object]:
    return planting.slow_disk(pids, one.state.folder, 60)


CASES = {
    "one slot": Case("slots", site=Site(executor_slots=1), stands=True),
    "three slots": Case("slots", site=Site(executor_slots=3), stands=True),
    "a tenth of a core for the executor": Case("quota", "executor", _quota(0.1), stands=True),
    "a quarter of a core for the executor": Case("quota", "executor", _quota(0.25), stands=True),
    "a tenth of a core for the workers": Case(
        "quota", "worker", _for_workers(0.1), role="worker", profile="light", stands=True
    ),
    "a quarter of a core for the workers": Case(
        "quota", "worker", _for_workers(0.25), role="worker", profile="light", stands=True
    ),
    "the executor stopped nine tenths of the time": Case("stopped", "executor", _stutter),
    "a throttled disk": Case("sync", "broker", _slow_disk, role="broker"),
    "a generator held to a tenth of a core": Case("generator", "", _of_generator, profile="light"),
    "another program": Case("others", "", lambda one, pids: planting.computing()),
    "little memory for the executor": Case(
        "memory", "", lambda one, pids: planting.memory(pids, 260 << 20), profile="memory"
    ),
    "nothing": Case("", profile="waiting"),
    "20 ms on the way to the broker": Case("network", site=Site(broker_latency_s=0.01)),
    "6 ms on the way to the broker": Case("network", site=Site(broker_latency_s=0.003)),
    "20 ms on an order's way": Case("way", "executor", profile="light", site=Site(way_latency_s=0.01)),
}


@asynccontextmanager
async def _broker(folder: Path, latency_s: float) -> AsyncIterator[str]:
    """A line of a cluster file that names a broker behind a slow way; none without a latency."""
    if not latency_s:
        yield ""
        return
    async with serve(folder) as url, Proxy(url).serve() as proxy:
        proxy.latency_s = latency_s
        yield f"broker: {{url: '{proxy.url}'}}"


@asynccontextmanager
async def _far_executor(one: Staged, latency_s: float) -> AsyncIterator[None]:
    """Orders go a slow way to their executor, and nothing else does: workers dial it through a proxy, or it
    dials the broker through one."""
    if not latency_s:
        yield
        return
    config, presence = one.cluster.config, one.cluster.store.presence
    settings, before = await config.settings(), await presence.members()
    assert settings is not None
    file = SupervisorFiles(one.state.folder).config(*one.executors)
    started = msgspec.json.decode(file.read_bytes())
    login = started["identity"]["login"]
    is_dialled = settings.engine != BROKER

    async def is_far() -> bool:
        now = await presence.members()
        if is_dialled:
            return {each.about.engine for each in now if each.about.role == "worker"} == {proxy.url}
        known = {each.incarnation for each in before}
        return any(each.about.role == "executor" and each.incarnation not in known for each in now)

    async with Proxy(settings.engine if is_dialled else login["urls"][0]).serve() as proxy:
        proxy.latency_s = latency_s
        if is_dialled:
            await config.put_settings(msgspec.structs.replace(settings, engine=proxy.url))
        else:
            login["urls"] = [proxy.url]
            file.write_bytes(msgspec.json.encode(started))
            for pid in await _processes(one, "executor"):
                os.kill(pid, signal.SIGKILL)  # it comes back and dials where the file says
        await until_true(is_far)
        yield


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """Its URL."""
    with serving() as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(
    request: pytest.FixtureRequest, service: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Staged]:
    """The cluster of a `Site`."""
    need(os.geteuid() == 0, "limits of cgroups are for root")
    site, folder = request.param, tmp_path_factory.mktemp("site")
    folder.chmod(0o711)
    async with contextlib.AsyncExitStack() as stack:
        line = await stack.enter_async_context(_broker(folder / "broker", site.broker_latency_s))
        text = f"cluster: planted\naccess: {site.access}\nexecutors: {{slots: {site.executor_slots or 4}}}\n"
        text += f"workers: {{count: {WORKERS}, slots: {SLOTS}}}\n{line}\n"
        wanted = Wanted(workers=WORKERS, slots=SLOTS, http=[f"{service}*"], as_is=bool(site.executor_slots))
        found = {site.access: read_topology(text.encode(), name="planted.yaml")}
        (one,) = await stack.enter_async_context(staged(folder, found, {}, wanted, print))
        await stack.enter_async_context(_far_executor(one, site.way_latency_s))
        yield one


async def _processes(one: Staged, role: str) -> list[int]:
    seen = await one.state.runtime().observe()
    return planting.families([unit.pid for unit in seen if unit.role == role and unit.pid])


async def _find(run: Run, one: Staged, case: Case) -> float:
    """Let `run` find what bounds it, and confirm it. The most that others took of the machine meanwhile."""
    key = (one.name, case.profile)
    await run.rest(*key)
    diagnosis = await run.diagnose(*key, WORKERS)
    others = [run.found.rest[key].others, diagnosis.evidence.others]
    if case.stands is not None:
        before = await look(one, units=False)
        await run.raise_(-1)
        after = await look(one, units=False)
        others.append(seen_between(before, after, is_local=True, slotted=()).others)
    return max(others)


async def _is_ever(*, quiet: bool) -> bool:
    """Whether others take little of the machine for once, or much. Nothing of ours is to be at work."""
    for _ in range(GLANCES):
        before = usage.machine()
        await asyncio.sleep(GLANCE_S)
        taken_us = usage.machine().busy_us - before.busy_us
        if (taken_us <= OTHERS_MANY * before.processors * GLANCE_S * 1e6) is quiet:
            return True
    return False


def _on(access: str, case: Case) -> Case:
    return replace(case, site=replace(case.site, access=access))


MILDEST = {(case.cause, case.whose): name for name, case in CASES.items()}.values()  # the last of each
PLANTED = {
    f"{name}-{access}": _on(access, case)
    for access in ACCESSES
    for name, case in CASES.items()
    if name in MILDEST or "MVMCI_PLANTED" in os.environ
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("one", "case"),
    [pytest.param(case.site, case, id=name) for name, case in PLANTED.items()],
    indirect=["one"],
    scope="module",  # of all that are on one cluster, the next one follows
)
@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_what_was_planted_is_named(
    case: Case, round_: int, one: Staged, service: str, request: pytest.FixtureRequest
) -> None:
    work = await prepare(PROFILES[case.profile], one.client, service)
    points = Points([one.name], {case.profile: [WORKERS]})
    run = Run([one], {(one.name, case.profile): work}, points, print)
    if not await _is_ever(quiet=True):
        pytest.skip(BUSY)
    await run.warm(one.name, case.profile)
    with case.plant(one, await _processes(one, case.role)):
        for _ in range(LOOKS):
            others = await _find(run, one, case)
            if others <= OTHERS_MANY or case.cause == "others":
                break
    if others > OTHERS_MANY and case.cause != "others" and await _is_ever(quiet=False):
        pytest.skip(BUSY)
    findings = run.found.diagnoses[-1].findings
    print(request.node.name, run.found.diagnoses[-1])
    if not case.cause:
        assert not findings
        return
    assert findings
    assert findings[0].cause == case.cause
    assert not case.whose or findings[0].whose == case.whose
    assert findings[0].stands is case.stands
