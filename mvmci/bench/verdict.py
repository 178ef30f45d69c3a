"""The answer: which access to use, and what that rests on; or why these machines cannot say.

A knee alone says nothing of an access, since what bends may be the machine. So a verdict is a function of the
knee of the access, that of the control, where nothing is shared, and of what bounds the access: it is given
only if that is the access's own, or if the executor kept up with so many that nothing else matters; and only
of windows and jobs that have nothing against them. Then the study's rule speaks, which is data
(`mvmci.bench.judged`). What is alike of several candidates is said once.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from mvmci.bench import figures
from mvmci.bench.bottleneck import FIXED, OTHERS_MANY, Finding, named, raising
from mvmci.bench.capacity import FULL, carried, pays_from_s
from mvmci.bench.curves import control_of, most_of_both, rate_at, versus
from mvmci.bench.figures import in_workers, number, several
from mvmci.bench.judged import SHOWS_EXECUTOR, Judged, choice, is_doubtful, judge
from mvmci.bench.report import CONTROL, Candidate, Curve, Report, Sentence, Verdict

MANY = 1_000  # workers, from which on the rule says another thing
BESIDE_LEAST = 0.02  # of a machine: less, of clusters without load, is not worth a word
PROCESSORS_LEAST = 4  # of a machine that is to show an executor by itself
LIGHT = "light"  # the profile whose jobs cost nothing but the way to an engine
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
    "undecided": "more windows, which a longer --budget has, or a quieter machine",
}

BESIDE = {  # what a kind means for candidates, {}, beside the control
    "together": "Where `per-worker` bends together with {}, it is not an executor that ends.",
    "undecided": "That does not tell {} from `per-worker`.",
    "alone": "Whether that is an executor or the machine cannot be told without `per-worker` beside {}.",
}
# Why there is no verdict: the first of those that were seen.
NO_VERDICT = ("failing", "together", "elsewhere", "undecided", "unclear", "alone")

Pair = tuple[Curve, Curve]  # of a candidate, and of the control
Key = TypeVar("Key", bound=Hashable)
One = TypeVar("One")


def decide(report: Report) -> Verdict:
    """The verdict of a report, which has none yet."""
    if report.against:
        return _of_a_running_cluster(report)
    troubles = [*_cut(report), *_failures(report)]
    if is_doubtful(report):
        sentences = [_doubt(report), *troubles, *_floods(report)]
        return Verdict(sentences=sentences, unseen=list(_one_machine(report)), command=report.command)
    judged = judge(report)
    everything = [one for some in judged for one in some]
    telling = next((told for some in judged if (told := [one for one in some if one.told])), [])
    answer, winner = _answer(telling, report)
    sentences = [answer or _no_verdict(everything, report), *troubles]
    for some in judged:
        sentences += [*_curves(some), *_ceilings(some), *_bottlenecks(some)]
    sentences += [
        *_rule(telling, report),
        *_without_knee(report),
        *_floods(report),
        *_many(telling or everything),
    ]
    return Verdict(
        access=winner.access if winner else "",
        candidate=winner.name if winner else "",
        sentences=[*sentences, *_before(report, winner)],
        unseen=[*_unseen(report, everything), *_one_machine(report)],
        command=_command(report, winner, telling, everything),
    )


def _doubt(report: Report) -> Sentence:
    """Why nothing follows from these windows, whatever they say."""
    counted = [one for one in report.windows if one.counts]
    marked = [one for one in counted if one.marks]
    many = f"{len(marked):,} of {len(counted):,} windows"
    others = [one.others for one in marked if one.others > OTHERS_MANY]
    why = f"something speaks against {many}, as against the last: {'; '.join(marked[-1].marks)}"
    if len(others) > len(marked) / 2:
        why = f"other programs took {min(others):.0%} to {max(others):.0%} of the machine in most of {many}"
    text = f"These figures are worth little, so nothing is concluded: {why}."
    return Sentence(text=text, figures=["windows"])


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
        carries = _listed(f"{one.at:.0f} ({one.name})" for one in told if one.at)
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
        kind = min((one.kind for one in everything), key=NO_VERDICT.index)
        of = [one for one in everything if one.kind == kind]
        why = _why(of, "the others" if len(of) == len(everything) else _names(of))
    return Sentence(text=f"No verdict about the access: {why}.", figures=rests_on)


def _why(of: Sequence[Judged], others: str) -> str:
    """There is no verdict about the access of these, which are of one kind; `others` than the control."""
    full = [one for one in of if one.found.cause not in ("nothing", "unclear")]
    one = (full or of)[0]
    ended = f"what ended, with {several(one.workers, 'worker')}, was {_bound(one.found)}"
    if one.kind == "failing":
        return "too many jobs failed"
    if one.kind == "together":
        ends = (found for found in (one.beside, one.found) if found.whose != "executor")
        bound = next((_bound(found) for found in ends if found.cause in BOUNDS), "this machine")
        return f"what ended first, with `per-worker` as with {others}, was {bound}"
    if one.kind == "undecided" and all(each.is_machine for each in of):
        return f"{ended}, and whether an executor did before is not known"
    if one.kind == "undecided":
        return f"what was measured does not tell {_names(of)} from `per-worker`, where nothing is shared"
    if one.kind == "unclear":
        return f"what bounds {_names(of)} is unclear"
    if one.kind == "alone":
        return f"`per-worker` was not measured beside {_names(of)}"
    first = f"{_names(of)} bend{'s' * (len(of) == 1)} first"
    return f"{first}, and {ended if full else 'nothing was seen to be full'}"


# ---- what it rests on


def _curves(some: Sequence[Judged]) -> Iterator[Sentence]:
    """How far each goes, the control beside them, and whether that is the machine; all are of one profile."""
    curve, control = some[0].curve, some[0].control
    slots = {one.curve.slots for one in some}
    workers = f"workers of {curve.slots} slots" if len(slots) == 1 else "workers"
    carried_by = _listed(_reach(one) for one in some)
    text = f"`{curve.profile}`: throughput grows with the {workers}, to within a tenth, up to {carried_by}"
    if control is not None:
        text += f"; with `per-worker`, where nothing is shared, up to {in_workers(control.knee)}"
    rests_on = [_figure("curve", one) for one in [*(one.curve for one in some), control] if one is not None]
    yield Sentence(text=f"{text}.", figures=rests_on)
    for kind, text in BESIDE.items():
        if of := [one for one in some if one.kind == kind]:
            yield Sentence(text=text.format(_names(of)), figures=[_figure("curve", one.curve) for one in of])
    yield from _compared(some)


def _reach(one: Judged) -> str:
    """Up to where one goes, in all three units."""
    knee = one.curve.knee
    jobs = (knee.most if knee.at is None else knee.at) * one.curve.slots
    told = f"{jobs:,.0f} jobs at once, {number(carried(one.curve))} jobs/s"
    if one.candidate.executors > 1:
        told += f", for each executor {number(one.low)} workers at least"
    return f"{in_workers(knee)} with {one.name} ({told})"


def _compared(some: Sequence[Judged]) -> Iterator[Sentence]:
    """What each does of what the control does: with the workers of its file, and with the most of both."""
    pairs = [(one.curve, one.control) for one in some if one.control is not None]
    own = _groups((one.candidate.workers, (one.curve, one.control)) for one in some if one.control)
    most = _groups((most_of_both(*pair), pair) for pair in pairs)
    for workers, of in own.items():
        yield from _ratios(of, workers, f"With {several(workers, 'worker')}, as the file has")
    for workers, of in most.items():
        if workers not in own:
            yield from _ratios(of, workers, f"With {several(workers, 'worker')}")


def _ratios(pairs: Sequence[Pair], workers: int, begin: str, end: str = "") -> Iterator[Sentence]:
    """Of what the control does with so many, what others do; nothing where that was not measured."""
    told = [(pair, ratio) for pair in pairs if (ratio := versus(*pair, workers)) is not None]
    if not told:
        return
    shares = [f"`{curve.candidate}` {number(ratio.at)}" for (curve, _), ratio in told if ratio.differs]
    if alike := [f"`{curve.candidate}`" for (curve, _), ratio in told if not ratio.differs]:
        shares.append(f"{_listed(alike)} with no difference seen")
    control = told[0][0][1]
    of = f"of what `per-worker` does ({number(rate_at(control, workers))} jobs/s)"
    rests_on = [_figure("curve", curve) for curve in (*(curve for (curve, _), _ in told), control)]
    yield Sentence(text=f"{begin}, {of}: {', '.join(shares)}{end}.", figures=rests_on)


def _ceilings(some: Sequence[Judged]) -> Iterator[Sentence]:
    """Where executors would end, of which no own knee was reached."""
    tops = [(one, one.curve.ceiling) for one in some if one.kind != "own" and one.curve.ceiling is not None]
    if not tops:
        return
    full = _listed(
        f"{number(top.rate)} jobs/s with {one.name} ({number(top.loop_ms)} ms of it a job with "
        f"{several(top.workers, 'worker')}, the work of {top.workers_at_most:.0f})"
        for one, top in tops
    )
    text = (
        "The knee of an executor alone was not reached. Calculated, and not measured, the loop of one is "
        f"full at {full}."
    )
    rests_on = [_figure(what, one.curve) for one, _ in tops for what in ("curve", "diagnosis")]
    yield Sentence(text=text, figures=rests_on)


def _bottlenecks(some: Sequence[Judged]) -> Iterator[Sentence]:
    """What bounds them, whether that was confirmed, and what follows where it is not the access's own."""
    seen = [one for one in some if one.workers and one.kind not in ("unbent", "failing")]
    alike = _groups(((one.found.cause, one.found.whose, one.found.stands, one.kind), one) for one in seen)
    for of in alike.values():
        one, found = of[0], of[0].found
        where = _listed(f"{each.name} with {several(each.workers, 'worker')}" for each in of)
        why = _each(of, [each.found.why for each in of])
        if found.cause == "unclear":
            text = f"What bounds {where} is unclear: {why}."
        elif found.cause == "nothing":
            text = f"Nothing of {where} was seen to be full."
        else:
            why_not = FIXED[found.cause] if raising(found) is None else "it was not raised"
            raised = _each(of, [each.found.tried or why_not for each in of])
            stands = "Confirmed" if found.stands else "Not confirmed"
            text = f"What bounds {where} is {_bound(found)}: {why}. {stands}: {raised}."
        if one.kind in ("elsewhere", "unclear"):
            text += " That says nothing of the access."
        yield Sentence(text=text, figures=[_figure("diagnosis", each.curve) for each in of])


def _rule(telling: Sequence[Judged], report: Report) -> Iterator[Sentence]:
    """What the study's rule says of them; of an interval across a boundary, both, and what would decide."""
    alike = _groups(((choice(one.low), choice(one.high), _boundary(one)), one) for one in telling)
    for (low, high, boundary), of in alike.items():
        names = _names(of)
        text = f"By the study's rule, {low.range} workers for one executor: {low.says.format(names)}"
        if low is not high:
            text += (
                f". Or, {high.range}: {high.says.format(names)}. The interval allows both, and {boundary} "
                f"workers would decide, if `per-worker` still grows there: `{_deciding(of, report)}`"
            )
        elif not low.stays:
            text += f". {names} may stay where fewer workers are enough"
            fits = [one for one in of if 0 < one.candidate.workers <= one.curve.knee.low]
            if fits:
                text += f", as with the {fits[0].candidate.workers} of the file of {_names(fits)}"
        yield Sentence(text=f"{text}.", figures=[_figure("curve", one.curve) for one in of])


def _each(some: Sequence[Judged], texts: Sequence[str]) -> str:
    """What is said of each: once where it is the same of all."""
    if len(said := _groups(zip(texts, some, strict=True))) == 1:
        return texts[0]
    return "; ".join(f"{_names(of)}: {text}" for text, of in said.items())


def _boundary(one: Judged) -> int:
    """From how many workers on the rule would say the other thing."""
    return choice(one.high).least * max(1, one.candidate.executors)


def _deciding(of: Sequence[Judged], report: Report) -> str:
    """The command that measures on which side of the boundary they are."""
    files = [one.candidate.file or one.candidate.name for one in of]
    profile, least = of[0].curve.profile, min(of[0].curve.means)
    asked = report.asked.get(profile, ("--profile", profile))
    return shlex.join(["mvmci", "bench", *files, *asked, "--workers", f"{least},{_boundary(of[0])}"])


def _without_knee(report: Report) -> Iterator[Sentence]:
    """What the way to an engine costs jobs of which a few fill the machine."""
    for profile in report.profiles:
        if profile not in report.without_knee:
            continue
        curves = [one for one in report.curves if one.profile == profile]
        pairs = [
            (one, control)
            for one in curves
            if (control := control_of(one, report.curves, report.candidates)) not in (None, one)
        ]
        if not pairs:
            continue
        workers = min(pairs[0][1].means)
        end = ""
        alone = [
            figures.lives(report, one.candidate, profile)[0]
            for one in (*(one for one, _ in pairs), pairs[0][1])
        ]
        if all(alone):
            *others, own = (number(sum(life.parts.values())) for life in alone if life)
            end = f"; one job alone takes {_listed(others)} ms instead of {own}"
        if profile == LIGHT:
            end += ": that is what the way to the engine costs"
        yield from _ratios(pairs, workers, f"`{profile}`, with {several(workers, 'worker')}", end)


def _cut(report: Report) -> Iterator[Sentence]:
    if report.cut:
        text = f"Not all was measured: {report.cut}. What is told rests on the windows until then."
        yield Sentence(text=text, figures=["windows"])


def _failures(report: Report) -> Iterator[Sentence]:
    """Jobs that did not succeed, which no figure of speed makes up for."""
    for candidate in report.candidates:
        for profile in report.profiles:
            windows = figures.of(report.windows, candidate.name, profile)
            failed, ended = sum(one.failed for one in windows), sum(one.ended for one in windows)
            rows = figures.of(report.diagnoses, candidate.name, profile)
            memory = [found.why for row in rows for found in row.findings if found.cause == "memory"]
            if failed or memory:
                of_jobs = [f"{failed:,} of {ended:,} jobs failed"] if failed else []
                text = ": ".join([f"`{candidate.name}`, `{profile}`", *of_jobs, *memory[:1]])
                rests_on = ["windows", *[f"diagnosis/{candidate.name}/{profile}"][: len(memory)]]
                yield Sentence(text=f"{text}.", figures=rests_on)
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
        f"since of `{best.profile}` no more than {number(rate)} jobs/s were seen here."
    )
    yield Sentence(text=text, figures=[_figure("capacity", best)])


# ---- what to do


def _before(report: Report, winner: Candidate | None) -> Iterator[Sentence]:
    """What has to be done to a file before."""
    if winner is None:
        return
    if not winner.file:
        file, edit = _file(report, winner), f"set `access: {winner.access}`, and take `executors` out"
        yield Sentence(text=f"In {file} {edit}: no file that was given has it.")
    if had := [one for one in winner.changed if one.startswith("executors.")]:
        text = f"What was measured had {_listed(had)}: let the file have the same, or that ends first."
        yield Sentence(text=text)


def _command(
    report: Report, winner: Candidate | None, telling: Sequence[Judged], everything: Sequence[Judged]
) -> str:
    """What makes the move; else what would decide, where that can be measured here."""
    if winner is not None:
        file = shlex.quote(_file(report, winner))
        return f"mvmci plan {file} && mvmci up {file}"
    if across := [one for one in telling if choice(one.high).stays]:
        return _deciding(across, report)
    return report.command if any(map(_is_open, everything)) else ""


def _is_open(one: Judged) -> bool:
    """Whether more windows on the same machine could tell it from the control."""
    return one.kind == "undecided" and not one.is_machine


def _file(report: Report, winner: Candidate) -> str:
    return winner.file or next((one.file for one in report.candidates if one.file), "")


def _unseen(report: Report, everything: Sequence[Judged]) -> Iterator[Sentence]:
    """What these machines cannot show, and what would."""
    hidden = _groups(
        (SHOWN_BY["undecided"] if _is_open(one) else SHOWN_BY.get(one.found.cause, ""), one)
        for one in everything
        if one.kind in ("together", "elsewhere", "undecided")
    )
    for shown_by, some in hidden.items():
        twice = 2 * max((one.processors for one in report.machines), default=1)
        wanted = max([PROCESSORS_LEAST, twice, *(_wanted(one, report) for one in some)])
        own = f"executors on a machine of their own (`runtime: ssh`), with {wanted} or more processors in all"
        text = (
            f"How many workers one executor of {_names(some)} carries by itself. It takes {shown_by or own}."
        )
        yield Sentence(text=text, figures=[*(_figure("curve", one.curve) for one in some), "machine"])
    if unbent := [one for one in everything if one.kind == "unbent" and not choice(one.low).stays]:
        text = f"Where the curve of {_names(unbent)} bends: more workers, or more windows, would show it."
        yield Sentence(text=text, figures=[_figure("curve", one.curve) for one in unbent])
    beside = [one.evidence.beside for one in report.diagnoses]
    if len(report.candidates) > 1 and (share := statistics.median(beside or [0.0])) >= BESIDE_LEAST:
        text = (
            "How far each goes with the machine to itself: the clusters that waited for their turn took "
            f"{share:.0%} of it, so all knees are further to the left. It is the same for all that are "
            "compared, and less with fewer files at a time."
        )
        rests_on = dict.fromkeys(_figure("diagnosis", one) for one in report.diagnoses)
        yield Sentence(text=text, figures=list(rests_on))
    counted = [one for one in report.windows if one.counts]
    if marked := sum(bool(one.marks) for one in counted):
        text = (
            f"What a quieter machine shows: {marked:,} of {len(counted):,} windows count, though something "
            "speaks against them."
        )
        yield Sentence(text=text, figures=["windows"])


def _one_machine(report: Report) -> Iterator[Sentence]:
    if sum(bool(one.hosts) for one in report.machines) <= 1:
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
    doubt = [_doubt(report)] if is_doubtful(report) else []
    sentences = [Sentence(text=text), *doubt, *_cut(report), *_failures(report)]
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


def _names(some: Iterable[Judged]) -> str:
    return _listed(dict.fromkeys(one.name for one in some))


def _groups(pairs: Iterable[tuple[Key, One]]) -> dict[Key, list[One]]:
    """Those of one key together, in order."""
    found: dict[Key, list[One]] = {}
    for key, one in pairs:
        found.setdefault(key, []).append(one)
    return found


def _listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
