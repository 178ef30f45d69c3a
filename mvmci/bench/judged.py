"""What the curve of each access shows beside the control's: whose its knee is, or why nobody can tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from mvmci.bench import figures
from mvmci.bench.bottleneck import Finding, named
from mvmci.bench.curves import control_of, is_own, versus
from mvmci.bench.knee import SHARE, is_before
from mvmci.bench.report import CONTROL, Candidate, Curve, Report

SHOWS_EXECUTOR = "waiting"  # the profile that shows it best on a small machine
MARKED_MOST = 0.5  # of the windows that count: of a run with more that are marked nothing is concluded
FAILED_MOST = 0.01  # of the jobs of a curve: of one with more nothing is concluded


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the study's rule says from so many workers for one executor on; {} are the candidates' names."""

    least: int
    range: str
    says: str
    stays: bool = False


RULE = (
    Choice(least=20, range="20 or more", says="{} may stay, within limits", stays=True),
    Choice(least=5, range="5 to 20", says="`per-worker` for production"),
    Choice(
        least=0,
        range="under 5",
        says="`per-worker` now, and `pool` where the engine is the dear part",
    ),
)

Kind = Literal["failing", "own", "unbent", "together", "elsewhere", "undecided", "unclear", "alone"]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What the curve of one candidate shows beside the control's.

    failing     too many jobs failed, of it or of the control
    own         it bends first, and what bounds it is its own
    unbent      as far as is known it does not bend
    together    both bend, and it does about as much as the control where that bends
    elsewhere   it bends first, and what bounds it is not its own
    undecided   it bends, and it is not known whether before the control
    unclear     it bends first, and what bounds it was withdrawn
    alone       there is no control
    """

    kind: Kind
    candidate: Candidate
    curve: Curve
    control: Curve | None
    workers: int  # where it was looked at
    found: Finding
    beside: Finding  # of the control

    @property
    def name(self) -> str:
        """Of the candidate, in a sentence."""
        return f"`{self.candidate.name}`"

    @property
    def is_machine(self) -> bool:
        """Whether something is known to bound it that is no executor's."""
        return self.found.cause not in ("nothing", "unclear") and self.found.whose != "executor"

    @property
    def at(self) -> float | None:
        """How many workers one executor carries; None where it is not known to bend."""
        at = self.curve.knee.at
        return None if at is None else at / max(1, self.candidate.executors)

    @property
    def low(self) -> float:
        """And at least."""
        return self.curve.knee.low / max(1, self.candidate.executors)

    @property
    def high(self) -> float:
        """And at most, where it is known."""
        high = self.curve.knee.high if self.kind == "own" else None
        return math.inf if high is None else high / max(1, self.candidate.executors)

    @property
    def told(self) -> bool:
        """Whether the rule has something to say of it. What kept up with many did so, whatever ended then."""
        kept_up = self.kind != "failing" and choice(self.low).stays
        return self.kind in ("own", "unbent") or kept_up


def choice(workers: float) -> Choice:
    """What the rule says of an executor that carries so many."""
    return next(one for one in RULE if workers >= one.least)


def judge(report: Report) -> list[list[Judged]]:
    """All candidates but the control, for each profile that has knees; that which shows most comes first."""
    profiles = report.profiles.keys() - {*report.without_knee}
    in_order = sorted(profiles, key=lambda one: (one != SHOWS_EXECUTOR, one))
    return list(filter(None, (list(_judge(report, profile)) for profile in in_order)))


def _judge(report: Report, profile: str) -> Iterator[Judged]:
    for candidate in report.candidates:
        curve = figures.first_of(report.curves, candidate.name, profile)
        if curve is None or candidate.access == CONTROL:
            continue
        control = control_of(curve, report.curves, report.candidates)
        seen = figures.at_knee(report, candidate.name, profile)
        beside = figures.at_knee(report, control.candidate, profile) if control else None
        found = named(seen.findings if seen else [])
        yield Judged(
            kind=_kind(report, curve, control, found),
            candidate=candidate,
            curve=curve,
            control=control,
            workers=seen.workers if seen else 0,
            found=found,
            beside=named(beside.findings if beside else []),
        )


def is_doubtful(report: Report) -> bool:
    """Whether something speaks against most of what was measured."""
    counted = [one for one in report.windows if one.counts]
    return sum(bool(one.marks) for one in counted) > MARKED_MOST * len(counted)


def _kind(report: Report, curve: Curve, control: Curve | None, found: Finding) -> Kind:
    if any(is_failing(report, one) for one in (curve, control) if one is not None):
        return "failing"
    if curve.knee.at is None:
        return "unbent"
    if control is None:
        return "alone"
    if is_before(curve.knee, control.knee):
        if is_own(curve, control, figures.of(report.diagnoses, curve.candidate, curve.profile)):
            return "own"
        return "unclear" if found.cause == "unclear" else "elsewhere"
    if control.knee.at is not None and control.knee.high is not None:
        ratio = versus(curve, control, control.knee.at)
        if ratio is not None and ratio.at >= SHARE:
            return "together"
    return "undecided"


def is_failing(report: Report, curve: Curve) -> bool:
    """Whether too many jobs of it failed."""
    windows = figures.of(report.windows, curve.candidate, curve.profile)
    return sum(one.failed for one in windows) > FAILED_MOST * sum(one.ended for one in windows)
