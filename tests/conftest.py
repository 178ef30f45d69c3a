"""A broker for the whole run, and the three places where jobs can be kept.

`open_store(unit)` gives a way into one place for the whole test; `place` names its kind, and
`damage(digest)` changes a blob behind its back. A module may override `hint_lapse_s` and `gone_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from mvmci.roles.unit import new_event_loop
from mvmci.store import GONE_S, HINT_LAPSE_S, Store
from mvmci.stores.folder import Folder
from mvmci.stores.nats import dial_cluster, remove
from mvmci.stores.nats.blobs import _token as blob_token
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link
from tests.harness.broker import ensure, serve
from tests.harness.docker import Docker, find_docker
from tests.harness.memory import Memory
from tests.harness.places import ZIPAPP, guest_path, need
from tests.harness.ports import clusters_ports
from tests.harness.program import Mvmci

# Where several workers run the tests, a file stays on one of them. So do folders that share something:
# programs share a user, and the clean-up of one ends all that the user has; containers share the project of
# one cluster, and its image; clusters in chaos would starve each other's units.
TOGETHER = {
    "tests/faults/chaos/": "chaos",
    "tests/parts/effects/": "users",
    "tests/parts/sandbox/": "users",
    "tests/program/compose/": "containers",
}
# What is long and shares nothing is dealt out in parts: by each test, or by what its clusters run on.
APART = re.compile(
    r"(tests/program/ssh/.*)"
    r"|(tests/program/cluster/test_accesses\.py)::.*\[(per-worker|peer|pool behind HAProxy|pool|shared)"
    r"|(tests/contracts/test_runtime\.py)::.*\[(local|compose|ssh)\]"
    r"|(tests/parts/hosts/test_service\.py)::.*\[(root|ci|bare)"
)
# What takes long begins first, the longest of it before the others.
FIRST = (
    "tests/program/compose/",
    "tests/faults/chaos/",
    "tests/program/hosts/test_life.py",
    "tests/program/upgrade/",
    "tests/program/ssh/test_killed.py",
    "tests/program/hosts/",
    "tests/parts/hosts/test_service.py",
    "tests/program/test_zipapp.py",
    "tests/program/cluster/",
    "tests/program/ssh/",
    "tests/contracts/test_runtime.py",
    "tests/program/",
    "tests/foreign/",
    "tests/faults/",
)

# What is long: it starts programs or clusters by the dozen, uses containers, or kills at random.
SOAK = (
    "tests/faults/chaos/",
    "tests/faults/test_crash_everywhere.py",
    "tests/faults/test_flipped_bits.py",
    "tests/faults/test_kill_at_random.py",
    "tests/foreign/",
    "tests/parts/bench/test_coverage.py",
    "tests/parts/roles/test_shortcuts.py",
    "tests/parts/trust/test_fuzz.py",
    "tests/program/bench/test_flood.py",
    "tests/program/bench/test_stall.py",
    "tests/program/bench/test_verb.py",
    "tests/program/ssh/test_bench.py",
    "tests/program/cli/test_death.py",
    "tests/program/cli/test_limits.py",
    "tests/program/cli/test_tampering.py",
    "tests/program/cli/test_unprivileged.py",
    "tests/program/cluster/test_accesses.py",
    "tests/program/cluster/test_backup.py",
    "tests/program/cluster/test_broker.py",
    "tests/program/cluster/test_changes.py",
    "tests/program/cluster/test_down.py",
    "tests/program/cluster/test_full_disk.py",
    "tests/program/cluster/test_topologies.py",
    "tests/program/compose/",
    "tests/program/hosts/",
    "tests/program/test_benchmarks.py",
    "tests/program/test_demo.py",
    "tests/program/test_zipapp.py",
    "tests/program/upgrade/",
)

# How long an example takes says nothing of ours: the machine may be busy.
settings.register_profile("mvmci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mvmci")

PLACES = ("memory", "folder", "jetstream")
LISTENING = "jetstream-listening"  # where every unit hears all others, as a control plane does
CLUSTER_BYTES = 512 << 20
STARTED = time.time()

OpenStore = Callable[[str], Awaitable[Store]]


async def open_nats(url: str, cluster: str, unit: str, **options: Any) -> Store:
    """The store of `cluster`, for somebody who may make what is missing there."""
    return (await dial_cluster(url, cluster, unit, maintains=True, **options)).store


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SOAK) or item.nodeid.endswith("[compose]"):
            item.add_marker("soak")
    items.sort(
        key=lambda item: next((n for n, one in enumerate(FIRST) if item.nodeid.startswith(one)), len(FIRST))
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files: marks of xdist do not reach pytest 9's node ids."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = (what for folder, what in TOGETHER.items() if nodeid.startswith(folder))
            apart = APART.match(nodeid)
            return "::".join(filter(None, apart.groups())) if apart else next(shared, nodeid.split("::")[0])

        def _assign_work_unit(self, node: Any) -> None:
            """A worker is given its next file before it begins the last test of this one, and keeps it from
            the others for as long as that test takes: behind what is long comes the last of what is short."""
            units = self.assigned_work[node].values()
            pending = [test for unit in units for test, is_done in unit.items() if not is_done]
            if any(test.startswith(FIRST) for test in pending):
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return Files(config, log)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that units run on."""
    return {"units": new_event_loop}


@pytest.fixture(autouse=True, scope="session")
def no_state_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds the clusters of whoever runs it, none is added to them, and each has ports of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVMCI_PORTS", clusters_ports())
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("xdg")))
        patch.delenv("MVMCI_STATE", raising=False)
        yield


@pytest.fixture(autouse=True)
def no_bug_report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test passes over a crash: a unit that crashed was started again, and nothing else tells."""
    yield
    for report in Path("/tmp").glob("mvmci-bug-*.txt"):  # programs in tests are told of no other
        with contextlib.suppress(FileNotFoundError):  # one of us reports it
            if report.stat().st_mtime >= STARTED:
                kept = report.rename(tmp_path_factory.getbasetemp() / report.name)
                pytest.fail(f"a bug in mvmci, in this test or beside it: {kept}\n{kept.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def docker() -> Docker:
    return find_docker()


@pytest.fixture(scope="session")
def zipapp() -> Path:
    need(ZIPAPP.exists(), "no zipapp: build it with ./just zipapp")
    return ZIPAPP


@pytest.fixture(scope="session")
def program(zipapp: Path, tmp_path_factory: pytest.TempPathFactory) -> Mvmci:
    """The program, with a home for the whole run, into which it unpacks itself once."""
    run = tmp_path_factory.getbasetemp()
    home = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "home"
    found = Mvmci(zipapp, home / "state", home)
    with filelock.FileLock(f"{home}.lock"):
        if not home.exists():
            (home / ".cache").mkdir(parents=True)
            assert found("version").code == 0
    return found


@pytest.fixture(scope="session")
def guest() -> Callable[[str], Path]:
    """The path of a guest by its name."""
    return guest_path


@pytest.fixture(scope="session")
def script() -> Path:
    """The workflow that does what its input says."""
    return guest_path("script")


@pytest.fixture(scope="session")
def host_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines in tests keep slots and code, so that each guest is compiled once."""
    return tmp_path_factory.mktemp("host") / "_host"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def broker_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A broker that syncs every write, for the whole run."""
    async with serve(tmp_path_factory.mktemp("broker")) as url:
        yield url


@pytest.fixture
def hint_lapse_s() -> float:
    return HINT_LAPSE_S


@pytest.fixture
def gone_s() -> float:
    return GONE_S


@dataclass
class Place:
    """Where a test's jobs are kept."""

    kind: str
    open: OpenStore
    damage: Callable[[str], Awaitable[None]]
    stores: list[Store] = field(default_factory=list)

    async def store(self, unit: str) -> Store:
        store = await self.open(unit)
        self.stores.append(store)
        return store


@pytest.fixture(params=PLACES)
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, broker_url: str, hint_lapse_s: float, gone_s: float
) -> AsyncIterator[Place]:
    """An empty place of each kind."""
    if request.param in ("jetstream", LISTENING):
        url, cluster = broker_url, f"t-{secrets.token_hex(4)}"
        await ensure(url, cluster, store_bytes=CLUSTER_BYTES)
        opens = _in_jetstream(
            url, cluster, hint_lapse_s=hint_lapse_s, gone_s=gone_s, listens=request.param == LISTENING
        )
        place = Place("jetstream", opens, _damage_in(url, cluster))
    elif request.param == "folder":
        folder = tmp_path / "state"
        place = Place("folder", _opens(Folder(folder)), _damage_file(folder))
    else:
        place = Place("memory", _opens(Memory(hint_lapse_s=hint_lapse_s)), _damage_file(None))
    yield place
    for store in place.stores:
        await store.close()
    if place.kind == "jetstream":
        await remove(url, cluster)


@pytest.fixture
def open_store(place: Place) -> OpenStore:
    return place.store


@pytest.fixture
async def store(place: Place) -> Store:
    return await place.store("u1")


def _in_jetstream(url: str, cluster: str, **options: Any) -> OpenStore:
    async def open_store(unit: str) -> Store:
        return await open_nats(url, cluster, unit, **options)

    return open_store


def _opens(place: Memory | Folder) -> OpenStore:
    async def open_store(unit: str) -> Store:
        return place.store(unit)

    return open_store


def _damage_file(folder: Path | None) -> Callable[[str], Awaitable[None]]:
    async def damage(digest: str) -> None:
        if folder is None:
            pytest.skip("what is in memory alone has no back")
        path = folder / "blobs" / digest[7:9] / digest[7:]
        path.write_bytes(path.read_bytes() + b"!")

    return damage


def _damage_in(url: str, cluster: str) -> Callable[[str], Awaitable[None]]:
    async def damage(digest: str) -> None:
        layout, link = Layout(cluster), Link(url, "vandal")
        await link.open()
        info = await link.last(layout.blobs, layout.blob_info(blob_token(digest)))
        assert info is not None
        await link.request(layout.blob_chunks(msgspec.json.decode(info.data)["nuid"]), b"!")
        await link.close()

    return damage
