"""The verb that asks all units of a cluster how they fare: for people, for scripts, and for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from mvmci.cli.complete import complete_unit
from mvmci.cli.options import (
    Duration,
    cluster_option,
    examples,
    json_option,
    make_table,
    option,
    print_table,
    run_async,
    state_option,
)
from mvmci.cli.units import listen_at, read_token, token_option
from mvmci.cluster.metrics import (
    SCRAPE_S,
    BrokerMetrics,
    Histogram,
    MachineRates,
    Rates,
    UnitMetrics,
    both,
    broker_cores,
    machine_rates,
    rates,
)
from mvmci.config.quantity import rough_duration, rough_size
from mvmci.system.text import one_line
from mvmci.trust.known import find_cluster

if TYPE_CHECKING:
    from mvmci.deploy.measure import Measured
    from mvmci.deploy.state import ClusterState

PORT = 27289
COLUMNS = {
    "SLOTS": "slots taken, on average, of those it has",
    "JOBS/S": "runs that came out, a second",
    "REFUSED/S": "orders that found no free slot, a second: executors lack slots",
    "RAN": "share of the time in which its loop was at work",
    "WAITED": "and in which it wanted a processor; with RAN near 100 %: full",
    "LATE": "how late its loop came, 99 of 100 times at most",
    "CORES": "processors in use, with its guests",
    "MEMORY": "in use, with its guests",
    "TRIP": "to the broker and back, median",
    "ORDER": "an order to an executor and back, median",
    "WRITE": "a write to a journal, until it is on disk, median",
    "NOTE": "held back by a limit; killed for memory",
}
MACHINE_COLUMNS = {
    "PROCESSORS": "that the machine has",
    "BUSY": "of these, in use",
    "OURS": "of these, by units and the broker",
    "OTHERS": "and by all other programs",
    "FREE": "memory",
    "STALLED": "share of the time in which something waited: cpu, io or memory",
}
TITLES = ("UNIT", "ROLE", "HOST", *COLUMNS)
MACHINE_TITLES = ("MACHINE", *MACHINE_COLUMNS)
LEGEND = [f"  {title:<12}{says}" for title, says in {**COLUMNS, **MACHINE_COLUMNS}.items()]
NOTED = 0.01  # of the time


@click.command(
    "metrics",
    epilog="\n".join(("\b", "Columns:", *LEGEND, "", ""))
    + examples(
        "mvmci metrics                            what each unit does, over two seconds",
        "mvmci metrics executor-1 --over 10s",
        "mvmci metrics --json | jq '.units[] | {unit, ran: .rates.loop_ran}'",
        "mvmci metrics --prometheus > units.prom  once",
        "mvmci metrics --listen 127.0.0.1         at http://127.0.0.1:27289/metrics, until Ctrl-C",
    ),
)
@click.argument("units", metavar="[UNIT]...", nargs=-1, shell_complete=complete_unit)
@option("--over", type=Duration(), default="2s", show_default=True, help="Look for so long.")
@json_option
@option("--prometheus", is_flag=True, help="Print the counters as Prometheus reads them.")
@option(
    "--listen",
    metavar="HOST[:PORT]",
    envvar="MVMCI_METRICS_LISTEN",
    help=f"Let Prometheus ask there. The port is {PORT}, if absent.",
)
@token_option
@cluster_option
@state_option
@click.pass_context
def metrics_verb(
    ctx: click.Context,
    /,
    units: tuple[str, ...],
    over: int,
    as_json: bool,
    prometheus: bool,
    listen: str | None,
    token_file: Path | None,
    cluster: str | None,
    state: Path,
) -> int:
    """How units fare: slots, jobs, their loops, memory, ways to the broker and to executors, writes."""
    from mvmci.deploy.state import ClusterState

    if as_json + prometheus + (listen is not None) > 1:
        raise click.UsageError("--json, --prometheus and --listen exclude each other", ctx)
    found = ClusterState(state, find_cluster(state, cluster))
    if listen is not None:
        token = read_token(token_file)
        return run_async(_serve(found, units, listen_at(listen, token, PORT), token))
    if prometheus:
        click.echo(run_async(_text(found, units)), nl=False)
        return 0
    before, now = run_async(_look(found, units, over / 1000))
    shares = {one.unit: rates(was, one) for was, one in both(before.units, now.units)}
    cores = broker_cores(before.broker, now.broker)
    machines = machine_rates(before.units, now.units, {now.broker_boot: cores})
    if as_json:
        told = {"cluster": found.cluster, "seconds": over / 1000}
        named = [_named(one) | {"rates": shares.get(one.unit)} for one in _sorted(now)]
        told |= {"units": named, "machines": machines, "broker": now.broker, "silent": now.silent}
        click.echo(msgspec.json.encode(told))
        return 0
    print_table(make_table(TITLES, [_cells(one, shares.get(one.unit)) for one in _sorted(now)]))
    if machines:
        click.echo()
        print_table(make_table(MACHINE_TITLES, map(_machine_cells, machines)))
    if now.broker is not None and before.broker is not None:
        click.echo(f"\nbroker: {_broker_line(before.broker, now.broker, cores)}")
    for name in now.silent:
        click.echo(f"{one_line(name)} told nothing: it is stuck, has just ended, or is older", err=True)
    return 0


async def _look(state: ClusterState, names: Sequence[str], over_s: float) -> tuple[Measured, Measured]:
    from mvmci.deploy.measure import measuring

    async with state, measuring(state, names) as measures:
        before = await measures.measure(watch_s=over_s + 1)
        await asyncio.sleep(over_s)
        return before, await measures.measure()


async def _text(state: ClusterState, names: Sequence[str]) -> bytes:
    """All counters, for Prometheus. Each time by a new credential: one lasts for an hour."""
    from mvmci.api.metrics import text_of
    from mvmci.deploy.measure import measuring

    async with state, measuring(state, names) as measures:
        told = await measures.measure(watch_s=SCRAPE_S)
    return text_of(_sorted(told), told.broker)


async def _serve(state: ClusterState, names: Sequence[str], at: tuple[str, int], token: str) -> int:
    from mvmci.api.app import serve_metrics

    async with serve_metrics(lambda: _text(state, names), *at, token) as bound:
        click.echo(f"metrics of {state.cluster} at http://{at[0]}:{bound}/metrics", err=True)
        await asyncio.Event().wait()
    return 0


def _sorted(told: Measured) -> list[UnitMetrics]:
    return sorted(told.units.values(), key=lambda one: (one.role, len(one.unit), one.unit))


def _named(one: UnitMetrics) -> dict[str, Any]:
    """As JSON for scripts: what goes over the broker as a row has names."""
    fields = msgspec.structs.asdict(one)
    return fields | {
        name: msgspec.structs.asdict(value) for name, value in fields.items() if isinstance(value, Histogram)
    }


def _cells(one: UnitMetrics, did: Rates | None) -> Sequence[str]:
    """A row of the table; one that was started again meanwhile has no shares."""
    about, memory = (one.unit, one.role, one.host), rough_size(one.process.memory_bytes)
    if did is None:
        return (*about, *[""] * 7, memory, *[""] * 3, "started again")
    notes = (
        f"held back {_share(did.throttled)}" if did.throttled >= NOTED else "",
        f"{did.killed} killed for memory" if did.killed else "",
    )
    return (
        *about,
        f"{did.slots_taken:.1f}/{one.slots}" if one.slots else "",
        f"{did.jobs:.1f}" if one.slots else "",
        f"{did.refused:.1f}" if did.refused else "",
        _share(did.loop_ran),
        _share(did.loop_waited),
        rough_duration(did.late_p99_us),
        f"{did.cores:.2f}",
        memory,
        *(rough_duration(us) if us else "" for us in (did.round_trip_us, did.order_us, did.write_us)),
        ", ".join(filter(None, notes)),
    )


def _machine_cells(one: MachineRates) -> Sequence[str]:
    stalled = (
        f"{what.removesuffix('.some')} {_share(share)}"
        for what, share in one.stalled.items()
        if what.endswith(".some") and share >= NOTED
    )
    cores = (f"{used:.2f}" for used in (one.busy, one.ours, one.others))
    free = rough_size(one.free_bytes)
    return (", ".join(one.hosts), str(one.processors), *cores, free, ", ".join(stalled))


def _broker_line(before: BrokerMetrics, now: BrokerMetrics, cores: float) -> str:
    seconds = max(1, now.at_us - before.at_us) / 1_000_000
    came, went = now.messages_in - before.messages_in, now.messages_out - before.messages_out
    pending = sum(one.pending_bytes for one in now.connections)
    parts = (
        f"{cores:.2f} cores",
        rough_size(now.memory_bytes),
        f"{now.connected} connections",
        f"{came / seconds:.0f} messages/s in and {went / seconds:.0f} out",
        f"stores {rough_size(now.stored_bytes)} of {rough_size(now.stored_bytes_max)}",
        f"{rough_size(pending)} on their way" if pending else "",
        f"{now.slow - before.slow} too slow and cut" if now.slow > before.slow else "",
    )
    return ", ".join(filter(None, parts))


def _share(share: float) -> str:
    return f"{share * 100:.0f} %"
