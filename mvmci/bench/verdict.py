"""The answer: which access to use, and what that rests on; or why these machines cannot say.

A knee alone says nothing of an access, since what bends may be the machine. So a verdict is a function of the
knee of the access, that of the control, where nothing is shared, and of what bounds the access: it is given
only if that is the access's own, or if the executor kept up with so many that nothing else matters. Then the
study's rule speaks, which is data here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from mvmci.bench import figures
from mvmci.bench.bottleneck import FIXED, Finding, named, raising
from mvmci.bench.capacity import FULL, carried, pays_from_s
from mvmci.bench.curves import control_of, is_own
from mvmci.bench.figures import in_workers, number
from mvmci.bench.knee import is_before
from mvmci.bench.report import CONTROL, Candidate, Curve, Diagnosis, Report, Sentence, Verdict


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the study's rule says from so many workers for one executor on."""

    least: int
    range: str
    says: str
    stays: bool = False


RULE = (
    Choice(least=20, range="20 or more", says="`{}` may stay, within its limits", stays=True),
    Choice(least=5, range="5 to 20", says="`per-worker` for production"),
    Choice(
        least=0,
        range="under 5",
        says="`per-worker` now, and `pool` where the engine is the dear part",
    ),
)
MANY = 1_000  # workers, from which on it says another thing
DETOUR = "light"  # the profile that shows what the way to an engine costs, and no knee
SHOWS_EXECUTOR = "waiting"  # the one that shows it best on a small machine
PROCESSORS_LEAST = 4  # of a machine that is to show an executor by itself
BOUNDS = {  # a cause in a sentence; {} is whose it is
    "generator": "the program that makes the load",
    "memory": "memory",
    "others": "what other programs left of this machine",
    "quota": "a limit on the processor time of the {}",
    "stopped": "the {}, which somebody stops",
    "network": "the network",
    "way": "the way of orders to the executor",
    "sync": "the disk of the {}",
    "slots": "the slots of the {}",
    "processors": "this machine's processors",
    "loop": "the loop of the {}, which does one thing at a time",
}

SHOWN_BY = {  # what it takes to see an executor by itself, where it is not a machine for it
    "generator": "load from a machine of its own",
    "memory": "more memory",
    "others": "a machine on which nothing else runs",
    "quota": "the same without that limit",
    "stopped": "the same without who stops it",
    "network": "a nearer broker",
    "sync": "a faster disk for the broker",
    "slots": "more slots",
}

Kind = Literal["own", "unbent", "together", "elsewhere", "unclear", "alone"]
NO_VERDICT = ("together", "elsewhere", "unclear", "alone")  # the first of those that were seen says why


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What the curve of one candidate shows beside the control's.

    own         it bends first, and what bounds it is its own
    unbent      it is not known to bend at all
    together    it cannot be told from the control
    elsewhere   it bends first, and what bounds it is not its own
    unclear     the same, and what it looked like was withdrawn
    alone       there is no control
    """

    kind: Kind
    candidate: Candidate
    curve: Curve
    control: Curve | None
    seen: Diagnosis | None
    found: Finding

    @property
    def name(self) -> str:
        """Of the candidate, in a sentence."""
        return f"`{self.candidate.name}`"

    @property
    def low(self) -> float:
        """How many workers one executor carries at least."""
        return self.curve.knee.low / max(1, self.candidate.executors)

    @property
    def high(self) -> float:
        """And at most, where it is known."""
        high = self.curve.knee.high if self.kind == "own" else None
        return math.inf if high is None else high / max(1, self.candidate.executors)

    @property
    def told(self) -> bool:
        """Whether the rule has something to say of it. What kept up with many did so, whatever ended then."""
        return self.kind in ("own", "unbent") or choice(self.low).stays


def choice(workers: float) -> Choice:
    """What the rule says of an executor that carries so many."""
    return next(one for one in RULE if workers >= one.least)


def decide(report: Report) -> Verdict:
    """The verdict of a report, which has none yet."""
    if report.against:
        return _of_a_running_cluster(report)
    profiles = sorted(report.profiles.keys() - {DETOUR}, key=lambda one: (one != SHOWS_EXECUTOR, one))
    judged = [list(_judge(report, profile)) for profile in profiles]
    telling = next((some for some in judged if any(one.told for one in some)), [])
    everything = [one for some in judged for one in some]
    answer, winner = _answer([one for one in telling if one.told], report)
    sentences = [answer or _no_verdict(everything, report), *_failures(report)]
    for one in everything:
        sentences += [*_curve(one), *_bottleneck(one)]
        if one in telling and one.told:
            sentences.append(_rule(one))
    before, command = _command(report, winner)
    return Verdict(
        access=winner.access if winner else "",
        candidate=winner.name if winner else "",
        sentences=[*sentences, *_detour(report), *_floods(report), *_many(telling or everything), *before],
        unseen=list(_unseen(report, everything)),
        command=command,
    )


def _judge(report: Report, profile: str) -> Iterator[Judged]:
    for candidate in report.candidates:
        curve = figures.first_of(report.curves, candidate.name, profile)
        if curve is None or candidate.access == CONTROL:
            continue
        control = control_of(curve, report.curves, report.candidates)
        seen = figures.at_knee(report, candidate.name, profile)
        found = named(seen.findings if seen else [])
        kind: Kind = "elsewhere"
        if curve.knee.high is None:
            kind = "unbent"
        elif control is None:
            kind = "alone"
        elif not is_before(curve.knee, control.knee):
            kind = "together"
        elif is_own(curve, control, figures.of(report.diagnoses, candidate.name, profile)):
            kind = "own"
        elif found.cause == "unclear":
            kind = "unclear"
        yield Judged(kind=kind, candidate=candidate, curve=curve, control=control, seen=seen, found=found)


def _answer(told: Sequence[Judged], report: Report) -> tuple[Sentence | None, Candidate | None]:
    """In a sentence, and the candidate that it is for; neither where the rule has nothing to say.

    An access of one executor decides, if there is one: of a pool only a part is asked.
    """
    told = [one for one in told if one.candidate.executors == 1] or told
    stays = [one for one in told if choice(one.low).stays]
    rests_on = [_figure("curve", one.curve) for one in stays or told]
    if stays:
        best = max(stays, key=lambda one: one.low)
        carries = f"one executor keeps up with at least {best.low:.0f} workers of {best.curve.slots} slots"
        text = f"{best.name} may stay: {carries}."
        return Sentence(text=text, figures=rests_on), best.candidate
    if told and not any(choice(one.high).stays for one in told):
        carries = _listed(f"{one.curve.knee.at:.0f} ({one.name})" for one in told if one.curve.knee.at)
        text = (
            "Use `per-worker` for production, where each worker has an engine of its own: one executor keeps "
            f"up with only so many workers of {told[0].curve.slots} slots: {carries}."
        )
        control = next((one for one in report.candidates if one.access == CONTROL), None)
        return Sentence(text=text, figures=rests_on), control
    if told:
        text = (
            "No verdict yet: these measurements leave open whether one executor keeps up with enough workers "
            "to stay with it. `per-worker` is right in either case, if that cannot wait."
        )
        return Sentence(text=text, figures=rests_on), None
    return None, None


def _no_verdict(everything: Sequence[Judged], report: Report) -> Sentence:
    rests_on = [_figure("curve", one.curve) for one in everything]
    if all(one.access == CONTROL for one in report.candidates):
        why = "only `per-worker` was measured, which has no executor to share"
    elif not everything:
        why = f"nothing that was run shows what an executor carries, and `--profile {SHOWS_EXECUTOR}` does"
    else:
        one = min(everything, key=lambda one: NO_VERDICT.index(one.kind))
        also = " with `per-worker` as with the others" * (one.kind == "together")
        why = f"what ended first{also} was {_bound(one.found)}"
        if one.kind == "alone":
            why = "`per-worker` was not measured beside it"
        elif one.kind == "unclear":
            why = "what bounds it is unclear"
        elif one.kind == "elsewhere" and one.found.cause == "nothing":
            why = "it bends first, and nothing was seen to be full"
    return Sentence(text=f"No verdict about the access: {why}.", figures=rests_on)


def _curve(one: Judged) -> Iterator[Sentence]:
    """How far it goes, and the control beside it."""
    curve, control, knee = one.curve, one.control, one.curve.knee
    slots, rests_on = f"workers of {curve.slots} slots", [_figure("curve", curve)]
    text = f"{one.name}, `{curve.profile}`: throughput grows with the workers, to within a tenth, up to "
    if knee.at is None:
        jobs = f"{knee.most * curve.slots:,} jobs at once, {number(curve.means[knee.most])} jobs/s"
        text += f"{knee.most} {slots} ({jobs}), the most that were tried: one executor carries at least "
        yield Sentence(text=f"{text}{one.low:.0f}.", figures=rests_on)
        return
    jobs = f"{knee.at * curve.slots:.0f} jobs at once, {number(carried(curve))} jobs/s"
    text += f"{in_workers(knee)} {slots} ({jobs})"
    if one.candidate.executors > 1:
        text += f", {number(knee.at / one.candidate.executors)} for each executor"
    if control is None:
        text += (
            ". Whether the executor ends there or the machine cannot be told without `per-worker` beside it"
        )
    else:
        text += f"; `per-worker`, where nothing is shared, up to {in_workers(control.knee)}"
        rests_on.append(_figure("curve", control))
    if control is not None and one.kind == "together":
        text += ". They bend together, so it is not the executor that ends"
        if common := curve.means.keys() & control.means.keys():
            most = max(common)
            ratio = number(curve.means[most] / control.means[most])
            text += f": with {most} workers it does {ratio} of what `per-worker` does"
    yield Sentence(text=f"{text}.", figures=rests_on)
    top = curve.ceiling
    if top is not None and one.kind != "own":
        text = (
            "The knee of its executor was not reached. Calculated, not measured: a job takes "
            f"{number(top.loop_ms)} ms of the executor's loop with {top.workers} workers, so that is full at "
            f"{number(top.rate)} jobs/s, which {top.workers_at_most:.0f} workers make at the least."
        )
        yield Sentence(text=text, figures=[_figure("curve", curve), _figure("diagnosis", curve)])


def _bottleneck(one: Judged) -> Iterator[Sentence]:
    """What bounds it, whether that was confirmed, and what follows where it is not the access's own."""
    if one.seen is None or one.kind == "unbent":
        return
    found, where = one.found, f"{one.name} with {one.seen.workers} workers"
    if found.cause == "unclear":
        text = f"What bounds {where} is {found.why}."
    elif found.cause == "nothing":
        text = f"Nothing of {where} was seen to be full."
    else:
        why_not = FIXED[found.cause] if raising(found) is None else "it was not raised"
        raised = "Confirmed" if found.stands else "Not confirmed"
        text = f"What bounds {where} is {_bound(found)}: {found.why}. {raised}: {found.tried or why_not}."
    if one.kind in ("elsewhere", "unclear"):
        text += " That says nothing of the access."
    yield Sentence(text=text, figures=[_figure("diagnosis", one.seen)])


def _rule(one: Judged) -> Sentence:
    """What the study's rule says of it; of an interval across a boundary, both, and what would decide."""
    low, high = choice(one.low), choice(one.high)
    text = f"By the study's rule, {low.range} workers for one executor: {low.says.format(one.candidate.name)}"
    if low is not high:
        boundary = high.least * max(1, one.candidate.executors)
        file = shlex.quote(one.candidate.file or one.candidate.name)
        least = min(one.curve.means)
        text += (
            f". Or, {high.range}: {high.says.format(one.candidate.name)}. The interval allows both, and "
            f"{boundary} workers would decide: `mvmci bench {file} --profile {one.curve.profile} --workers "
            f"{least},{boundary}`"
        )
    elif not low.stays:
        text += f". {one.name} may stay where fewer workers are enough"
    return Sentence(text=f"{text}.", figures=[_figure("curve", one.curve)])


def _detour(report: Report) -> Iterator[Sentence]:
    """What the way to an engine costs a job that does almost nothing."""
    for candidate in report.candidates:
        curve = figures.first_of(report.curves, candidate.name, DETOUR)
        control = curve and control_of(curve, report.curves, report.candidates)
        if curve is None or control is None or candidate.access == CONTROL:
            continue
        both = (curve, control)
        workers = min(curve.means)
        if workers not in control.means:
            continue
        rates = [one.means[workers] for one in both]
        text = (
            f"`{candidate.name}`, `{DETOUR}`, jobs that do almost nothing: with {workers} "
            f"worker{'s' * (workers > 1)} it does {number(rates[0] / rates[1])} of what `per-worker` does "
            f"({number(rates[0])} and {number(rates[1])} jobs/s)"
        )
        rests_on = [_figure("curve", one) for one in both]
        alone = [figures.lives(report, one.candidate, DETOUR)[0] for one in both]
        if all(alone):
            times = [number(sum(life.parts.values())) for life in alone if life]
            text += f", and one alone takes {times[0]} ms instead of {times[1]}"
            rests_on += [_figure("life", one) for one in both]
        yield Sentence(text=f"{text}: that is what the way to the engine costs.", figures=rests_on)


def _failures(report: Report) -> Iterator[Sentence]:
    """Jobs that did not succeed, which no figure of speed makes up for."""
    for candidate in report.candidates:
        for profile in report.profiles:
            windows = figures.of(report.windows, candidate.name, profile)
            failed, ended = sum(one.failed for one in windows), sum(one.ended for one in windows)
            rows = figures.of(report.diagnoses, candidate.name, profile)
            memory = [found.why for row in rows for found in row.findings if found.cause == "memory"]
            if failed or memory:
                text = f"`{candidate.name}`, `{profile}`: {failed:,} of {ended:,} jobs failed"
                rests_on = ["windows", *[f"diagnosis/{candidate.name}/{profile}"][: len(memory)]]
                yield Sentence(text=f"{': '.join([text, *memory[:1]])}.", figures=rests_on)
    if report.counted.lost or report.counted.twice:
        text = (
            f"By their journals {report.counted.lost:,} jobs were lost and {report.counted.twice:,} ended "
            "twice. That must not be, whatever the access."
        )
        yield Sentence(text=text, figures=["counted"])


def _floods(report: Report) -> Iterator[Sentence]:
    """What became of many jobs at once."""
    bad = [one for one in report.floods if one.lost or one.twice or one.failed]
    for one in bad:
        text = (
            f"`{one.candidate}`, {one.jobs:,} `{one.profile}` jobs at once: by their journals {one.lost:,} "
            f"were lost, {one.twice:,} ended twice and {one.failed:,} failed."
        )
        yield Sentence(text=text, figures=[_figure("flood", one)])
    if report.floods and not bad:
        loads = _listed(f"{jobs:,}" for jobs in sorted({one.jobs for one in report.floods}))
        where = _listed(dict.fromkeys(f"`{one.candidate}`" for one in report.floods))
        rests_on = list(dict.fromkeys(_figure("flood", one) for one in report.floods))
        text = f"{loads} jobs at once on {where}: by their journals each ended once, and none was lost."
        yield Sentence(text=text, figures=rests_on)


def _many(some: Sequence[Judged]) -> Iterator[Sentence]:
    """What the rule says of very many, and from which length of a job on they have something to do."""
    if not some:
        return
    curves = [curve for one in some for curve in (one.curve, one.control) if curve is not None]
    rate, best = max(
        ((max(one.means.values()), one) for one in curves if one.profile == some[0].curve.profile),
        key=lambda pair: pair[0],
    )
    text = (
        f"On Kubernetes, or with over {MANY:,} workers, consider `pool`. But {MANY:,} workers of "
        f"{best.slots} slots pay only for jobs of at least {number(pays_from_s(MANY, best.slots, rate))} s, "
        f"since more than {number(rate)} jobs/s were not seen here."
    )
    yield Sentence(text=text, figures=[_figure("capacity", best)])


def _command(report: Report, winner: Candidate | None) -> tuple[list[Sentence], str]:
    """What has to be done to a file before, and what makes the move."""
    if winner is None:
        return [], ""
    file = winner.file or next((one.file for one in report.candidates if one.file), "")
    edit = (
        f"In {file} set `access: {winner.access}`, and take `executors` out: no file that was given has it."
    )
    quoted = shlex.quote(file)
    return [Sentence(text=edit)] * (not winner.file), f"mvmci plan {quoted} && mvmci up {quoted}"


def _unseen(report: Report, everything: Sequence[Judged]) -> Iterator[Sentence]:
    """What these machines cannot show, and what would."""
    hidden: dict[str, list[Judged]] = {}
    for one in everything:
        if one.kind in ("together", "elsewhere"):
            hidden.setdefault(SHOWN_BY.get(one.found.cause, ""), []).append(one)
    for shown_by, some in hidden.items():
        twice = 2 * max((one.processors for one in report.machines), default=1)
        wanted = max([PROCESSORS_LEAST, twice, *(_wanted(one, report) for one in some)])
        own = f"executors on a machine of their own, of {wanted} or more processors (`runtime: ssh`)"
        names = _listed(dict.fromkeys(one.name for one in some))
        text = f"How many workers one executor of {names} carries by itself. It takes {shown_by or own}."
        yield Sentence(text=text, figures=[*(_figure("curve", one.curve) for one in some), "machine"])
    for one in everything:
        text = ""
        if one.kind == "alone":
            text = f"Whether {one.name} ends at its executor or at the machine: `per-worker` would show it."
        elif one.kind == "unbent" and not choice(one.low).stays:
            text = f"Where {one.name} bends: more workers, or more windows, would show it."
        if text:
            yield Sentence(text=text, figures=[_figure("curve", one.curve)])
    counted = [one for one in report.windows if one.counts]
    if marked := sum(bool(one.marks) for one in counted):
        text = (
            f"What a quieter machine shows: {marked:,} of {len(counted):,} windows count, though something "
            "speaks against them that stayed when they were run again."
        )
        yield Sentence(text=text, figures=["windows"])
    if len(report.machines) == 1:
        text = (
            "What a network between machines costs, and how `per-worker` and `pool` grow with machines: all "
            "units shared one here. Several would show it (`runtime: ssh`)."
        )
        yield Sentence(text=text, figures=["machine"])


def _wanted(one: Judged, report: Report) -> int:
    """How many processors the executor's ceiling would take, of all units together."""
    demand = figures.first_of(report.demands, one.candidate.name, one.curve.profile)
    if demand is None or one.curve.ceiling is None:
        return 0
    return math.ceil(one.curve.ceiling.rate * demand.cpu_ms / 1e3 / FULL)


def _of_a_running_cluster(report: Report) -> Verdict:
    """Load only: nothing of it is changed, so nothing is compared and nothing raised."""
    text = f"No verdict about the access of `{report.against}`: it is up, and was only given load."
    sentences = [Sentence(text=text), *_failures(report)]
    for curve in report.curves:
        workers = max(curve.means)
        did = f"{workers} workers of {curve.slots} slots did {number(curve.means[workers])} jobs/s"
        sentences.append(Sentence(text=f"`{curve.profile}`: {did}.", figures=[_figure("curve", curve)]))
    for row in report.diagnoses:
        found = named(row.findings)
        bound = f"what seems to bound it is {_bound(found)}: " * (found.cause in BOUNDS)
        text = f"`{row.profile}` with {row.workers} workers: {bound}{found.why}."
        sentences.append(Sentence(text=text, figures=[_figure("diagnosis", row)]))
    unseen = (
        "Where it bends, whether that is the executor or the machine, and whether what seems to bound it "
        "does. For that workers are added and taken away, `per-worker` is measured beside it, and what seems "
        "to be full is raised: `mvmci bench FILE…` does so with clusters of its own."
    )
    return Verdict(sentences=[*sentences, *_floods(report)], unseen=[Sentence(text=unseen)])


def _bound(found: Finding) -> str:
    return BOUNDS.get(found.cause, "this machine").format(found.whose)


def _figure(what: str, of: figures.OfCandidate) -> str:
    return f"{what}/{of.candidate}/{of.profile}"


def _listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
