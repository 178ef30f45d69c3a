"""What a cluster file means, when a deployment can be no cluster, and what leads from one to another."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from mvmci.cluster import topology
from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.changes import Action, Observed, changes, in_stopping_order, next_generation, steps
from mvmci.cluster.deployment import (
    LOCAL_HOST,
    ROLES,
    UNITS_MAX,
    Deployment,
    Place,
    RoleName,
    Unit,
    UnitConfig,
    check_deployment,
    deal,
    hosts_of,
    listening,
    resolve,
)
from mvmci.errors import Usage
from tests.harness.places import ROOT

SHIPPED = ROOT / "topologies"
ACCESSES = ("per-worker", "peer", "pool", "shared")


def planned(text: str) -> Deployment:
    found = topology.read_topology(text, name="a.yaml", accesses=ACCESSES)
    module: Any = importlib.import_module(f"topologies.{found.access.replace('-', '_')}")
    plan: Deployment = module.plan(found)
    check_deployment(plan, hosts_of(found))
    return plan


def lines(found: Deployment) -> list[str]:
    return [" ".join([unit.name, unit.role, unit.host, *unit.options]) for unit in found.units]


def shipped(access: str) -> Deployment:
    return planned((SHIPPED / f"{access}.yaml").read_text())


# ---- per-worker


def test_the_file_that_ships_is_a_broker_a_control_plane_and_three_workers() -> None:
    found = shipped("per-worker")
    assert found.engine == "embedded"
    assert lines(found) == [
        "broker-1 broker local",
        "control-plane-1 control-plane local",
        "worker-1 worker local --slots=2 --queue=default",
        "worker-2 worker local --slots=2 --queue=default",
        "worker-3 worker local --slots=2 --queue=default",
    ]


def test_a_count_is_the_total_and_is_dealt_round_the_hosts_that_are_present() -> None:
    text = """
        cluster: demo
        hosts: {a: {}, gone: {state: absent}, dead: {state: lost}, b: {}}
        workers: {count: 3}
    """
    assert lines(planned(text)) == [
        "broker-1 broker a",
        "control-plane-1 control-plane a",
        "worker-1 worker a --queue=default",
        "worker-2 worker b --queue=default",
        "worker-3 worker a --queue=default",
    ]


def test_each_role_keeps_to_the_hosts_that_are_named_for_it() -> None:
    text = """
        cluster: demo
        hosts: {a: {}, b: {}, c: {}}
        broker: {hosts: [b]}
        control_plane: {hosts: [a, c]}
        workers: {hosts: [c, b], count: 3, slots: 1}
    """
    assert [line.rpartition(" --slots")[0] or line for line in lines(planned(text))] == [
        "broker-1 broker b",
        "control-plane-1 control-plane a",
        "control-plane-2 control-plane c",
        "worker-1 worker c",
        "worker-2 worker b",
        "worker-3 worker c",
    ]


def test_a_broker_of_ones_own_is_not_started() -> None:
    roles = [unit.role for unit in planned("cluster: d\nworkers: {}\nbroker: {url: 'tls://x:1'}\n").units]
    assert roles == ["control-plane", "worker"]


def test_a_worker_is_told_what_the_file_says_of_workers() -> None:
    text = """
        cluster: demo
        workers: {slots: 4, queues: [default, big], labels: {spot: yes, arch: amd64}}
        min_isolation: confined
        isolation: per-job
    """
    assert planned(text).units[-1].options == (
        "--slots=4",
        "--queue=default",
        "--queue=big",
        "--label=arch=amd64",
        "--label=spot=yes",
        "--min-isolation=confined",
        "--isolation=per-job",
    )


def test_a_worker_has_the_labels_of_its_host_and_of_its_group_and_the_host_knows_better() -> None:
    text = """
        cluster: demo
        hosts: {a: {labels: {arch: arm64}}, b: {}}
        workers: {count: 2, labels: {arch: amd64, spot: yes}}
    """
    a, b = planned(text).units[-2:]
    assert a.options[-2:] == ("--label=arch=arm64", "--label=spot=yes")
    assert b.options[-2:] == ("--label=arch=amd64", "--label=spot=yes")


def test_nothing_but_workers_depends_on_what_the_file_says_of_workers() -> None:
    few = planned("cluster: d\nworkers: {count: 3}\n").units
    many = planned("cluster: d\nworkers: {count: 5}\n").units
    assert many[: len(few)] == few


# ---- The other three


def test_peer_is_one_executor_that_listens_nowhere() -> None:
    found = shipped("peer")
    assert found.engine == "broker"
    assert lines(found) == [
        "broker-1 broker local",
        "control-plane-1 control-plane local",
        "executor-1 executor local --slots=4",
        "worker-1 worker local --slots=2 --queue=default",
        "worker-2 worker local --slots=2 --queue=default",
        "worker-3 worker local --slots=2 --queue=default",
    ]
    assert "listen" not in str(found)


def test_pool_is_several_executors_that_the_broker_balances() -> None:
    found = shipped("pool")
    assert found.engine == "broker"
    assert lines(found) == [
        "broker-1 broker local",
        "control-plane-1 control-plane local",
        "executor-1 executor local --slots=4",
        "executor-2 executor local --slots=4",
        "worker-1 worker local --slots=4 --queue=default",
        "worker-2 worker local --slots=4 --queue=default",
        "worker-3 worker local --slots=4 --queue=default",
    ]
    assert "listen" not in str(found)


def test_shared_is_one_executor_that_workers_reach_by_its_name() -> None:
    found = shipped("shared")
    assert found.engine == "http://{address:executor-1}"
    assert lines(found) == [
        "broker-1 broker local",
        "control-plane-1 control-plane local",
        "executor-1 executor local --slots=4 --listen={listen}",
        "worker-1 worker local --slots=2 --queue=default",
        "worker-2 worker local --slots=2 --queue=default",
    ]


def test_a_pool_behind_a_balancer_of_ones_own_listens_and_workers_take_its_url() -> None:
    found = planned(POOL.replace("count: 2", "count: 2, url: 'https://ci.example.com:8080/'"))
    assert found.engine == "https://ci.example.com:8080"
    assert lines(found)[2:4] == [
        "executor-1 executor a --listen={listen}",
        "executor-2 executor b --listen={listen}",
    ]


def test_a_pool_behind_haproxy_has_it_beside_the_control_plane_and_in_front_of_all() -> None:
    found = planned(POOL.replace("count: 2", "count: 2, balancer: haproxy"))
    assert found.engine == "http://{address:balancer-1}"
    assert lines(found)[2:] == [
        "executor-1 executor a --listen={listen}",
        "executor-2 executor b --listen={listen}",
        "balancer-1 balancer b --listen={listen}"
        " --backend=executor-1={address:executor-1} --backend=executor-2={address:executor-2}",
        "worker-1 worker a --queue=default",
    ]


POOL = """
    cluster: demo
    access: pool
    hosts: {a: {}, b: {}}
    control_plane: {hosts: [b]}
    executors: {count: 2}
    workers: {count: 1}
"""


@pytest.mark.parametrize(("access", "hosts"), [("shared", ["b"]), ("peer", ["a"]), ("pool", ["a"])])
def test_where_the_file_does_not_say_only_a_shared_executor_is_beside_the_control_plane(
    access: str, hosts: list[str]
) -> None:
    def executors(text: str) -> list[str]:
        return [unit.host for unit in planned(text).units if unit.role == "executor"]

    text = POOL.replace("pool", access).replace("count: 2", "count: 1")
    assert executors(text) == hosts
    assert executors(text.replace("executors: {", "executors: {hosts: [b], ")) == ["b"]


@pytest.mark.parametrize("access", ACCESSES)
def test_engines_are_told_of_isolation_wherever_they_are_or_may_be_one_day(access: str) -> None:
    executors = "executors: {}" if access != "per-worker" else ""
    text = f"""
        cluster: demo
        access: {access}
        {executors}
        workers: {{}}
        min_isolation: confined
        isolation: per-job
    """
    for unit in planned(text).units:
        told = [option for option in unit.options if "isolation" in option]
        has_engine = unit.role in ("executor", "worker")
        assert told == (["--min-isolation=confined", "--isolation=per-job"] if has_engine else [])


@pytest.mark.parametrize("access", ACCESSES)
def test_units_start_in_the_order_of_their_roles(access: str) -> None:
    roles = [ROLES.index(unit.role) for unit in shipped(access).units]
    assert roles == sorted(roles)


def test_a_move_between_two_accesses_leaves_broker_control_plane_and_workers_alone() -> None:
    more = {"pool": "executors: {count: 2}"}
    plans = [
        planned(f"cluster: d\naccess: {access}\nworkers: {{count: 2}}\n{more.get(access, '')}")
        for access in ACCESSES
    ]
    for was in plans:
        for becomes in plans:
            assert {one.role for one in touched(was.units, becomes.units)} <= {"executor", "balancer"}


# ---- check_deployment


def unit(name: str, role: str = "worker", host: str = LOCAL_HOST, *options: str) -> Unit:
    return Unit(name=name, role=role, host=host, options=options)  # type: ignore[arg-type]


LISTENS = "--listen={listen}"
CONTROL, WORKER = unit("c", "control-plane"), unit("w")
EXECUTOR = unit("e", "executor", LOCAL_HOST, LISTENS)
QUIET = unit("q", "executor")
BEHIND = "--backend=e={address:e}"
BAD: dict[str, tuple[Deployment, str]] = {
    "twice": (Deployment(units=(CONTROL, WORKER, WORKER)), "the plan has two units named w"),
    "no worker": (Deployment(units=(CONTROL,)), "the plan has no worker"),
    "no control plane": (Deployment(units=(WORKER,)), "the plan has no control-plane"),
    "nothing": (Deployment(units=()), "the plan has no control-plane"),
    "too many": (
        Deployment(units=(CONTROL, *deal("w", "worker", UNITS_MAX, [LOCAL_HOST], ()))),
        f"the plan has {UNITS_MAX + 1} units, and may have {UNITS_MAX}",
    ),
    "missing host": (
        Deployment(units=(CONTROL, unit("w", "worker", "mars"))),
        "w is to be on mars, which is no host of the file",
    ),
    "unknown address": (
        Deployment(units=(CONTROL, unit("w", "worker", LOCAL_HOST, "--to={address:x}"))),
        "w would dial x, which is no unit of the plan",
    ),
    "silent address": (
        Deployment(units=(CONTROL, QUIET, WORKER), engine="http://{address:q}"),
        "the workers would dial q, which does not listen",
    ),
    "unknown engine": (
        Deployment(units=(CONTROL, WORKER), engine="http://{address:x}"),
        "the workers would dial x, which is no unit of the plan",
    ),
    "itself": (
        Deployment(units=(CONTROL, WORKER, unit("e", "executor", LOCAL_HOST, LISTENS, BEHIND))),
        "the addresses of the plan go in a circle: e → e",
    ),
    "circle": (
        Deployment(
            units=(
                CONTROL,
                WORKER,
                unit("e", "executor", LOCAL_HOST, LISTENS, "--to={address:f}"),
                unit("f", "executor", LOCAL_HOST, LISTENS, "--to={address:e}"),
            )
        ),
        "the addresses of the plan go in a circle: e → f → e",
    ),
    "no executor": (
        Deployment(units=(CONTROL, WORKER), engine="broker"),
        "workers would look for an engine at the broker, and the plan has no executor",
    ),
    "served by a worker": (
        Deployment(units=(CONTROL, unit("w", "worker", LOCAL_HOST, LISTENS)), engine="http://{address:w}"),
        "nobody serves the engine http://{address:w}: w is a worker",
    ),
    "served by nobody": (
        Deployment(units=(CONTROL, QUIET, WORKER), engine="http://ci.example.com"),
        "nobody serves the engine http://ci.example.com: no executor of the plan listens",
    ),
    "nothing behind": (
        Deployment(
            units=(CONTROL, EXECUTOR, unit("b", "balancer", LOCAL_HOST, LISTENS), WORKER),
            engine="http://{address:b}",
        ),
        "b has no executor behind it",
    ),
    "engine": (Deployment(units=(CONTROL, WORKER), engine="ftp://x"), "the plan's engine is 'ftp://x'"),
    "no engine": (Deployment(units=(CONTROL, WORKER), engine=""), "the plan's engine is ''"),
    "hole": (
        Deployment(units=(CONTROL, EXECUTOR, WORKER), engine="http://{listn}"),
        "the plan's engine is 'http://{listn}'",
    ),
    "control character": (
        Deployment(units=(CONTROL, unit("w", "worker", LOCAL_HOST, "--label=a=b\0c"))),
        "an option of w has a line break or a control character",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_plan_that_can_be_no_cluster_is_refused(name: str) -> None:
    plan, sentence = BAD[name]
    with pytest.raises(Usage) as caught:
        check_deployment(plan, [LOCAL_HOST])
    assert caught.value.message == sentence
    assert caught.value.hint or name in ("too many", "control character")


@pytest.mark.parametrize("name", ["../up", "Worker", "", "a b", "-x", "x" * 64])
def test_a_strangers_plan_names_no_unit_so_that_it_would_leave_its_folder(name: str) -> None:
    with pytest.raises(Usage, match="name"):
        check_deployment(Deployment(units=(CONTROL, unit(name))), [LOCAL_HOST])


@pytest.mark.parametrize(
    ("plan", "where"),
    [
        (Deployment(units=(CONTROL, unit("w", "wrker"))), "$.units[1].role"),
        (Deployment(units=(CONTROL, Unit(name=3, role="worker", host=LOCAL_HOST))), "$.units[1].name"),  # type: ignore[arg-type]
        (Deployment(units=None), "$.units"),  # type: ignore[arg-type]
        (Deployment(units=(CONTROL, object())), ""),  # type: ignore[arg-type]
        (Deployment(units=(CONTROL, WORKER), engine=None), "$.engine"),  # type: ignore[arg-type]
    ],
)
def test_a_plan_that_holds_something_else_than_it_says_is_refused(plan: Deployment, where: str) -> None:
    with pytest.raises(Usage, match="the plan is malformed: ") as caught:
        check_deployment(plan, [LOCAL_HOST])
    assert where in caught.value.message


@pytest.mark.parametrize(
    "plan",
    [
        Deployment(units=(CONTROL, WORKER)),
        Deployment(units=(CONTROL, QUIET, WORKER), engine="broker"),
        Deployment(units=(CONTROL, EXECUTOR, WORKER), engine="https://ci.example.com/pool"),
        Deployment(
            units=(CONTROL, EXECUTOR, unit("b", "balancer", LOCAL_HOST, LISTENS, BEHIND), WORKER),
            engine="http://{address:b}",
        ),
    ],
)
def test_a_strangers_plan_may_be_anything_that_can_work(plan: Deployment) -> None:
    check_deployment(plan, [LOCAL_HOST, "other"])


# ---- resolve


def test_places_are_filled_in_wherever_they_are_meant() -> None:
    plan = planned(POOL.replace("count: 2", "count: 2, balancer: haproxy"))
    names = [unit.name for unit in listening(plan)]
    assert names == ["executor-1", "executor-2", "balancer-1"]  # nobody else has one
    hosts = {unit.name: unit.host for unit in plan.units}
    found = resolve(
        plan,
        {
            name: Place(listen=f"0.0.0.0:{port}", address=f"{hosts[name]}.lan:{port}")
            for port, name in enumerate(names, 7000)
        },
    )
    assert found.engine == "http://b.lan:7002"
    assert lines(found)[2:] == [
        "executor-1 executor a --listen=0.0.0.0:7000",
        "executor-2 executor b --listen=0.0.0.0:7001",
        "balancer-1 balancer b --listen=0.0.0.0:7002"
        " --backend=executor-1=a.lan:7000 --backend=executor-2=b.lan:7001",
        "worker-1 worker a --queue=default",
    ]
    assert [unit.listen for unit in found.units[1:3]] == [None, "0.0.0.0:7000"]


def test_a_deployment_without_places_is_its_own_answer() -> None:
    plan = planned("cluster: d\nworkers: {count: 2}\n")
    assert listening(plan) == []
    assert resolve(plan, {}) == plan


# ---- changes


def config(unit: Unit, **more: Any) -> UnitConfig:
    return UnitConfig(unit=unit, **more)


def seen(unit: Unit, **more: Any) -> Observed:
    """A unit that runs, with what it was started with."""
    about = {key: more.pop(key) for key in list(more) if key in Observed.__struct_fields__}
    told: dict[str, Any] = {"state": "ready", "config": config(unit, **more)} | about
    return Observed(name=unit.name, role=unit.role, host=unit.host, **told)


def done(
    was: Iterable[Observed], becomes: Iterable[UnitConfig], engine: str = "embedded", *, moves: bool = False
) -> list[Action]:
    """What is done; units that are kept are left out."""
    return [one for one in changes([*becomes], was, engine, moves=moves) if one.kind != "keep"]


def touched(was: Iterable[Unit], becomes: Iterable[Unit]) -> list[Unit]:
    acts = done(map(seen, was), map(config, becomes))
    return [action.unit for action in acts if action.unit is not None]


def said(actions: Iterable[Action]) -> list[str]:
    return [f"{one.kind} {one.unit.name}: {one.why}" for one in actions if one.unit is not None]


def test_what_is_as_it_is_wanted_is_kept() -> None:
    units = planned("cluster: d\nworkers: {count: 3}\n").units
    actions = changes([*map(config, units)], map(seen, units), "embedded", moves=False)
    assert actions == [Action(kind="keep", unit=one) for one in units]


def test_from_nothing_everything_starts_in_order() -> None:
    units = planned("cluster: d\nworkers: {count: 2}\n").units
    assert done((), map(config, units)) == [Action(kind="start", unit=one) for one in units]


def test_another_count_touches_only_those_that_come_or_go() -> None:
    three = planned("cluster: d\nworkers: {count: 3}\n").units
    five = planned("cluster: d\nworkers: {count: 5}\n").units
    assert said(done(map(seen, three), map(config, five))) == ["start worker-4: ", "start worker-5: "]
    assert said(done(map(seen, five), map(config, three))) == ["stop worker-4: ", "stop worker-5: "]


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        (unit("w"), unit("w", "worker", "b"), "moves from local to b"),
        (
            unit("w", "worker", "a", "--slots=2", "--queue=x"),
            unit("w", "worker", "a", "--slots=4", "--queue=x"),
            "without --slots=2, with --slots=4",
        ),
        (unit("w", "executor"), unit("w"), "was an executor"),
    ],
)
def test_a_unit_that_changes_is_restarted_and_the_change_is_said(was: Unit, becomes: Unit, why: str) -> None:
    assert done([seen(was)], [config(becomes)]) == [Action(kind="restart", unit=becomes, why=why)]


BROKER = unit("b", "broker")
OURS = BrokerSettings(listen="127.0.0.1", port=4000)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"program": "new"}, "the program changes"),
        ({"trust": "other"}, "the broker's credentials change"),
        ({"dial": ("tls://x:2",)}, "the broker's address changes"),
        ({"runtime": (("compose.base", "y"),)}, "compose.base changes"),
        ({"runtime": ()}, "compose.base changes"),
        ({"generation": 1}, "it gets another key"),
        ({"program": "new", "trust": "other"}, "the broker's credentials change, the program changes"),
    ],
)
def test_whatever_else_a_unit_is_started_with_restarts_it_too(change: dict[str, Any], why: str) -> None:
    same: dict[str, Any] = {
        "program": "old", "trust": "t", "dial": ("tls://x:1",), "runtime": (("compose.base", "x"),),
    }  # fmt: skip
    assert done([seen(WORKER, **same)], [config(WORKER, **same)]) == []
    assert said(done([seen(WORKER, **same)], [config(WORKER, **(same | change))])) == [f"restart w: {why}"]


@pytest.mark.parametrize(
    ("change", "broker_why", "worker_why"),
    [
        ({"synced": False}, "durability becomes relaxed", ""),
        ({"store_bytes": 2 << 30}, "its store becomes 2GiB", ""),
        ({"port": 4001}, *2 * ("the broker moves to 127.0.0.1, port 4001",)),
        ({"listen": "0.0.0.0"}, *2 * ("the broker moves to 0.0.0.0, port 4000",)),
    ],
)
def test_what_a_broker_is_to_be_restarts_it_and_who_dials_it_where_it_moves(
    change: dict[str, Any], broker_why: str, worker_why: str
) -> None:
    becomes = msgspec.structs.replace(OURS, **change)
    dial = ("elsewhere",) if worker_why else ("here",)
    actions = done(
        [seen(BROKER, broker=OURS), seen(WORKER, dial=("here",))],
        [config(BROKER, broker=becomes), config(WORKER, dial=dial)],
    )
    assert said(actions) == [
        f"restart b: {broker_why}",
        *([f"restart w: {worker_why}"] if worker_why else []),
    ]


def test_a_unit_of_which_nobody_knows_what_it_was_started_with_is_restarted() -> None:
    assert said(done([seen(WORKER, config=None)], [config(WORKER)])) == [
        "restart w: it was not started by `mvmci up`"
    ]


def test_a_unit_that_was_given_up_is_started_and_one_that_was_refused_gets_another_key() -> None:
    down = seen(WORKER, state="down", given_up=True, last_exit=7, reason="it was revoked", generation=2)
    assert said(done([down], [config(WORKER, generation=2)])) == ["start w: is down: it was revoked"]
    assert next_generation(down) == 3
    assert next_generation(seen(WORKER, state="down", last_exit=3, generation=2)) == 2
    assert next_generation(None) == 0


def test_a_unit_that_somebody_began_to_stop_is_started_again() -> None:
    leaving = seen(WORKER, state="draining")
    assert said(done([leaving], [config(WORKER)])) == ["restart w: it is being stopped"]


def test_stops_come_last() -> None:
    actions = done(
        map(seen, [unit("old"), unit("same"), unit("w", "worker", "a")]),
        map(config, [unit("new"), unit("same"), unit("w")]),
    )
    assert [line.partition(":")[0] for line in said(actions)] == ["start new", "restart w", "stop old"]


def test_a_stop_goes_from_the_workers_to_the_broker() -> None:
    roles: list[RoleName] = ["broker", "worker", "executor", "worker", "control-plane", "balancer"]
    assert in_stopping_order(roles) == ["worker", "balancer", "executor", "control-plane", "broker"]


# ---- changes, where workers move

W1 = unit("w-1")
E1, E1_HTTP = unit("e-1", "executor"), unit("e-1", "executor", LOCAL_HOST, "--listen=h:1")
E2, B1 = unit("e-2", "executor"), unit("b-1", "balancer", LOCAL_HOST, "--listen=h:2")


@pytest.mark.parametrize(
    ("before", "units", "engine", "meanwhile"),
    [
        ((), (E1, W1), "broker", (E1, W1)),
        ((W1,), (E1, W1), "broker", (E1, W1)),
        ((E1, W1), (W1,), "embedded", (W1, E1)),
        ((E1, E2, B1, W1), (E1, W1), "broker", (E1, W1, E2, B1)),
        ((E1_HTTP, W1), (E1, W1), "broker", (E1_HTTP, W1)),  # every executor takes work from the broker
        ((E1, W1), (E1_HTTP, W1), "http://h:1", (E1_HTTP, W1)),  # and only some over HTTP
        ((E1, E2, W1), (E1_HTTP, W1), "http://h:1", (E1_HTTP, W1, E2)),
    ],
    ids=["first", "from inside", "to inside", "fewer", "door shut", "door opened", "door opened, fewer"],
)
def test_while_workers_move_both_what_they_leave_and_what_they_go_to_is_there(
    before: tuple[Unit, ...], units: tuple[Unit, ...], engine: str, meanwhile: tuple[Unit, ...]
) -> None:
    assert during_move(before, units, engine) == meanwhile


def during_move(before: tuple[Unit, ...], units: tuple[Unit, ...], engine: str) -> tuple[Unit, ...]:
    """What runs when all has been done but what waits until workers have moved."""
    actions = changes([*map(config, units)], map(seen, before), engine, moves=True)
    late = {one.unit.name: one for one in actions if one.unit is not None and one.after_move}
    assert all(one.why.endswith("once no worker uses it") for one in late.values())
    old = {unit.name: unit for unit in before}
    stays = [old[unit.name] if unit.name in late else unit for unit in units]
    return (*stays, *(old[name] for name, action in late.items() if action.kind == "stop"))


def test_workers_are_changed_before_they_move() -> None:
    slow, quick = unit("w-1"), unit("w-1", "worker", LOCAL_HOST, "--slots=8")
    assert during_move((slow, unit("w-2")), (quick,), "embedded") == (quick,)


def test_where_everybody_has_to_start_again_nobody_waits_for_a_move() -> None:
    """The old engine would be left with a broker that has moved."""
    was = [seen(E1, trust="old"), seen(E2, trust="old"), seen(W1, trust="old")]
    actions = done(was, [config(E1, trust="new"), config(W1, trust="new")], "broker", moves=True)
    assert [(one.kind, one.after_move) for one in actions] == [
        ("restart", False), ("restart", False), ("stop", False),
    ]  # fmt: skip


# ---- changes, where hosts are away

AWAY = {"b": "b does not answer within 10 s"}
HERE, THERE = unit("worker-1", "worker", "a"), unit("worker-2", "worker", "b")


def with_b_away(was: Iterable[Observed], becomes: Iterable[Unit], *, moves: bool = False) -> list[Action]:
    """What is done while `b` is away; units that are kept are left out."""
    wanted = [*map(config, becomes)]
    return [one for one in changes(wanted, was, "embedded", moves=moves, away=AWAY) if one.kind != "keep"]


def down(unit: Unit) -> Observed:
    """As one is that was left on a host that is away."""
    return Observed(name=unit.name, role=unit.role, host=unit.host, reason=AWAY["b"])


def test_whatever_is_to_be_done_on_a_host_that_is_away_waits_and_the_rest_is_done() -> None:
    for was in ((), (down(THERE),), (seen(HERE), down(THERE))):
        acts = with_b_away(was, [HERE, THERE])
        assert said(acts)[-1] == "wait worker-2: b does not answer within 10 s"
        assert said(acts)[:-1] == ([] if len(was) == 2 else ["start worker-1: "])
        assert not acts[-1].touches


def test_a_unit_that_is_to_leave_a_host_that_is_away_waits_for_it_as_it_may_still_run_there() -> None:
    moved = unit("worker-2", "worker", "a")
    assert said(with_b_away([seen(HERE), down(THERE)], [HERE, moved])) == [f"wait worker-2: {AWAY['b']}"]


def test_so_does_one_that_is_to_go_there_and_runs_on_meanwhile() -> None:
    moved = unit("worker-1", "worker", "b")
    assert said(with_b_away([seen(HERE)], [moved])) == [f"wait worker-1: {AWAY['b']}"]


def test_a_unit_that_is_wanted_no_more_waits_for_the_host_that_it_is_on() -> None:
    assert said(with_b_away([seen(HERE), down(THERE)], [HERE])) == [f"wait worker-2: {AWAY['b']}"]
    assert said(with_b_away([seen(HERE)], [])) == ["stop worker-1: "]


def test_a_unit_that_waits_waits_in_no_step_and_for_no_move() -> None:
    executor = unit("executor-1", "executor", "b")
    (act,) = with_b_away([down(executor)], [], moves=True)
    assert (act.kind, act.after_move) == ("wait", False)


# ---- In which steps


def order(actions: Iterable[Action], share: float = 0.2) -> list[list[str]]:
    return [[one.unit.name for one in step if one.unit is not None] for step in steps([*actions], share)]


def restart(name: str, role: RoleName, host: str) -> Action:
    return Action(kind="restart", unit=Unit(name=name, role=role, host=host))


def test_what_runs_is_started_again_role_by_role_and_first_on_one_host() -> None:
    hosts = [f"h{number}" for number in range(11)]
    workers = [restart(f"w-{host}-{n}", "worker", host) for host in hosts for n in "ab"]
    planes = [restart("c-1", "control-plane", "h0"), restart("c-2", "control-plane", "h1")]
    new = Action(kind="start", unit=Unit(name="w-new", role="worker", host="h0"))
    found = order([*planes, restart("e-1", "executor", "h0"), *workers, new])
    assert found[:4] == [["w-new"], ["c-1"], ["c-2"], ["e-1"]]
    assert found[4] == ["w-h0-a", "w-h0-b"]
    assert [len(step) for step in found[5:]] == [6, 6, 6, 2]
    assert [*itertools.chain(*found[4:])] == [one.unit.name for one in workers if one.unit is not None]
    assert order(workers, 1.0) == [["w-h0-a", "w-h0-b"], [*itertools.chain(*found[5:])]]


def test_a_new_cluster_is_one_step_and_so_is_one_whose_broker_is_started_again() -> None:
    units = planned("cluster: d\nworkers: {count: 3}\n").units
    assert len(order(done([], map(config, units)))) == 1
    actions = [restart("b", "broker", "a"), restart("w-1", "worker", "a"), restart("w-2", "worker", "b")]
    assert order(actions) == [["b", "w-1", "w-2"]]
    assert order([]) == [[]]
