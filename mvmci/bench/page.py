"""A report as one page of HTML that needs nothing else: the verdict in words, then what it rests on.

Each sentence of the verdict leads to its figures, whose ids are those of `Sentence.figures`. Nothing is
loaded from anywhere, and no script runs. What the report says is escaped as it is put in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from mvmci.bench import charts, figures
from mvmci.bench.bottleneck import LOOP_FULL, Finding
from mvmci.bench.figures import NONE, STANDS, anchor, given, in_bytes, number, of
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
    "of linear": "What is left of the rate there would be if each worker added as much as the first.",
    "knee": "Where 90% of linear ends, read between the measured points on both sides. Its interval comes "
    "from drawing the repetitions of each point again.",
    "control": "The same load with the access per-worker, where nothing is shared. Where it bends as early "
    "as the others, it is the machine that bends them.",
    "planned moment": "Jobs are submitted by a plan, and their time counts from the planned moment: a stall "
    "counts for all that it kept waiting. A closed loop sends nothing meanwhile, and hardly sees it.",
    "confirmed": "What was named as the bottleneck was raised, and the rate moved. What did not move it "
    "is withdrawn.",
    "law": "Gunther's law, and a queueing model, fitted to all points of a curve. Neither gives the knee; "
    "how far it is off is the most by which the other points miss one.",
}
WHOLE_CHARS = 16  # of code that is not broken at the end of a line
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
    return f"Use {report.verdict.access}" if report.verdict.access else "Not decided on this machine"


def _verdict(report: Report, there: Collection[str]) -> Inside:
    said = report.verdict
    return tag(
        "header",
        tag("p", f"mvmci bench, {report.at[:10]}: which access carries this load?", class_="soft"),
        tag("h1", f"{_headline(report)}."),
        [tag("p", _prose(one.text), " ", _links(one, there), class_="lead") for one in said.sentences[:1]],
        _sentences(said.sentences[1:], there) if said.sentences[1:] else None,
        [tag("h3", "What this could not show"), _sentences(said.unseen, there)] if said.unseen else None,
        [tag("h3", "The move"), tag("pre", tag("code", said.command))] if said.command else None,
    )


def _sentences(said: Sequence[Sentence], there: Collection[str]) -> Inside:
    return tag("ul", [tag("li", _prose(one.text), " ", _links(one, there)) for one in said], class_="said")


def _prose(text: str) -> Inside:
    """What stands between backticks as code."""
    pieces = text.split("`")
    return [
        tag("code", one, class_="whole" if len(one) <= WHOLE_CHARS else None) if place % 2 else one
        for place, one in enumerate(pieces)
    ]


def _links(said: Sentence, there: Collection[str]) -> Inside:
    """To the figures of a sentence. One that is not on the page is only named."""
    shown = []
    for figure in said.figures:
        kind, _, whose = figure.partition("/")
        name = f"{KINDS.get(kind, kind)}{': ' * bool(whose)}{whose.replace('/', ', ')}"
        there_is = anchor(figure) in there
        shown.append(tag("a", name, href=f"#{anchor(figure)}") if there_is else tag("span", name))
    return tag("span", shown, class_="figures")


def _profile(report: Report, profile: str) -> Inside:
    candidates = figures.in_order(report.candidates)
    return tag(
        "section",
        tag("h2", profile.capitalize()),
        tag("p", report.profiles[profile], class_="soft"),
        _curves(report, profile, candidates),
        _times(report, profile, candidates),
        _diagnoses(report, profile, candidates),
    )


def _curves(report: Report, profile: str, candidates: Sequence[Candidate]) -> Inside:
    curves = [one for each in candidates for one in of(report.curves, each.name, profile)]
    if not curves:
        return None
    control = next((one for one in curves if one.candidate == candidates[0].name), None)
    return [
        _table(
            ("", "90% of linear ends at, workers", "jobs at once", "jobs/s", "most, jobs/s", "bottleneck"),
            [_compared(report, one, candidates) for one in curves],
        ),
        [tag("p", told, class_="soft") for one in curves if (told := _ceiling(one))],
        tag(
            "div",
            _figure(
                charts.throughput(report, profile, candidates),
                "Lines are means, small dots repetitions, rings where 90% of linear ends. The dotted "
                "line goes on as the control began.",
            ),
            _figure(
                charts.efficiency(report, profile, candidates),
                "Below, where each passes 90%, and the interval that holds it in 95 of 100 cases.",
            ),
            class_="pair",
        ),
        tag("h3", "What laws say beside it"),
        tag(
            "p",
            "Dashed is Gunther's law, dotted a queueing model, tinted the interval of the knee, thin and "
            "grey the control. Laws are shown beside what was measured and decide nothing.",
            class_="soft",
        ),
        tag(
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
        ),
    ]


def _compared(report: Report, curve: Curve, candidates: Sequence[Candidate]) -> tuple[str, Cells]:
    named, stands = figures.bottleneck(figures.at_knee(report, curve.candidate, curve.profile))
    workers, rate = max(curve.means.items(), key=lambda one: one[1], default=(0, 0.0))
    return f"curve/{curve.candidate}/{curve.profile}", (
        _name(curve.candidate, candidates),
        figures.in_workers(curve.knee),
        number(figures.in_jobs(curve)),
        number(figures.in_rate(curve)),
        f"{number(rate)} with {workers}",
        [named, " ", _mark(stands)],
    )


def _ceiling(curve: Curve) -> str:
    if curve.ceiling is None:
        return ""
    one = curve.ceiling
    return (
        f"Calculated, not measured: the loop of an executor of {curve.candidate} takes {number(one.loop_ms)} "
        f"ms a job with {one.workers} workers, so it is full at {number(one.rate)} jobs/s, which is "
        f"{number(one.workers_at_most)} workers at most."
    )


def _times(report: Report, profile: str, candidates: Sequence[Candidate]) -> Inside:
    """How long jobs take, and where that goes: two charts side by side, and their tables below."""
    late = [one for each in candidates for one in of(report.latencies, each.name, profile)]
    lives = [one for each in candidates for one in figures.lives(report, each.name, profile) if one]
    shown = []
    if late:
        told = (
            "From the median to the last percentile that can be told. A stall counts from the planned moment."
        )
        shown.append(("How long a job takes", charts.latency(late, candidates), told))
    if lives:
        shown.append(
            (
                "Where the time of a job goes",
                charts.life(lives, candidates),
                "Means, by the journals. The table below has the colours.",
            )
        )
    return [
        tag(
            "div",
            [tag("div", tag("h3", name), _figure(one, told)) for name, one, told in shown],
            class_="pair",
        ),
        _latency_table(late, candidates) if late else None,
        _life_table(lives) if lives else None,
    ]


def _latency_table(told: Sequence[Latency], candidates: Sequence[Candidate]) -> Markup:
    names = list(dict.fromkeys(name for one in told for name in (*one.planned, *one.sent, *one.closed)))
    rows = [
        (
            f"latency/{one.candidate}/{one.profile}",
            (
                _name(one.candidate, candidates),
                f"{given(one.rate)} by {one.workers} workers",
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
        tag("h3", "What bounds it: running and waiting by unit"),
        tag("p", f"Beyond {LOOP_FULL:.0%} of the time a loop is full.", class_="soft"),
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
    rest = (
        f"Machine {seen.busy:.0%} busy, others {seen.others:.0%}, slots {seen.slots_taken:.0%} taken; in a "
        f"slot {number(seen.in_slot_ms)} ms (alone {number(seen.in_slot_alone_ms)}), a write "
        f"{number(seen.write_ms)} ms ({number(seen.write_alone_ms)}), a round trip "
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
    candidates = figures.in_order(report.candidates)
    told = [
        one
        for profile in report.profiles
        for each in candidates
        for one in of(report.capacity, each.name, profile)
    ]
    rows = [
        (
            f"capacity/{one.candidate}/{one.profile}",
            (
                _name(one.candidate, candidates),
                one.profile,
                given(one.rate),
                f"{one.workers}{' *' * one.beyond}",
                str(one.executors),
                number(one.cores),
                in_bytes(one.memory_bytes),
                in_bytes(one.disk_bytes_a_day),
            ),
        )
        for one in told
    ]
    heads = ("", "profile", "jobs/s", "workers", "executors", "cores", "memory", "broker's disk a day")
    about = "Calculated from the curves and from what a job takes at that load; * is more than was measured."
    return (
        tag("section", tag("h2", "What a rate needs"), tag("p", about), _table(heads, rows)) if rows else None
    )


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
        f", {_several(one.executors, 'executor')} of {one.executor_slots} slots" if one.executors else ""
    )
    changed = f"; {', '.join(one.changed)}" if one.changed else ""
    return (
        f"{one.name}: {one.file or 'added as the control'}, access {one.access}, runtime {one.runtime}, "
        f"workers of {_several(one.slots, 'slot')}{executors}{changed}"
    )


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _set_aside(report: Report) -> Inside:
    again, stayed = figures.set_aside(report)
    rows = [
        ("", (*_point(one), "counts" if one.counts else "run again", "; ".join(one.marks)))
        for one in (*stayed, *again)
    ]
    return tag(
        "section",
        tag("h2", "What was repeated or marked"),
        _table((*POINT, "", "what speaks against it"), rows) if rows else tag("p", "Nothing."),
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
    return tag("div", table, class_="wide", tabindex="0")


def _is_number(cell: Inside) -> bool:
    return isinstance(cell, str) and (cell[:1].isdigit() or cell in ("", NONE))


def _name(name: str, candidates: Sequence[Candidate]) -> Inside:
    """A candidate with its colour, and whether it is the control."""
    control = any(one.name == name and one.access == CONTROL for one in candidates)
    return [
        tag("span", class_=f"swatch {charts.colour(candidates, name)}"),
        name,
        tag("span", " control", class_="soft") if control else None,
    ]
