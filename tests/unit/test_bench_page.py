"""The page of a report: whole, safe whatever a report says, and each sentence leads to its figures."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from mvmci.bench import figures
from mvmci.bench.charts import UNITS_EACH, fitted
from mvmci.bench.figures import anchor, number
from mvmci.bench.knee import find_knee
from mvmci.bench.page import page
from mvmci.bench.report import Report, Sentence
from mvmci.bench.svg import spread, ticks
from tests.harness.reports import make_report

replace: Any = msgspec.structs.replace
VOID = {"meta", "br"}
HOSTILE = "</style></title><script src=//a.example>\"'><img onerror=x>&amp;\u202e\x00"


class Reader(HTMLParser):
    """Takes a page apart, and fails where an element is not closed by its own name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}  # of all inside of an element with an id
        self.inside: list[str | None] = []
        self.said = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = {name: " ".join(said.split()) for name, said in self.text.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.inside.append(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside.pop()

    def handle_data(self, data: str) -> None:
        self.said += data
        for name in filter(None, self.inside):
            self.text[name] = self.text.get(name, "") + " " + data

    def all(self, name: str) -> list[str]:
        return [found for _, each in self.elements if (found := each.get(name)) is not None]


def test_every_sentence_leads_to_its_figures() -> None:
    report = make_report()
    read = Reader(page(report))
    said = [*report.verdict.sentences, *report.verdict.unseen]
    assert {f"#{anchor(figure)}" for one in said for figure in one.figures} == set(read.all("href"))
    assert {link.removeprefix("#") for link in read.all("href")} <= set(read.all("id"))
    assert max(Counter(read.all("id")).values()) == 1


def test_whatever_a_report_has_of_a_candidate_can_be_led_to() -> None:
    report = make_report()
    kinds = {
        "curve": report.curves,
        "diagnosis": report.diagnoses,
        "latency": report.latencies,
        "life": report.lives,
        "capacity": report.capacity,
        "flood": report.floods,
    }
    every = {f"{kind}/{one.candidate}/{one.profile}" for kind, those in kinds.items() for one in those}
    assert every | {"machine", "windows", "counted"} <= set(Reader(page(report)).all("id"))


def test_a_figure_that_is_not_on_the_page_is_named_and_no_link() -> None:
    report = make_report()
    sentence = Sentence(text="So it is.", figures=("curve/other/waiting",))
    read = Reader(page(replace(report, verdict=replace(report.verdict, sentences=[sentence], unseen=()))))
    assert read.all("href") == []
    assert "curve, waiting: other" in read.said


def test_what_a_sentence_has_between_backticks_is_code_and_no_markup() -> None:
    report = make_report()
    sentence = Sentence(text="Do `mvmci up <a> --yes` or `b`; `c.")
    text = page(replace(report, verdict=replace(report.verdict, sentences=[sentence])))
    assert "Do <code>mvmci up &lt;a&gt; --yes</code> or" in text
    assert ">b</code>; <code" in text


def test_the_figures_of_a_row_are_those_of_the_report() -> None:
    report = make_report()
    text = Reader(page(report)).text
    for curve in report.curves:
        row = text[f"curve/{curve.candidate}/{curve.profile}"]
        if curve.profile in report.without_knee:
            assert all(f"{number(min(each))}–{number(max(each))}" in row for each in curve.rates.values())
            continue
        assert curve.knee.at is not None and curve.knee.high is not None
        for told in (curve.knee.at, curve.knee.low, curve.knee.high, curve.knee.at * curve.slots):
            assert f"{told:.1f}" in row
        assert f"{max(curve.means.values()):,.0f}" in row
    for late in report.latencies:
        row = text[f"latency/{late.candidate}/{late.profile}"]
        for shown in (late.planned, late.sent, late.closed):
            assert " / ".join(figures.number(ms) for ms in shown.values()) in row
    for seen in report.diagnoses:
        told = text[f"diagnosis/{seen.candidate}/{seen.profile}"]
        assert all(f"{found.why}." in told and found.tried[1:] in told for found in seen.findings)


def test_a_bottleneck_says_whether_it_was_confirmed() -> None:
    text = Reader(page(make_report())).text
    assert "confirmed" in text["curve/shared/waiting"]
    assert "processors likely, not slots" in text["curve/pool/waiting"]
    assert "executor's slots withdrawn" in text["diagnosis/pool/waiting"]
    assert "likely" in text["diagnosis/per-worker/waiting"]


def test_windows_that_were_marked_are_listed_with_what_became_of_them() -> None:
    report = make_report()
    read = Reader(page(report))
    marked = [one for one in report.windows if one.marks]
    assert {one.counts for one in marked} == {True, False}
    for one in marked:
        became = "counts" if one.counts else "run again"
        point = f"{one.number}{one.candidate}{one.profile}{one.workers}"
        assert f"{point}{became}{one.marks[0]}" in read.said


def test_every_window_stands_among_the_raw_figures() -> None:
    report = make_report()
    said = Reader(page(report)).said
    for one in report.windows:
        assert re.search(rf"{one.number}{one.candidate}{one.profile}{one.workers}(open|closed), ", said)


def test_nothing_that_a_report_says_becomes_markup() -> None:
    report = make_report()
    hostile = msgspec.convert(_hostile(msgspec.to_builtins(report)), Report, strict=False)
    read, plain = Reader(page(hostile)), Reader(page(report))
    shape = [(name, sorted(each)) for name, each in read.elements]
    assert shape == [(name, sorted(each)) for name, each in plain.elements]
    assert "<script src=//a.example>" in read.said
    assert "\x00" not in read.said and "\u202e" not in read.said
    assert {link.removeprefix("#") for link in read.all("href")} <= set(read.all("id"))
    assert len(read.all("href")) == len(plain.all("href"))


def _hostile(value: Any, key: str = "") -> Any:
    """The same with each text of it, and each name that it gives something, made longer by markup."""
    match value:
        case dict() if key == "profiles":
            return {name + HOSTILE: about + HOSTILE for name, about in value.items()}
        case dict():
            return {name: _hostile(one, name) for name, one in value.items()}
        case list() | tuple():
            return [_hostile(one, key) for one in value]
        case str() if key == "figures":
            return value.replace("/", f"{HOSTILE}/").replace(HOSTILE, "", 1) + HOSTILE * ("/" in value)
        case str() if value and key not in ("access", "loop", "law"):
            return value + HOSTILE
        case _:
            return value


def test_nothing_is_loaded_and_nothing_runs() -> None:
    text = page(make_report())
    read = Reader(text)
    assert not {name for name, _ in read.elements} & {"script", "link", "img", "iframe", "object", "base"}
    assert not {
        key for _, each in read.elements for key in each if key in ("src", "srcset") or key[:2] == "on"
    }
    assert not re.search(r"https?:|//|url\(|@import|javascript:", text)
    assert "default-src 'none'" in text


def test_every_chart_has_a_title_and_says_what_it_shows() -> None:
    read = Reader(page(make_report()))
    names = [name for name, _ in read.elements]
    charts = [place for place, name in enumerate(names) if name == "svg"]
    assert len(charts) == 1 + (2 + 4 + 2 + 4) + (2 + 4)  # `light` has no knee
    assert all(names[place + 1 : place + 3] == ["title", "desc"] for place in charts)
    assert {each.get("role") for name, each in read.elements if name == "svg"} == {"img"}


def test_the_rows_of_a_table_are_as_long_as_its_head() -> None:
    for rows in re.findall(r"<table>(.*?)</table>", page(make_report())):
        assert (
            len({len(re.findall(r"<t[hd][ >]", row)) for row in rows.split("</tr>") if row.startswith("<tr")})
            == 1
        )


PARTS = ("machines", "windows", "curves", "latencies", "lives", "diagnoses", "floods", "demands", "capacity")


@pytest.mark.parametrize("part", [*PARTS, "candidates"])
def test_a_report_without_a_part_is_a_page_without_it(part: str) -> None:
    Reader(page(replace(make_report(), **{part: ()})))


def test_a_report_of_next_to_nothing_is_a_page() -> None:
    report = replace(make_report(("shared", "peer")), **dict.fromkeys(PARTS, ()))
    bare = replace(report.verdict, access="", sentences=(), unseen=(), command="")
    read = Reader(page(replace(report, profiles={}, verdict=bare, against="demo")))
    assert "demo under load" in read.said
    assert "Not decided" in Reader(page(replace(report, against="", verdict=bare))).said


def test_curves_of_so_few_points_that_they_have_no_knee_are_told_side_by_side() -> None:
    report = make_report(profiles=("waiting",))
    curves = [
        replace(one, means={4: one.means[4]}, rates={4: one.rates[4][:1]}, efficiency={4: 1.0}, laws=())
        for one in report.curves
    ]
    read = Reader(page(replace(report, curves=curves)))
    assert figures.number(curves[1].rates[4][0]) in read.text["curve/shared/waiting"]
    assert "knee" not in read.text["curve/shared/waiting"]
    assert not any("Share of linear" in label for label in read.all("aria-label"))


def test_curves_of_one_window_each_and_knees_that_were_not_reached_are_drawn() -> None:
    report = make_report(profiles=("waiting",))
    curves = [
        replace(
            one,
            rates={workers: rates[:1] for workers, rates in one.rates.items()},
            laws=(),
            knee=replace(one.knee, at=None, low=4, high=None, between=None),
        )
        for one in report.curves
    ]
    read = Reader(page(replace(report, curves=curves)))
    row = read.text["curve/shared/waiting"]
    assert f"over {curves[0].knee.most} (from 4.0) over {2 * curves[0].knee.most}" in row


def test_of_many_units_the_fullest_are_shown_and_the_rest_together() -> None:
    report = make_report(profiles=("waiting",))
    told = Reader(page(report)).text["diagnosis/shared/waiting"]
    workers = [one for one in report.diagnoses[1].evidence.units if one.role == "worker"]
    fullest = max(workers, key=lambda one: one.ran + one.waited)
    assert f" {fullest.unit} " in told
    assert f"{len(workers) - UNITS_EACH} more workers" in told
    full = [int(share) for share in re.findall(r"waited \d+% (\d+)%", told)]
    assert full == sorted(full, reverse=True) and len(full) > 4


def test_of_many_points_of_a_candidate_that_at_its_knee_is_drawn_and_the_rest_are_named() -> None:
    report = make_report(profiles=("waiting",))
    seen = report.diagnoses[1]
    more = [replace(seen, workers=workers, rate=workers * 18.0) for workers in (2, 16, 48)]
    read = Reader(page(replace(report, diagnoses=[*report.diagnoses, *more])))
    assert f"shared, {seen.workers} workers, {seen.rate} jobs/s" in read.text["diagnosis/shared/waiting"]
    assert all(f"shared{one.workers}{figures.number(one.rate)}executor's loop" in read.said for one in more)


def test_labels_are_moved_apart_and_stay_within_bounds() -> None:
    assert spread([10, 11, 12], 15, 10, 240) == [10, 25, 40]
    moved = spread([100, 98, 99, 12, 240], 15, 10, 240)
    assert sorted(moved)[0] >= 10 and sorted(moved)[-1] <= 240
    assert all(later - one >= 15 for one, later in zip(sorted(moved), sorted(moved)[1:], strict=False))
    assert sorted(range(5), key=lambda place: moved[place]) == [3, 1, 2, 0, 4]


@pytest.mark.parametrize("most", [0, 0.003, 0.97, 1, 7, 48, 1371, 2.4e9])
def test_ticks_are_few_round_and_within_the_axis(most: float) -> None:
    told = ticks(most)
    assert 1 <= len(told) <= 7
    assert told[0] == 0 and told[-1] <= most * 1.000001


def test_of_many_sentences_the_first_are_shown_and_the_rest_is_folded() -> None:
    report = make_report()
    many = [Sentence(text=f"Sentence {number}.") for number in range(12)]
    text = page(replace(report, verdict=replace(report.verdict, sentences=many, unseen=many)))
    shown, rest = text.split("<summary>4 more</summary>")
    assert "Sentence 7." in shown and "Sentence 8." not in shown
    assert "Sentence 11." in rest.split("</details>")[0]
    assert "<summary>9 more</summary>" in rest


def test_percentiles_of_too_few_jobs_are_no_chart_and_say_so() -> None:
    report = make_report(profiles=("waiting",))
    few = [replace(one, jobs=87, planned={"p50": 109.0}) for one in report.latencies]
    read = Reader(page(replace(report, latencies=few)))
    assert not any("How long jobs take" in label for label in read.all("aria-label"))
    assert "87 jobs at 60 jobs/s tell no more than the median" in read.said
    assert "109" in read.text["latency/shared/waiting"]
    none = [replace(one, jobs=7, planned={}, sent={}, closed={}) for one in few]
    assert (
        "7 jobs at 60 jobs/s tell not even the median" in Reader(page(replace(report, latencies=none))).said
    )


def test_what_was_not_run_and_what_no_figure_is_of_is_said() -> None:
    report = make_report(profiles=("waiting",))
    assert "Not run" not in Reader(page(report)).said
    said = Reader(page(replace(report, latencies=(), diagnoses=()))).said
    assert "Not run, or nothing ended in time: how long jobs take, what bounds them." in said
    few = [replace(one, closed={"p50": 106.0}) for one in report.latencies]
    assert "–: not measured" not in Reader(page(report)).said
    assert "–: not measured" in Reader(page(replace(report, latencies=few))).said


def test_a_curve_of_one_window_without_a_law_is_drawn() -> None:
    report = make_report(profiles=("waiting",))
    one = replace(report.curves[0], rates={3: [53.8]}, means={3: 53.8}, laws=(), knee=find_knee({3: [53.8]}))
    assert fitted(one, None, "k0")


def test_the_answer_is_drawn_beside_it_from_the_curves_that_it_rests_on() -> None:
    report = make_report()
    read = Reader(page(report))
    (drawn,) = (label for label in read.all("aria-label") if "one executor keeps up with" in label)
    pool = next(one for one in report.curves if one.candidate == "pool")
    assert pool.knee.at is not None
    assert f"pool: {pool.knee.at / 2:.1f} (" in drawn  # it has two executors
    for figure in ("windows", "curve/shared/light"):
        elsewhere = Sentence(text="No.", figures=(figure,))
        few = [replace(one, means={1: one.means[1]}) for one in report.curves if one.profile == "light"]
        curves = [*(one for one in report.curves if one.profile != "light"), *few]
        verdict = replace(report.verdict, sentences=[elsewhere])
        text = page(replace(report, verdict=verdict, curves=curves))
        assert "one executor keeps up with" not in text.split("<h2")[0]


def test_of_a_machine_elsewhere_only_what_is_known_is_told() -> None:
    report = make_report()
    here, there = report.machines[0], replace(report.machines[0], name="h2", kernel="", python="", nats="")
    assert figures.machine(here).startswith("ci-1: 2 × AMD EPYC 7763, 25.2 GB, Linux 6.18.3, Python 3.11.7, ")
    bare = replace(there, disk="", sync_ms=0.0, calibration_us=())
    assert figures.machine(bare) == "h2: 2 × AMD EPYC 7763, 25.2 GB"
    assert "h2: 2 × AMD EPYC 7763, 25.2 GB." in Reader(page(replace(report, machines=[here, bare]))).said


def test_jobs_that_were_open_when_a_run_was_cut_are_told() -> None:
    counted = make_report().counted
    assert "cut" not in figures.counts(counted)
    assert "Of 3 that were open when it was cut" in figures.counts(replace(counted, open=3))
