"""The folder for Docker Compose: what a plan becomes in it, and what may not show in it."""

from __future__ import annotations

import asyncio
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from mvmci.cluster import topology
from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import Unit, UnitConfig
from mvmci.cluster.topology import ComposeSection
from mvmci.deploy.access import deployment_of
from mvmci.deploy.plan import configs_of, placed, settings_of
from mvmci.deploy.render import render_compose
from mvmci.errors import Usage
from mvmci.runtimes import open_runtime
from mvmci.runtimes.compose import render
from mvmci.runtimes.compose.render import Service, Wanted, services
from mvmci.runtimes.compose.replica import number_in, question
from mvmci.store import ClusterSettings
from mvmci.system import keys
from mvmci.trust import tokens
from mvmci.trust.authority import Authority
from mvmci.trust.provision import BrokerConfig, ControlPlaneConfig
from tests.harness.places import ROOT

SHIPPED = ROOT / "topologies"
GOLDEN = Path(__file__).parent / "compose.yaml"
POOL = (
    "cluster: demo\naccess: pool\nexecutors: {count: 2, slots: 2, balancer: haproxy}\nworkers: {count: 3}\n"
)
IMAGES = {"unit": "mvmci-demo:IMAGE", "balancer": "mvmci-demo:BALANCER"}
SPEC = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")  # that of docker-compose 1.29


def wanted(text: str, tmp_path: Path, **more: Any) -> Wanted:
    """What is rendered for people; without `settings`, for `up`."""
    found, runtime = topology.read_topology(text, name="a.yaml"), open_runtime("compose", tmp_path, "demo")
    deployment = asyncio.run(placed(deployment_of(found, tmp_path / "a.yaml"), runtime, tls=True))
    broker = BrokerSettings(name="demo", port=40_000)
    told = {"settings": settings_of(found, deployment.engine)} | more
    return Wanted(
        cluster="demo",
        units=tuple(configs_of(deployment, found, runtime, (), None, broker)),
        queues=found.workers.queues,
        compose=found.compose,
        **told,
    )


def unit_of(service: Service, number: int) -> str:
    """The unit that a container of a service is."""
    return service.config.unit.name if service.config is not None else f"{service.name}-{number}"


def composed(text: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """The compose file of a cluster, as YAML that was read again."""
    body = render.compose_file(wanted(text, tmp_path, **more), "OWNER", IMAGES)
    found: dict[str, Any] = yaml.safe_load(render.strict_yaml.write_yaml(body))
    assert found == body
    return found


@pytest.fixture
def zipapp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that is one file."""
    path = tmp_path / "mvmci.pyz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__main__.py", "")
    monkeypatch.setattr(sys, "argv", [str(path)])
    return path


# ---- Units as services


def units(*names: str, role: str = "worker", options: tuple[str, ...] = ()) -> list[Unit]:
    return [Unit(name=name, role=role, host="local", options=options) for name in names]  # type: ignore[arg-type]


FOR_PEOPLE = ClusterSettings()


def grouped(found: list[Unit], settings: ClusterSettings | None = FOR_PEOPLE) -> list[Service]:
    configs = tuple(UnitConfig(unit=one) for one in found)
    return services(
        Wanted(cluster="c", units=configs, queues=(), compose=ComposeSection(), settings=settings)
    )


def test_units_that_are_alike_are_one_service_that_can_be_scaled() -> None:
    assert grouped(units("worker-1", "worker-2", "worker-3")) == [
        Service(name="worker", role="worker", count=3, options=())
    ]


def test_for_up_each_unit_is_a_service_of_its_own_that_can_be_started_alone() -> None:
    found = grouped(units("worker-1", "worker-2"), settings=None)
    assert [(one.name, one.count, unit_of(one, 1)) for one in found] == [
        ("worker", 1, "worker-1"),
        ("worker-2", 1, "worker-2"),
    ]


def test_a_unit_that_others_dial_has_a_service_of_its_own() -> None:
    found = grouped(units("executor-1", "executor-2", role="executor", options=("--listen=0.0.0.0:1",)))
    assert [(one.name, one.count, unit_of(one, 1)) for one in found] == [
        ("executor", 1, "executor-1"),
        ("executor-2", 1, "executor-2"),
    ]


@pytest.mark.parametrize("names", [("worker-2", "worker-3"), ("gpu", "cpu"), ("worker-1", "worker-3")])
def test_units_that_are_not_numbered_from_one_keep_their_names(names: tuple[str, ...]) -> None:
    assert [unit_of(one, 1) for one in grouped(units(*names))] == list(names)


@pytest.mark.parametrize("access", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_the_containers_are_the_units_of_the_plan(access: str, tmp_path: Path) -> None:
    found = wanted((SHIPPED / f"{access}.yaml").read_text(), tmp_path)
    told = [unit_of(one, n + 1) for one in services(found) for n in range(one.count)]
    assert told == [config.unit.name for config in found.units]
    body = composed((SHIPPED / f"{access}.yaml").read_text(), tmp_path)
    for one in services(found):
        service = body["services"][one.name]
        assert service["command"][0] == one.role
        assert set(one.options) <= set(service["command"])
        assert service["scale"] == one.count


def test_an_executor_is_dialled_by_the_name_of_its_service(tmp_path: Path) -> None:
    place = open_runtime("compose", tmp_path, "demo").place
    (executor,) = units("executor-1", role="executor")
    assert asyncio.run(place(executor)).address == "executor:27288"
    body = composed(POOL, tmp_path)
    assert {"--backend=executor-1=executor:27288", "--backend=executor-2=executor-2:27288"} <= set(
        body["services"]["balancer"]["command"]
    )


def test_what_comes_and_goes_changes_no_other_service(tmp_path: Path) -> None:
    """Else every worker would be made anew when executors are moved."""
    shared = (SHIPPED / "shared.yaml").read_text()
    alone = shared.replace("access: shared", "access: per-worker").partition("executors:")
    text = alone[0] + alone[2][alone[2].index("workers:") :]
    before, after = (composed(one, tmp_path)["services"] for one in (shared, text))
    assert set(before) - set(after) == {"executor"}
    assert {name: before[name] for name in after} == after


# ---- The file


def test_the_compose_file_of_the_shared_access(tmp_path: Path) -> None:
    """The golden one. To write it anew after a change that is meant: `python -m tests.unit.test_render`."""
    assert golden(tmp_path) == GOLDEN.read_text()


def golden(tmp_path: Path) -> str:
    text = (SHIPPED / "shared.yaml").read_text()
    body = render.compose_file(wanted(text, tmp_path), "OWNER", IMAGES)
    return render.strict_yaml.write_yaml(body)


def test_a_container_of_up_says_what_it_was_started_with_and_tells_no_secret(tmp_path: Path) -> None:
    found = wanted(POOL, tmp_path, settings=None)
    body = composed(POOL, tmp_path, settings=None)
    configs = {config.unit.name: config for config in found.units}
    for service in body["services"].values():
        label = service["labels"][render.CONFIG].replace("$$", "$")
        config = msgspec.json.decode(label, type=UnitConfig)
        assert config == configs.pop(service["labels"][render.UNIT])
        assert service["container_name"] == f"mvmci-demo-{config.unit.name}"
    assert configs == {}


def test_only_a_balancer_is_on_the_image_with_haproxy(tmp_path: Path) -> None:
    """So that one that comes or goes does not make everybody else's image another."""
    for name, service in composed(POOL, tmp_path)["services"].items():
        stage = "balancer" if name == "balancer" else "unit"
        assert (service["image"], service["build"]["target"]) == (IMAGES[stage], stage)
    without = wanted(POOL.replace(", balancer: haproxy", ""), tmp_path)
    assert render._image(wanted(POOL, tmp_path), "unit", b"") == render._image(without, "unit", b"")


def test_no_service_runs_once_or_without_a_bound_or_a_look_at_its_health(tmp_path: Path) -> None:
    for service in composed(POOL, tmp_path)["services"].values():
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"]
        assert service["mem_limit"] > 0 and service["pids_limit"] > 0
        assert "environment" not in service
        assert service["cap_drop"] == ["ALL"]


def test_the_network_is_as_the_file_says_and_the_port_in_one_that_has_ports(tmp_path: Path) -> None:
    text = "cluster: demo\nworkers: {}\ncompose: {network: {driver: macvlan, options: {parent: eth$0}}}\n"
    body = composed(text, tmp_path)
    assert body["networks"]["cluster"]["driver"] == "macvlan"
    assert body["networks"]["cluster"]["driver_opts"] == {"parent": "eth$$0"}
    assert body["networks"][render.BORDER]["driver"] == "bridge"
    assert sorted(body["networks"])[0] == render.BORDER, "Docker publishes in the first by name"
    assert body["services"]["broker"]["networks"] == ["cluster", render.BORDER]
    assert body["services"]["worker"]["networks"] == ["cluster"]
    assert body["services"]["broker"]["ports"] == ["127.0.0.1:40000:4222"]


def test_text_is_not_taken_for_variables(tmp_path: Path) -> None:
    text = "cluster: demo\nworkers: {labels: {home: $HOME}}\n"
    assert "--label=home=$$HOME" in composed(text, tmp_path)["services"]["worker"]["command"]


@pytest.mark.parametrize(("memory", "bytes_"), [("", (512 << 20) + (3 << 30)), ("memory: 1GiB", 1 << 30)])
def test_the_memory_of_an_engine_is_that_of_its_slots_or_as_the_file_says(
    memory: str, bytes_: int, tmp_path: Path
) -> None:
    text = f"cluster: demo\nworkers: {{slots: 3}}\ncompose: {{{memory}}}\n"
    assert composed(text, tmp_path)["services"]["worker"]["mem_limit"] == bytes_


@pytest.mark.parametrize("text", [POOL, (SHIPPED / "shared.yaml").read_text()])
def test_the_file_fits_the_schemas(text: str, tmp_path: Path) -> None:
    """That of docker-compose 1.29 where it is, else the names in it that are used here."""
    body = composed(text, tmp_path)
    if SPEC.exists():
        spec = json.loads(SPEC.read_text())
        known = set(spec["definitions"]["service"]["properties"])
        assert set(body) <= set(spec["properties"])
    else:
        known = set(KEYS)
    for service in body["services"].values():
        assert set(service) <= known
        assert set(service) <= set(KEYS)


KEYS = {
    "image": str, "build": dict, "command": list, "init": bool, "restart": str, "stop_grace_period": str,
    "depends_on": list, "networks": list, "volumes": list, "secrets": list, "healthcheck": dict,
    "mem_limit": int, "pids_limit": int, "cap_drop": list, "security_opt": list, "logging": dict,
    "labels": dict, "ports": list, "scale": int, "container_name": str,
}  # fmt: skip


@pytest.mark.parametrize(("user", "inside"), [(0, render.USER), (1000, 1000)])
def test_who_can_read_the_secrets_is_who_containers_are(
    user: int, inside: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compose gives a file as it is: its owner stays. No container is root."""
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert f"\nARG USER_ID={inside}\n" in render.dockerfile(wanted("cluster: demo\nworkers: {}\n", tmp_path))


def test_haproxy_is_only_in_an_image_that_needs_it(tmp_path: Path) -> None:
    assert "haproxy" in render.dockerfile(wanted(POOL, tmp_path))
    assert "haproxy" not in render.dockerfile(wanted("cluster: demo\nworkers: {}\n", tmp_path))


# ---- The folder


def test_a_folder_is_whole_and_the_same_again_changes_nothing(zipapp: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text((SHIPPED / "shared.yaml").read_text())
    folder = asyncio.run(render_compose(file, tmp_path / "out"))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"compose.yaml", "Dockerfile", "mvmci.pyz", ".env", ".dockerignore"} <= names
    assert (folder / "mvmci.pyz").read_bytes() == zipapp.read_bytes()
    before = {name: (folder / name).stat().st_mtime_ns for name in names if not name.startswith("state/")}
    assert asyncio.run(render_compose(file, folder)) == folder
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}


def test_each_container_gets_no_more_than_it_needs(zipapp: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text((SHIPPED / "shared.yaml").read_text())
    folder = asyncio.run(render_compose(file, tmp_path / "out"))
    body = yaml.safe_load((folder / "compose.yaml").read_text())
    given = {name: set(service["secrets"]) for name, service in body["services"].items()}
    assert given == {
        "broker": {"broker.json", "broker.key", "broker.pem"},
        "control-plane": {"control-plane.json"},
        "executor": {"executor.ticket", "engine.token"},
        "worker": {"worker.ticket", "engine.token"},
    }
    told = msgspec.json.decode((folder / "secrets" / "broker.json").read_bytes(), type=BrokerConfig)
    plane = msgspec.json.decode(
        (folder / "secrets" / "control-plane.json").read_bytes(), type=ControlPlaneConfig
    )
    authority = Authority.load(folder / "state" / "demo")
    seeds = [authority.operator, authority.account, authority.system]
    assert not [seed for seed in (plane.seed, *seeds) if seed in str(told)]
    assert not [seed for seed in seeds if seed in str(plane)]
    believed = told.accounts[authority.accounts["workers"]]
    assert keys.public(plane.signer().seed) in tokens.peek(believed).signers  # type: ignore[union-attr]
    assert plane.settings is not None and plane.settings.engine == "https://executor:27288"
    assert (told.settings.listen, told.settings.port) == ("0.0.0.0", 4222)
    shown = (folder / "compose.yaml").read_text() + (folder / "Dockerfile").read_text()
    assert "mvmci1_" not in shown and plane.seed not in shown
    assert (folder / ".dockerignore").read_text() == "*\n!mvmci.pyz\n"


def test_only_one_file_can_go_into_an_image(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("cluster: demo\nworkers: {}\n")
    with pytest.raises(Usage, match="this one runs from its source"):
        asyncio.run(render_compose(file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- What a container is called


def answer(name: str, network: str = "n") -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in (name, network))
    asked = bytearray(question("172.19.0.3"))
    asked[7] = 1  # there is one record
    return bytes(asked) + b"\xc0\x0c" + b"\0\x0c\0\x01\0\0\0\0" + b"\0\x28" + labels + b"\0"


@pytest.mark.parametrize(
    ("name", "service", "number"),
    [
        ("mvmci-demo_worker_12", "worker", "12"),
        ("mvmci-demo-worker-3", "worker", "3"),
        ("a-b-executor-1", "executor", "1"),
        ("mvmci-demo-coworker-3", "worker", None),
        ("mvmci-demo-worker", "worker", None),
        ("f3a1b2c3d4e5", "worker", None),
    ],
)
def test_a_container_knows_its_number_by_its_name(name: str, service: str, number: str | None) -> None:
    assert number_in(answer(name, "0" * 49), service) == number


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 6, question("10.0.0.1"), answer("worker-1")[:40], b"\xff" * 90]
)
def test_nonsense_is_no_name(data: bytes) -> None:
    assert number_in(data, "worker") is None


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(golden(Path(made)))
