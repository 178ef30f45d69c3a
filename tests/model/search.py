"""Breadth-first search through everything that may happen: each world is found by the shortest way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.model.model import Model
from tests.model.promises import STRANDED, broken
from tests.model.world import World


@dataclass
class Found:
    """Worlds that may come to be, and the first of each that breaks a promise, with what led there."""

    worlds: int
    complete: bool
    faults: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{self.worlds} worlds" + ("" if self.complete else ", not all")]
        for fault, trace in self.faults.items():
            told += [f"{fault}:", *(f"    {what}" for what in trace)]
        return "\n".join(told)


@dataclass
class _Graph:
    worlds: list[World]
    came_by: list[tuple[int, str]]  # for each world, from which and by what
    led_here: list[list[int]]  # for each world, from which it follows without a fault

    def trace(self, at: int) -> list[str]:
        steps = []
        while at:
            at, what = self.came_by[at]
            steps.append(what)
        return steps[::-1]

    def stranded(self) -> Iterator[int]:
        """Worlds from which no end can be reached unless something breaks."""
        reaching = [at for at, world in enumerate(self.worlds) if world.ended]
        reached = set(reaching)
        while reaching:
            for before in self.led_here[reaching.pop()]:
                if before not in reached:
                    reached.add(before)
                    reaching.append(before)
        return (at for at in range(len(self.worlds)) if at not in reached)


def explore(
    model: Model,
    *,
    until: str = "",
    worlds_max: int,
    promises: Callable[[Model, World], Iterator[str]] = broken,
) -> Found:
    """All worlds, or those before the first that breaks the promise `until`, at most `worlds_max`."""
    start = model.start()
    graph = _Graph([start], [(0, "")], [[]])
    number = {start: 0}
    faults: dict[str, list[str]] = {}
    for at, world in enumerate(graph.worlds):  # which grows meanwhile
        for fault in promises(model, world):
            if fault not in faults:
                faults[fault] = graph.trace(at)
        if until in faults or len(graph.worlds) > worlds_max:
            return Found(len(graph.worlds), False, faults)
        for move in model.moves(world):
            following = model.settle(move.world)
            if following not in number:
                number[following] = len(graph.worlds)
                graph.worlds.append(following)
                graph.came_by.append((at, move.what))
                graph.led_here.append([])
            if not move.fault:
                graph.led_here[number[following]].append(at)
    for at in graph.stranded():
        faults[STRANDED] = graph.trace(at)
        break
    return Found(len(graph.worlds), True, faults)
