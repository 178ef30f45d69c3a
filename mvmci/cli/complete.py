"""What tab completion offers for a value: ids of jobs, units, queues, clusters, files and `@files`.

A shell waits for it while somebody types: whoever is asked has a second, and what goes wrong is not said.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvmci.trust.known import LOCAL_FOLDER, find_cluster, known_clusters

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mvmci.deploy.state import ClusterState
    from mvmci.stores.nats import Cluster

ANSWER_S = 1.0
JOBS_MAX = 100
Offers = Callable[[click.Context, click.Parameter, str], list[str]]


def _offers(find: Callable[[click.Context, str], Iterable[str]]) -> Offers:
    """What `find` finds that begins as what was typed, and nothing where it fails."""

    def offers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        try:
            return [one for one in dict.fromkeys(find(ctx, incomplete)) if one.startswith(incomplete)]
        except Exception:  # whatever it is: nobody asked for a sentence
            return []

    return offers


def _state(ctx: click.Context) -> Path:
    """The state directory that the verb would use; one that is not there for a verb that uses none."""
    option = next((one for one in ctx.command.params if one.name == "state"), None)
    return Path(ctx.params.get("state") or (option.get_default(ctx) if option else None) or os.devnull)


def _cluster_state(ctx: click.Context) -> ClusterState:
    from mvmci.deploy.state import ClusterState

    return ClusterState(_state(ctx), find_cluster(_state(ctx), ctx.params.get("cluster")))


def _ask(ctx: click.Context, ask: Callable[[Cluster, list[str]], Awaitable[None]]) -> list[str]:
    """What `ask` puts into a list, as far as it comes in time."""
    found: list[str] = []

    import asyncio  # nothing else here needs it

    async def asked() -> None:
        from mvmci.trust.client import open_client

        async with asyncio.timeout(ANSWER_S), open_client(_cluster_state(ctx).folder) as cluster:
            await ask(cluster, found)

    with suppress(Exception):  # what came before is good
        asyncio.run(asked())
    return found


def _jobs(ctx: click.Context, incomplete: str) -> Iterable[str]:
    async def newest(cluster: Cluster, found: list[str]) -> None:
        async with aclosing(cluster.store.journals.newest()) as jobs:
            async for job, _ in jobs:
                if job.startswith(incomplete):
                    found.append(job)
                if len(found) == JOBS_MAX:
                    return

    folder = _state(ctx) / LOCAL_FOLDER / "jobs"
    local = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return local if ctx.params.get("local") else [*_ask(ctx, newest), *local]


def _units(ctx: click.Context, incomplete: str) -> Iterable[str]:
    async def members(cluster: Cluster, found: list[str]) -> None:
        found += sorted(member.unit for member in await cluster.store.presence.members())

    planned = [unit.name for unit in _cluster_state(ctx).applied_deployment().units]
    return [*planned, *_ask(ctx, members)]


def _logging_units(ctx: click.Context, incomplete: str) -> Iterable[str]:
    from mvmci.runtimes.local.runtime import SUPERVISOR

    return [*(unit.name for unit in _cluster_state(ctx).applied_deployment().units), SUPERVISOR]


def _queues(ctx: click.Context, incomplete: str) -> Iterable[str]:
    async def named(cluster: Cluster, found: list[str]) -> None:
        settings = await cluster.config.settings()
        found += settings.queues if settings is not None else ()

    return _ask(ctx, named)


def _at_files(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """Files as `@FILE` names them: in the folder that was typed, and the tickets that `up` wrote."""
    if incomplete[:1] not in ("", "@"):
        return
    typed = incomplete[1:]
    folder = Path(os.path.dirname(typed) or ".").expanduser()
    head = typed[: len(typed) - len(os.path.basename(typed))]
    if not typed:
        for cluster in known_clusters(_state(ctx)):
            if (ticket := _state(ctx) / cluster / "ticket").exists():
                yield f"@{ticket}"
    for path in sorted(folder.iterdir()):
        if os.path.basename(typed) or not path.name.startswith("."):
            yield f"@{head}{path.name}{'/' if path.is_dir() else ''}"


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, which the shell finds by itself."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


complete_id = _offers(_jobs)
complete_unit = _offers(_units)
complete_logging_unit = _offers(_logging_units)
complete_queue = _offers(_queues)
complete_cluster = _offers(lambda ctx, incomplete: known_clusters(_state(ctx)))
complete_at_file = _offers(_at_files)


@_offers
def complete_access(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """The accesses that are installed."""
    from mvmci.deploy.access import accesses

    return accesses()


@_offers
def complete_profile(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """What jobs of a bench do."""
    from mvmci.bench.profiles import PROFILES

    return PROFILES
