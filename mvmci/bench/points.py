"""Which window is run next.

First every number of workers once, in random order; then what is to be repeated; then wherever a knee is
known least, until the time is up. A profile that shows no knee, but what the way to an engine costs, has a
few rounds. Windows are short and all candidates take turns, so that a machine which drifts does so for all
alike. What speaks against a window is a reason to run it again, but not for ever: of a machine that is
never quiet, the report says so.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mvmci.bench.knee import Curve, find_knee, next_workers

REPEATS_MAX = 2  # of one window, for its marks
REPEATED_MAX = 0.25  # of all windows
ROUNDS = 3  # of each number of workers, of a profile without a knee
BENT = 0.5  # of linear: no more workers than there it is are worth a window


class Point(NamedTuple):
    """A candidate under a profile with so many workers."""

    candidate: str
    profile: str
    workers: int


class Points:
    """The points of one run, in the order in which they are to be measured."""

    def __init__(
        self,
        candidates: Sequence[str],
        levels: Mapping[str, Sequence[int]],
        *,
        without_knee: Collection[str] = (),
        seed: int = 1,
    ) -> None:
        """`levels` are the numbers of workers for each profile."""
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._levels = levels
        self._keys = [(candidate, profile) for candidate in candidates for profile in levels]
        self._rates: dict[tuple[str, str], dict[int, list[float]]] = {key: {} for key in self._keys}
        self._first = self._rounds(without_knee) + self._once()  # taken from the end
        self._knees = [key for key in self._keys if key[1] not in without_knee] or self._keys
        self._again: list[tuple[Point, int]] = []  # and how often it was repeated
        self._tries = 0  # of the point that was given last
        self._windows = self._repeated = 0
        self._measured: set[tuple[str, str]] = set()

    def _once(self) -> list[Point]:
        """Each, in random order, so that a drift of the machine is not taken for a bend; but the least number
        of workers of each curve first, as all others are compared with it."""
        points = [Point(*key, workers) for key in self._keys for workers in self._levels[key[1]]]
        self._random.shuffle(points)
        return sorted(points, key=lambda point: point.workers == min(self._levels[point.profile]))

    def _rounds(self, profiles: Collection[str]) -> list[Point]:
        """More of those that are not repeated later."""
        keys = [key for key in self._keys if key[1] in profiles]
        points = [Point(*key, workers) for key in keys for workers in self._levels[key[1]]]
        points *= ROUNDS - 1
        self._random.shuffle(points)
        return points

    def next(self) -> Point:
        """The one to measure now; `add` says what came of it."""
        self._tries = 0
        while self._first:
            point = self._first.pop()
            if not self._is_beyond(point):
                return point
        if self._again:
            point, self._tries = self._again.pop(self._random.randrange(len(self._again)))
            return point
        return self._widest()

    def add(self, point: Point, rate: float, *, marked: bool) -> bool:
        """Take in the rate of a window; whether it counts. One that is `marked` comes again, if it may."""
        self._windows += 1
        self._measured.add(point[:2])
        if marked and self._tries < REPEATS_MAX and self._repeated < REPEATED_MAX * max(20, self._windows):
            self._again.append((point, self._tries + 1))
            self._repeated += 1
            return False
        self._rates[point[:2]].setdefault(point.workers, []).append(rate)
        return True

    def curve(self, candidate: str, profile: str) -> Curve:
        """The rates so far, by workers."""
        return dict(sorted(self._rates[candidate, profile].items()))

    @property
    def missing(self) -> bool:
        """Whether there is a candidate under a profile that was not measured at all."""
        return not self._measured.issuperset(self._keys)

    @property
    def is_first_pass(self) -> bool:
        """Whether a number of workers is still to come that no window had."""
        return any(
            point.workers not in self._rates[point[:2]] and not self._is_beyond(point)
            for point in self._first
        )

    @property
    def left(self) -> int:
        """How many windows are still to come before the widest intervals have their turn."""
        return sum(not self._is_beyond(point) for point in self._first) + len(self._again)

    def _is_beyond(self, point: Point) -> bool:
        """Whether fewer workers were already far from linear."""
        rates = self._rates[point[:2]]
        if not rates:
            return False
        least, most = min(rates), max(rates)
        return point.workers > most and rates[most][0] * least < BENT * rates[least][0] * most

    def _widest(self) -> Point:
        """Where the knee's interval is widest, what narrows it."""
        wants = []
        for key in self._knees:
            if len(curve := self.curve(*key)) > 1 and any(curve[min(curve)]):
                levels = self._levels[key[1]]
                knee = find_knee(curve)
                wants.append(
                    (knee.width, self._random.random(), Point(*key, next_workers(curve, max(levels))))
                )
        if not wants:  # one number of workers alone has no knee
            key = self._random.choice(self._knees)
            return Point(*key, self._levels[key[1]][0])
        return max(wants)[2]
