"""How a cluster and its changes are shown: units and hosts as tables, a plan as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mvmci.cli.options import make_table
from mvmci.system.text import one_line

if TYPE_CHECKING:
    from mvmci.cluster.changes import Action, HostRow
    from mvmci.deploy.plan import Plan
    from mvmci.deploy.status import UnitRow

BUILD_SHOWN_CHARS = 7
HOST_TITLES = ("HOST", "ADDRESS", "CLOCK", "PYTHON", "SYSTEM", "DIRECTORY", "AWAY")
MARKS = {"start": "+", "restart": "~", "stop": "-", "wait": "?"}


class View:
    """Shows units while they change: a table on a terminal, else a line for each change."""

    def __init__(self, *, live: bool, err: bool) -> None:
        self._live: Any = None
        self._err = err
        self._states: dict[str, str] = {}
        self._pids: dict[str, int] = {}  # of those that are here, the last that was seen
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False, markup=False), auto_refresh=False)

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays. Hosts have their part in what it says."""
        text = one_line(text)
        if self._live is not None:
            self._live.console.print(text)
        else:
            click.echo(text, err=self._err)

    def show(self, units: Sequence[UnitRow]) -> None:
        """How they are now."""
        if self._live is not None:
            self._live.update(unit_table(units), refresh=True)
            return
        for row in units:
            if row.pid is not None and self._pids.setdefault(row.name, row.pid) != row.pid:
                self._pids[row.name] = row.pid
                self.say(f"{row.name} was started again")
            if self._states.get(row.name) != row.state:
                self._states[row.name] = row.state
                why = f": {row.reason}" if row.reason else ""
                self.say(f"{row.name} is {row.state}{why}")
        for name in self._states.keys() - {row.name for row in units}:
            del self._states[name]
            self.say(f"{name} is gone")


def unit_table(units: Sequence[UnitRow]) -> Any:
    """A line for each unit, without columns in which nothing would stand."""
    rows = [_cells(row) for row in units]
    empty = {title for title in ("LABELS", "ADDRESS") if not any(cells[title] for cells in rows)}
    titles = [title for title in rows[0] if title not in empty] if rows else ["NAME"]
    return make_table(titles, ([cells[title] for title in titles] for cells in rows))


def host_table(hosts: Sequence[HostRow]) -> Any:
    """A line for each host that `up` reaches over ssh."""
    return make_table(HOST_TITLES, map(_host_cells, hosts))


def _host_cells(row: HostRow) -> list[str]:
    skew = f"{row.skew_s:+.2f} s (± {row.skew_error_s:.2f})" if row.skew_s is not None else ""
    return [
        row.name,
        row.address,
        skew,
        row.python or "",
        row.system or "",
        row.directory or "",
        row.away or "",
    ]


def _cells(row: UnitRow) -> dict[str, str]:
    """What a table shows of a unit, by its column."""
    return {
        "NAME": row.name,
        "ROLE": row.role,
        "HOST": row.host,
        "STATE": row.state,
        "PID": str(row.pid or ""),
        "BUSY": f"{row.busy}/{row.slots}" if row.slots else "",
        "QUEUES": ",".join(row.queues),
        "LABELS": ",".join(f"{key}={value}" for key, value in sorted(row.labels.items())),
        "ISOLATION": row.isolation or "",
        "VERSION": "+".join(filter(None, (row.version, (row.build or "")[:BUILD_SHOWN_CHARS]))),
        "ADDRESS": row.address or "",
        "REASON": row.reason or "",
    }


def plan_lines(plan: Plan) -> list[str]:
    """What will be done, as people read it. What runs now has the names that hosts tell."""
    return [one_line(_line(action)) for action in plan.changes]


def _line(action: Action) -> str:
    unit = action.unit
    if unit is None:
        return f"* {action.why}"
    at = f", at {unit.listen}" if unit.listen and action.kind != "stop" else ""
    what = f"{MARKS[action.kind]} {action.kind} {unit.name} on {unit.host}{at}"
    return f"{what}: {action.why}" if action.why else what
