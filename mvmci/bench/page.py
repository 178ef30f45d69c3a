"""A report as one page of HTML that needs nothing else: the verdict in words, then what it rests on.

Each sentence of the verdict leads to its figures, whose ids are those of `Sentence.figures`. Nothing is
loaded from anywhere, and no script runs. What the report says is escaped as it is put in.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Sequence

from mvmci.bench import charts, figures
from mvmci.bench.bottleneck import LOOP_FULL, Finding
from mvmci.bench.curves import versus
from mvmci.bench.figures import NONE, STANDS, anchor, given, in_bytes, number, of, several
from mvmci.bench.markup import Inside, Markup, join, tag
from mvmci.bench.report import (
    CONTROL,
    Candidate,
    Curve,
    Diagnosis,
    Latency,
    Life,
    MachineFacts,
    Report,
    Sentence,
    Window,
)
from mvmci.bench.style import STYLE
from mvmci.jobs.times import WORDS

HEAD = Markup(
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)
KINDS = {  # of figures, as links to them are called
    "diagnosis": "bottleneck",
    "life": "where time goes",
    "flood": "many at once",
}
TERMS = {
    "jobs/s": "Jobs that ended in a second, in closed loops: so many are kept open all the time.",
    "linear": "The rate there would be if each worker added as much as the first.",
    "knee": "The number of workers at which 90% of linear ends, read between the measured points on both "
    "sides. Its interval comes from drawing the repetitions of each point again.",
    "control": "The same load with the access per-worker, where nothing is shared. Where it bends as early "
    "as the others, it is the machine that bends them.",
    "p50, p99": "What 50 and 99 of 100 jobs did not exceed. One is told if ten jobs took longer: p50 from 20 "
    "jobs on, p90 from 100, p99 from 1,000.",
    "planned moment": "Jobs are submitted by a plan, and their time counts from the planned moment: a stall "
    "counts for all that it kept waiting. A closed loop sends nothing meanwhile, and hardly sees it.",
    "loop": "The one thread of a unit that everything in it passes. Jobs run in processes of their own.",
    "confirmed": "What was named as the bottleneck was raised, and the rate moved. What did not move it "
    "is withdrawn.",
    "law": "Gunther's law, and a queueing model, fitted to all points of a curve. Neither gives the knee; "
    "how far it is off is the most by which the other points miss one.",
}
WHOLE_CHARS = 16  # of code that is not broken at the end of a line
SAID, UNSEEN = 7, 3  # sentences that are shown behind the first, and of what was not seen; the rest is folded
FEW = 3  # points of a curve, from which on it has a shape
KNEE = (
    "Throughput grows with the workers up to the knee, to within a tenth; in brackets, the interval that "
    "holds it in 95 of 100 cases. The control shares nothing: what bends no earlier than it is bent by the "
    "machine."
)
ABSENT = f"{NONE}: not measured, or there were too few jobs to tell."
POINT = ("window", "cluster", "profile", "workers")

Cells = Sequence[Inside]


def page(report: Report) -> str:
    """The page."""
    body = join(
        [
            [_profile(report, name) for name in report.profiles],
            _capacity(report),
            _floods(report),
            _machines(report),
            _set_aside(report),
            _raw(report),
        ]
    )
    there = set(re.findall(r' id="([^"]+)"', body))
    head = tag("head", HEAD, tag("title", f"{_headline(report)}: mvmci bench"), tag("style", Markup(STYLE)))
    shown = tag("body", tag("main", _verdict(report, there), body))
    return f"<!doctype html>\n{tag('html', head, shown, lang='en')}\n"


def _headline(report: Report) -> str:
    if report.against:
        return f"{report.against} under load"
    return f"Use {report.verdict.access}" if report.verdict.access else "Not decided on this machine"


def _verdict(report: Report, there: Collection[str]) -> Inside:
    said = report.verdict
    asked = "what does this cluster do?" if report.against else "which access carries this load?"
    return tag(
        "header",
        tag("p", f"mvmci bench, {report.at[:10]}: {asked}", class_="soft"),
        tag("h1", f"{_headline(report)}."),
        tag(
            "div",
            [
                tag("p", _prose(one.text), " ", _links(one, there), class_="lead")
                for one in said.sentences[:1]
            ],
            _answer(report),
            class_="pair",
        ),
        _sentences(said.sentences[1:], SAID, there),
        [tag("h3", "What this could not show"), _sentences(said.unseen, UNSEEN, there)]
        if said.unseen
        else None,
        [
            tag("h3", "The move" if said.access else "What to measure next"),
            tag("pre", tag("code", said.command)),
        ]
        if said.command
        else None,
    )


def _answer(report: Report) -> Inside:
    """The knees that the first sentence rests on, by what the rule asks."""
    rests_on = {figure for one in report.verdict.sentences[:1] for figure in one.figures}
    curves = [one for one in report.curves if f"curve/{one.candidate}/{one.profile}" in rests_on]
    profile = next((one.profile for one in curves if len(one.means) >= FEW), None)
    if profile is None or not report.candidates:
        return None
    about = (
        "Dots are knees, lines their intervals; an arrow goes on beyond what was measured. Where the "
        "control's is in the same place, the machine ended there, and not the executor."
    )
    return _figure(charts.answer(report, profile, figures.in_order(report.candidates)), about)


def _sentences(said: Sequence[Sentence], most: int, there: Collection[str]) -> Inside:
    """The first of them; the rest is there for those who ask for it."""
    first, rest = (
        tag("ul", [tag("li", _prose(one.text), " ", _links(one, there)) for one in some], class_="said")
        for some in (said[:most], said[most:])
    )
    more = tag("details", tag("summary", f"{len(said) - most} more"), rest, class_="rest")
    return [first if said else None, more if said[most:] else None]


def _prose(text: str) -> Inside:
    """What stands between backticks as code."""
    pieces = text.split("`")
    return [
        tag("code", one, class_="whole" if len(one) <= WHOLE_CHARS else None) if place % 2 else one
        for place, one in enumerate(pieces)
    ]


def _links(said: Sentence, there: Collection[str]) -> Inside:
    """To the figures of a sentence, those of a kind together. One that is not on the page is only named."""
    kinds: dict[str, list[Inside]] = {}
    for figure in dict.fromkeys(said.figures):
        kind, _, whose = figure.partition("/")
        name, _, profile = whose.partition("/")
        of_kind = ", ".join(filter(None, (KINDS.get(kind, kind), profile)))
        shown = name or of_kind
        link = tag("a", shown, href=f"#{anchor(figure)}") if anchor(figure) in there else shown
        links = kinds.setdefault(f"{of_kind}: " if name else "", [])
        links.append([" · " if links else None, link])
    return tag("span", [tag("span", name, links) for name, links in kinds.items()], class_="figures")


def _profile(report: Report, profile: str) -> Inside:
    candidates = figures.in_order(report.candidates)
    return tag(
        "section",
        tag("h2", profile.capitalize()),
        tag("p", report.profiles[profile], class_="soft"),
        _curves(report, profile, candidates),
        _times(report, profile, candidates),
        _diagnoses(report, profile, candidates),
        _not_run(report, profile),
    )


def _not_run(report: Report, profile: str) -> Inside:
    """What there is of other profiles, or could have been, and not of this one."""
    kinds: dict[str, Sequence[figures.OfCandidate]] = {
        "curves": report.curves,
        "how long jobs take": report.latencies,
        "where their time goes": report.lives,
        "what bounds them": report.diagnoses,
    }
    absent = [name for name, rows in kinds.items() if all(one.profile != profile for one in rows)]
    return (
        tag("p", f"Not run, or nothing ended in time: {', '.join(absent)}.", class_="soft")
        if absent
        else None
    )


def _curves(report: Report, profile: str, candidates: Sequence[Candidate]) -> Inside:
    curves = [one for each in candidates for one in of(report.curves, each.name, profile)]
    if not curves:
        return None
    control = next((one for one in curves if one.candidate == candidates[0].name), None)
    if profile in report.without_knee or all(len(one.means) < FEW for one in curves):
        return _side_by_side(report, curves, control, candidates)
    laws = tag(
        "div",
        [
            _figure(
                charts.fitted(one, control, charts.colour(candidates, one.candidate)),
                [tag("div", f"{law.text}; off by up to {law.off:.0%}") for law in one.laws],
                name=one.candidate,
            )
            for one in curves
        ],
        class_="many",
    )
    return [
        tag("p", KNEE),
        _table(
            ("", "knee, workers", "jobs at once", "jobs/s", "most seen, jobs/s", "what bounds it"),
            [_compared(report, one, candidates) for one in curves],
        ),
        _ceilings(curves),
        tag(
            "div",
            _figure(
                charts.throughput(report, profile, candidates),
                "As long as a curve keeps to the dotted line, each worker adds what the first did. The ring "
                "is its knee: from there on more workers add less. Small dots are single windows.",
            ),
            _figure(
                charts.efficiency(report, profile, candidates),
                "How much of the dotted line is left. Below it the knees and their intervals; an arrow goes "
                "on beyond what was measured. Where these overlap, no difference was seen.",
            ),
            class_="pair",
        ),
        _folded(
            "What two formulas make of these points",
            [
                tag(
                    "p",
                    "Dashed is Gunther's law, dotted a queueing model, tinted the interval of the knee, thin "
                    "and grey the control. They decide nothing.",
                    class_="soft",
                ),
                laws,
            ],
        )
        if any(one.laws for one in curves)
        else None,
    ]


def _side_by_side(
    report: Report, curves: Sequence[Curve], control: Curve | None, candidates: Sequence[Candidate]
) -> Inside:
    """What has no knee: jobs of which a few fill the machine, or so few numbers of workers."""
    points = sorted({workers for one in curves for workers in one.means})
    rows = [
        (
            f"curve/{one.candidate}/{one.profile}",
            (
                _name(one.candidate, candidates),
                *(_repeated(one.rates.get(workers, ())) for workers in points),
                _beside(one, control),
                _bounds(report, one),
            ),
        )
        for one in curves
    ]
    heads = (f"with {several(workers, 'worker')}, jobs/s" for workers in points)
    what = "What the way to an engine costs jobs of which a few fill the machine: they show no knee."
    if curves[0].profile not in report.without_knee:
        what = "So few numbers of workers show no knee."
    about = f"{what} In brackets, what single windows lay between."
    return [tag("p", about), _table(("", *heads, "of the control's rate", "what bounds it"), rows)]


def _beside(curve: Curve, control: Curve | None) -> str:
    """What it does of what the control does, with the least number of workers."""
    ratio = None if control is None or control is curve else versus(curve, control, min(curve.means))
    if ratio is None:
        return ""
    return f"{ratio.at:.0%} (±{ratio.margin:.0%})" if ratio.differs else "no difference seen"


def _bounds(report: Report, curve: Curve) -> Inside:
    named, stands = figures.bottleneck(figures.at_knee(report, curve.candidate, curve.profile))
    return [named, " ", _mark(stands)]


def _repeated(rates: Sequence[float]) -> str:
    if not rates:
        return NONE
    between = f" ({number(min(rates))}–{number(max(rates))})" if len(rates) > 1 else ""
    return f"{number(statistics.fmean(rates))}{between}"


def _compared(report: Report, curve: Curve, candidates: Sequence[Candidate]) -> tuple[str, Cells]:
    workers, rate = max(curve.means.items(), key=lambda one: one[1], default=(0, 0.0))
    return f"curve/{curve.candidate}/{curve.profile}", (
        _name(curve.candidate, candidates),
        figures.in_workers(curve.knee),
        number(figures.in_jobs(curve)) if curve.knee.at else f"over {curve.knee.most * curve.slots:,}",
        number(figures.in_rate(curve)) if curve.knee.at else f"over {number(curve.means[curve.knee.most])}",
        f"{number(rate)} with {workers}",
        _bounds(report, curve),
    )


def _ceilings(curves: Sequence[Curve]) -> Inside:
    told = [
        f"{each.candidate} at {number(one.rate)} jobs/s, {number(one.workers_at_most)} workers "
        f"({number(one.loop_ms)} ms a job with {one.workers})"
        for each in curves
        if (one := each.ceiling) is not None
    ]
    about = (
        "Calculated, not measured, where the loop of one executor would be full, by the time that a job "
        f"takes of it: {'; '.join(told)}. That time changes with load."
    )
    return tag("p", about, class_="soft") if told else None


def _times(report: Report, profile: str, candidates: Sequence[Candidate]) -> Inside:
    """How long jobs take, and where that goes: two charts side by side, and their tables below."""
    late = [one for each in candidates for one in of(report.latencies, each.name, profile)]
    lives = [one for each in candidates for one in figures.lives(report, each.name, profile) if one]
    shown = []
    if any(len(one.planned) > 1 for one in late):
        told = (
            "From the median to the last percentile that so many jobs tell: the further a line reaches, the "
            "longer the unlucky wait. The closed loop is beside it since it hides that."
        )
        shown.append(("How long a job takes", _figure(charts.latency(late, candidates), told)))
    elif late:
        shown.append(("How long a job takes", tag("p", _too_few(late))))
    if lives:
        told = (
            "What grows from alone to loaded is where jobs wait. Blue is waiting, green the job itself, "
            "purple its records; the table below has the colours. A closed loop keeps twice as many jobs "
            "open as there are slots: that alone makes `wait: queue` as long as a job."
        )
        shown.append(("Where the time of a job goes", _figure(charts.life(lives, candidates), _prose(told))))
    return [
        tag("div", [tag("div", tag("h3", name), inside) for name, inside in shown], class_="pair"),
        _latency_table(late, candidates) if any(one.planned for one in late) else None,
        _life_table(lives) if lives else None,
    ]


def _too_few(late: Sequence[Latency]) -> Inside:
    """Why there is nothing to draw."""
    jobs = " to ".join(f"{count:,}" for count in sorted({f([one.jobs for one in late]) for f in (min, max)}))
    tell = "no more than the median" if any(one.planned for one in late) else "not even the median"
    return _prose(
        f"{jobs} jobs at {given(late[0].rate)} jobs/s tell {tell}: p50 takes 20, p90 100, and p99 1,000. "
        "A longer `--budget` or a higher `--rate` shows more."
    )


def _latency_table(told: Sequence[Latency], candidates: Sequence[Candidate]) -> Markup:
    names = list(dict.fromkeys(name for one in told for name in (*one.planned, *one.sent, *one.closed)))
    rows = [
        (
            f"latency/{one.candidate}/{one.profile}",
            (
                _name(one.candidate, candidates),
                f"{given(one.rate)} by {several(one.workers, 'worker')}",
                f"{one.jobs:,}",
                *(
                    " / ".join(number(shown.get(name)) for name in names)
                    for shown in (one.planned, one.sent, one.closed)
                ),
            ),
        )
        for one in told
    ]
    ways = ("from the planned moment", "from the sending", "as a closed loop says")
    return _table((f"ms, {' / '.join(names)}", "jobs/s", "jobs", *ways), rows)


def _life_table(told: Sequence[Life]) -> Inside:
    first = {one.candidate: one for one in reversed(told)}
    heads = [
        tag(
            "div",
            one.candidate,
            tag("div", _among(one)),
            id=anchor(f"life/{one.candidate}/{one.profile}") if one is first[one.candidate] else None,
        )
        for one in told
    ]
    rows = [
        (
            "",
            (
                [tag("span", class_=f"swatch p-{part}"), WORDS.get(part, part)],
                *(number(one.parts.get(part, 0.0)) for one in told),
            ),
        )
        for part in figures.parts(told)
    ]
    return _table(("ms", *heads), rows)


def _among(life: Life) -> str:
    return "alone" if life.alone else f"{life.workers} workers"


def _diagnoses(report: Report, profile: str, candidates: Sequence[Candidate]) -> Inside:
    """Where the knee is, drawn; at the other points, what was named there."""
    knees = [figures.at_knee(report, one.name, profile) for one in candidates]
    drawn = [one for one in knees if one is not None]
    rest = [
        ("", (_name(one.candidate, candidates), str(one.workers), number(one.rate), *figures.bottleneck(one)))
        for each in candidates
        for one in of(report.diagnoses, each.name, profile)
        if one not in drawn
    ]
    if not drawn:
        return None
    return [
        tag("h3", "What bounds it: how busy each unit was"),
        tag(
            "p",
            f"All that a unit does passes its loop. A bar that reaches {LOOP_FULL:.0%} is a unit that can do "
            "no more; yellow is time in which it wanted a processor and had none.",
            class_="soft",
        ),
        tag(
            "div",
            [
                _figure(
                    charts.loops(one),
                    _findings(one),
                    name=f"{one.candidate}, {one.workers} workers, {number(one.rate)} jobs/s",
                    id=f"diagnosis/{one.candidate}/{profile}",
                )
                for one in drawn
            ],
            class_="pair",
        ),
        _folded("At other points", _table(("", "workers", "jobs/s", "bottleneck", ""), rest))
        if rest
        else None,
    ]


def _findings(diagnosis: Diagnosis) -> Inside:
    seen = diagnosis.evidence
    slots = (
        f"slots {seen.slots_taken:.0%} taken, a job in one for {number(seen.in_slot_ms)} ms (alone "
        f"{number(seen.in_slot_alone_ms)}), "
    )
    rest = (
        f"Machine {seen.busy:.0%} busy, others {seen.others:.0%}, {slots * bool(seen.in_slot_ms)}a write in "
        f"{number(seen.write_ms)} ms ({number(seen.write_alone_ms)}), a round trip to the broker in "
        f"{number(seen.round_trip_ms)} ms ({number(seen.round_trip_alone_ms)})."
    )
    return [
        [tag("p", *_finding(one)) for one in diagnosis.findings]
        or tag("p", "Nothing is full: it needs more load."),
        tag("p", rest, class_="soft"),
    ]


def _finding(one: Finding) -> Iterable[Inside]:
    yield from (tag("b", figures.cause(one)), " ", _mark(STANDS[one.stands]), f": {one.why}.")
    if one.tried:
        yield f" {one.tried[:1].upper()}{one.tried[1:]}."


def _mark(stands: str) -> Inside:
    return tag("span", stands, class_=f"mark {stands}") if stands else None


def _capacity(report: Report) -> Inside:
    """Of the candidate that the verdict is for, or else of the control; the others are folded."""
    candidates = figures.in_order(report.candidates)
    chosen = report.verdict.candidate or candidates[0].name
    candidates.sort(key=lambda one: one.name != chosen)
    tables = []
    for one in candidates:
        rows = [
            (f"capacity/{row.candidate}/{row.profile}", figures.capacity(row, one))
            for row in report.capacity
            if row.candidate == one.name
        ]
        if rows:
            tables.append(
                [tag("h3", _name(one.name, figures.in_order(candidates))), _table(figures.CAPACITY, rows)]
            )
    about = (
        "Calculated from the curves and from what a job takes at that load: a plan, and no measurement. "
        f"{figures.BEYOND} is beyond the knee."
    )
    if not tables:
        return None
    others = _folded("The others", tables[1:]) if tables[1:] else None
    return tag("section", tag("h2", "What a rate needs"), tag("p", about), tables[0], others)


def _floods(report: Report) -> Inside:
    rows = [
        (
            f"flood/{one.candidate}/{one.profile}",
            (
                one.candidate,
                one.profile,
                f"{one.jobs:,}",
                f"{number(one.seconds)} s",
                f"{one.succeeded:,}",
                f"{one.failed:,}",
                f"{one.lost:,}",
                f"{one.twice:,}",
            ),
        )
        for one in report.floods
    ]
    heads = ("", "profile", "jobs at once", "all ended after", "succeeded", "failed", "lost", "ended twice")
    return tag("section", tag("h2", "Many at once"), _table(heads, rows)) if rows else None


def _machines(report: Report) -> Inside:
    took, budget = figures.in_minutes(report.took_s), figures.in_minutes(report.budget_s)
    return tag(
        "section",
        tag("h2", "The machine, and the run", id="machine"),
        _terms(
            [
                *(("machine", _machine(one)) for one in report.machines),
                ("clusters", [tag("div", _described(one)) for one in report.candidates]),
                ("against", report.against),
                ("run", f"{report.at}, {took} of {budget}"),
                ("counted", tag("span", figures.counts(report.counted), id="counted")),
                ("command", tag("code", report.command)),
                ("program", f"mvmci {report.mvmci}"),
            ]
        ),
    )


def _machine(facts: MachineFacts) -> str:
    if not facts.calibration_us:
        return f"{figures.machine(facts)}."
    middle, *between = facts.calibration_us
    spread = f" (between {number(min(between) / 1000)} and {number(max(between) / 1000)})" if between else ""
    return f"{figures.machine(facts)}. A fixed piece of work took it {number(middle / 1000)} ms{spread}."


def _described(one: Candidate) -> str:
    executors = (
        f", {several(one.executors, 'executor')} of {one.executor_slots} slots" if one.executors else ""
    )
    changed = f"; {', '.join(one.changed)}" if one.changed else ""
    return (
        f"{one.name}: {one.file or 'added as the control'}, access {one.access}, runtime {one.runtime}, "
        f"workers of {several(one.slots, 'slot')}{executors}{changed}"
    )


def _set_aside(report: Report) -> Inside:
    again, stayed = figures.set_aside(report)
    said = (
        f"{len(again):,} of {len(report.windows):,} windows were run again, for what others did meanwhile or "
        f"a machine that was not as before. {len(stayed):,} count with something against them that stayed."
    )
    rows = [
        ("", (*_point(one), "counts" if one.counts else "run again", "; ".join(one.marks)))
        for one in (*stayed, *again)
    ]
    return tag(
        "section",
        tag("h2", "What was repeated or marked"),
        tag("p", said if rows else "Nothing."),
        _folded("Which, and why", _table((*POINT, "", "what speaks against it"), rows)) if rows else None,
    )


def _point(one: Window) -> Cells:
    return str(one.number), one.candidate, one.profile, str(one.workers)


def _raw(report: Report) -> Inside:
    windows = [
        (
            "",
            (
                *_point(one),
                f"open, {given(one.planned)}/s" if one.loop == "open" else f"closed, {one.at_once}",
                number(one.rate),
                f"{one.failed:,}",
                f"{one.busy:.0%}",
                f"{one.others:.0%}",
                number(one.late_ms),
                number(one.calibration_us / 1000),
                "yes" if one.counts else "no",
            ),
        )
        for one in report.windows
    ]
    demands = [
        (
            "",
            (
                one.candidate,
                one.profile,
                str(one.workers),
                number(one.cpu_ms),
                in_bytes(one.worker_bytes),
                in_bytes(one.executor_bytes),
                in_bytes(one.broker_bytes),
            ),
        )
        for one in report.demands
    ]
    heads = ("loop", "jobs/s", "failed", "busy", "others", "late, ms", "calibration, ms", "counts")
    return tag(
        "section",
        tag("h2", "Raw figures"),
        tag("p", "The samples of each window are in the JSON of this report.", class_="soft"),
        _folded(f"All {len(windows)} windows", _table((*POINT, *heads), windows), id="windows"),
        _folded(
            "What a job takes",
            _table(
                ("", "profile", "workers", "processor, ms", "a worker", "an executor", "disk, a job"), demands
            ),
        )
        if demands
        else None,
        _folded("What the words mean", _terms(list(TERMS.items()))),
    )


def _folded(name: str, inside: Inside, id: str | None = None) -> Markup:
    return tag("details", tag("summary", name), inside, id=id)


def _terms(terms: Sequence[tuple[str, Inside]]) -> Markup:
    return tag("dl", [[tag("dt", name), tag("dd", told)] for name, told in terms if told])


def _figure(chart: Markup, *told: Inside, name: str = "", id: str = "") -> Markup:
    shown = tag("strong", name) if name else None
    return tag("figure", shown, chart, tag("figcaption", *told), id=anchor(id) or None)


def _table(heads: Cells, rows: Sequence[tuple[str, Cells]]) -> Markup:
    """A table. The first row of a figure has its id, and numbers stand to the right."""
    firsts = {figure: place for place, (figure, _) in reversed(list(enumerate(rows)))}
    right = [place > 0 and all(_is_number(cells[place]) for _, cells in rows) for place in range(len(heads))]
    kinds = ["n" if one else None for one in right]
    head = tag(
        "tr", [tag("th", name, scope="col", class_=kind) for name, kind in zip(heads, kinds, strict=True)]
    )
    body = [
        tag(
            "tr",
            tag("th", cells[0], scope="row"),
            [tag("td", cell, class_=kind) for cell, kind in zip(cells[1:], kinds[1:], strict=True)],
            id=anchor(figure) if figure and firsts[figure] == place else None,
        )
        for place, (figure, cells) in enumerate(rows)
    ]
    table = tag("table", tag("thead", head), tag("tbody", body))
    cells = [cell for _, row in rows for cell in row if isinstance(cell, str)]
    absent = tag("p", ABSENT, class_="soft") if any(NONE in cell.split() for cell in cells) else None
    return join([tag("div", table, class_="wide", tabindex="0"), absent])


def _is_number(cell: Inside) -> bool:
    return isinstance(cell, str) and (cell.removeprefix("over ")[:1].isdigit() or cell in ("", NONE))


def _name(name: str, candidates: Sequence[Candidate]) -> Inside:
    """A candidate with its colour, and whether it is the control."""
    control = any(one.name == name and one.access == CONTROL for one in candidates)
    return [
        tag("span", class_=f"swatch {charts.colour(candidates, name)}"),
        name,
        tag("span", " control", class_="soft") if control else None,
    ]
