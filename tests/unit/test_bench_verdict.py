"""The verdict says what the figures say, and no more: of the access, of the machine, or of neither."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from mvmci.bench.bottleneck import Finding, tried
from mvmci.bench.curves import draw
from mvmci.bench.judged import RULE, choice
from mvmci.bench.knee import Knee
from mvmci.bench.page import page
from mvmci.bench.report import (
    Candidate,
    Ceiling,
    Counted,
    Demand,
    Diagnosis,
    Flood,
    Life,
    MachineFacts,
    Report,
    Verdict,
    Window,
)
from mvmci.bench.verdict import decide
from tests.harness.reports import make_report
from tests.unit.test_bench_bottleneck import shared
from tests.unit.test_bench_knee import WAITING

replace: Any = msgspec.structs.replace

Rates = Mapping[str, Mapping[int, Sequence[float]]]  # by candidate, workers, repetitions

EFFECTS = {
    "per-worker": [15.2, 29.4, 54.8, 85.7, 101.7],
    "peer": [15.4, 27.6, 52.4, 88.2, 117.8],
    "shared": [15.0, 28.4, 51.9, 82.3, 103.4],
}
LIGHT = {"per-worker": [1_321.0], "peer": [457.0], "shared": [394.0]}

LOOP = Finding(
    cause="loop", whose="executor", why="the loop of executor-1 ran 40% of the time and waited 41%"
)
MOVED = tried(LOOP, ("1", "2"), (341.0, 420.0), noise=0.03, others=0.0)
VAIN = tried(LOOP, ("1", "2"), (341.0, 345.0), noise=0.03, others=0.0)
PROCESSORS = Finding(cause="processors", why="the machine's processors were 93% busy")
OTHERS = Finding(cause="others", why="other programs took 30% of the machine")
GENERATOR = Finding(cause="generator", why="what makes the load ran 90% of the time")


def repeated(rates: Mapping[str, Sequence[float]], points: Sequence[int], noise: float = 0.01) -> Rates:
    """Each rate measured four times."""
    return {
        name: {
            n: [rate * (1 + noise * off) for off in (-1, 1, -0.5, 0.5)]
            for n, rate in zip(points, each, strict=False)
        }
        for name, each in rates.items()
    }


def candidate(name: str) -> Candidate:
    executors = {"per-worker": 0, "pool": 2}.get(name, 1)
    return Candidate(
        name=name,
        file=f"topologies/{name}.yaml",
        access=name,
        slots=2,
        executors=executors,
        executor_slots=64,
    )


def reported(
    rates: Mapping[str, Rates],
    findings: Mapping[str, Sequence[Finding]] | None = None,
    **more: Any,
) -> Report:
    """A report of those rates, by profile; all findings of a candidate were made at each of its points."""
    names = list(dict.fromkeys(name for each in rates.values() for name in each))
    candidates = more.pop("candidates", [candidate(name) for name in names])
    windows = [
        Window(
            number=0,
            candidate=name,
            profile=profile,
            workers=workers,
            loop="closed",
            at_once=4 * workers,
            began_s=0,
            seconds=1_000.0,
            ended=round(rate * 1_000),
        )
        for profile, by_name in rates.items()
        for name, by_workers in by_name.items()
        for workers, each in by_workers.items()
        for rate in each
    ]
    diagnoses = [
        Diagnosis(
            candidate=name,
            profile=profile,
            workers=workers,
            rate=each[0],
            evidence=shared(executor={"ran": 0.55}),
            findings=(findings or {}).get(name, ()),
        )
        for profile, by_name in rates.items()
        for name, by_workers in by_name.items()
        for workers, each in by_workers.items()
    ]
    given: dict[str, Any] = {
        "mvmci": "0.1",
        "command": "mvmci bench topologies/*.yaml",
        "at": "2026-07-01T10:00:00Z",
        "budget_s": 900.0,
        "took_s": 880.0,
        "machines": [
            MachineFacts(
                name="here",
                processors=2,
                model="EPYC",
                memory_bytes=24 << 30,
                kernel="6.18",
                python="3.11",
                nats="2.15",
            )
        ],
        "candidates": candidates,
        "profiles": dict.fromkeys(rates, ""),
        "windows": windows,
        "curves": draw(candidates, windows, diagnoses),
        "diagnoses": diagnoses,
        "without_knee": [one for one in rates if one == "light"],
        "counted": Counted(submitted=1, ended_once=1, lost=0, twice=0, in_windows=1, heard=1),
    }
    return Report(**(given | more))


def text_of(verdict: Verdict) -> str:
    return "\n".join(one.text for one in [*verdict.sentences, *verdict.unseen])


def with_knees(knees: Mapping[str, tuple[float | None, float, float | None]]) -> Report:
    """`waiting`, with these knees and their intervals instead of those of the windows."""
    report = reported({"waiting": WAITED}, {"shared": [MOVED], "peer": [MOVED], "per-worker": [PROCESSORS]})
    given = [
        replace(
            one,
            knee=Knee(at=at, low=low, high=high, between=(16, 24) if at else None, most=48),
        )
        for one in report.curves
        for at, low, high in [knees[one.candidate]]
    ]
    return replace(report, curves=given)


def alike(report: Report, share: float = 1.0) -> list[Any]:
    """Its curves, but `shared` does so much of what the control does."""
    control = next(one for one in report.curves if one.candidate == "per-worker")
    means = {n: share * rate for n, rate in control.means.items()}
    return [replace(one, means=means) if one.candidate == "shared" else one for one in report.curves]


NINE = [1, 2, 4, 8, 12, 16, 24, 32, 48]
WAITED = repeated({name: rates for name, (rates, _) in WAITING.items()}, NINE)


EFFECTED = repeated(EFFECTS, [1, 2, 4, 8, 16], noise=0.05)
CONTROL_KNEE = (25.2, 24.2, 25.9)
MEASURED = {"per-worker": CONTROL_KNEE, "shared": (16.3, 5.7, 19.4), "peer": (11.1, 9.5, 16.0)}


def test_an_executor_that_bends_before_the_control_by_its_own_loop_is_left_in_production() -> None:
    verdict = decide(with_knees(MEASURED))
    assert (verdict.access, verdict.candidate) == ("per-worker", "per-worker")
    assert verdict.command == "mvmci plan topologies/per-worker.yaml && mvmci up topologies/per-worker.yaml"
    first = verdict.sentences[0]
    assert first.text == (
        "Use `per-worker` for production, where each worker has an engine of its own: one executor keeps up "
        "with only so many workers of 2 slots: 16 (`shared`) and 11 (`peer`)."
    )
    assert set(first.figures) == {"curve/shared/waiting", "curve/peer/waiting"}
    text = text_of(verdict)
    assert (
        "`waiting`: throughput grows with the workers of 2 slots, to within a tenth, up to 16.3 (5.7–19.4) "
        "with `shared` (33 jobs at once, 276 jobs/s) and 11.1 (9.5–16.0) with `peer` (22 jobs at once, 189 "
        "jobs/s); with `per-worker`, where nothing is shared, up to 25.2 (24.2–25.9)."
    ) in text
    assert "is the loop of the executor" in text
    assert "Confirmed: raising executors from 1 to 2 moved it: 341.0 → 420.0 jobs/s." in text
    assert "By the study's rule, 5 to 20 workers for one executor: `per-worker` for production." in text
    assert "`shared` and `peer` may stay where fewer workers are enough." in text


def test_where_all_bend_together_the_machine_is_named_and_no_access() -> None:
    demands = [
        Demand(
            candidate="shared",
            profile="effects",
            workers=16,
            cpu_ms=20.0,
            worker_bytes=1,
            executor_bytes=1,
            broker_bytes=1,
        )
    ]
    report = reported({"effects": EFFECTED}, {name: [PROCESSORS] for name in EFFECTS}, demands=demands)
    verdict = decide(report)
    assert (verdict.access, verdict.candidate, verdict.command) == ("", "", "")
    assert verdict.sentences[0].text == (
        "No verdict about the access: what ended first, with `per-worker` as with the others, was this "
        "machine's processors."
    )
    text = text_of(verdict)
    assert (
        "Where `per-worker` bends together with `peer` and `shared`, it is not an executor that ends." in text
    )
    assert "of what `per-worker` does (102 jobs/s): `peer` 1.2, `shared` with no difference seen." in text
    assert (
        "The knee of an executor alone was not reached. Calculated, and not measured, the loop of one is "
        "full at 203 jobs/s with `peer` (4.9 ms of it a job with 16 workers, the work of 13) and 179 jobs/s "
    ) in text
    assert "By the study's rule" not in text
    assert (
        "How many workers one executor of `peer` and `shared` carries by itself. It takes executors on a "
        "machine of their own (`runtime: ssh`), with 6 or more processors in all."
    ) in [one.text for one in verdict.unseen]


def test_what_bends_before_the_control_for_another_reason_is_not_blamed_on_the_access() -> None:
    report = with_knees(MEASURED)
    for found, named in (
        (PROCESSORS, "this machine's processors"),
        (OTHERS, "what other programs left of this machine"),
        (GENERATOR, "the program that makes the load"),
        (
            Finding(cause="quota", whose="executor", why="held"),
            "a limit on the processor time of the executor",
        ),
        (Finding(cause="loop", whose="broker", why="full"), "the loop of the broker"),
    ):
        rows = [replace(one, findings=[found, LOOP]) for one in report.diagnoses]
        verdict = decide(replace(report, diagnoses=rows))
        assert verdict.access == verdict.command == ""
        assert verdict.sentences[0].text.startswith(
            "No verdict about the access: `shared` and `peer` bend first, and what ended, with 24 "
            f"workers, was {named}"
        )
        assert "That says nothing of the access." in text_of(verdict)
        assert "By the study's rule" not in text_of(verdict)


def test_what_was_full_with_one_that_bends_first_is_told_before_that_nothing_was_with_another() -> None:
    report = with_knees(MEASURED)
    full = {"peer": [PROCESSORS], "shared": []}
    rows = [replace(one, findings=full.get(one.candidate, [])) for one in report.diagnoses]
    assert decide(replace(report, diagnoses=rows)).sentences[0].text == (
        "No verdict about the access: `shared` and `peer` bend first, and what ended, with 12 workers, was "
        "this machine's processors."
    )


def test_what_would_show_it_is_what_was_in_the_way() -> None:
    report = with_knees(MEASURED)
    rows = [replace(one, findings=[OTHERS]) for one in report.diagnoses]
    unseen = [one.text for one in decide(replace(report, diagnoses=rows)).unseen]
    assert unseen[0] == (
        "How many workers one executor of `shared` and `peer` carries by itself. It takes a machine on which "
        "nothing else runs."
    )


def test_what_was_raised_in_vain_is_unclear_and_gives_no_verdict() -> None:
    report = with_knees(MEASURED)
    rows = [replace(one, findings=[VAIN]) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert verdict.access == ""
    assert verdict.sentences[0].text == (
        "No verdict about the access: what bounds `shared` and `peer` is unclear."
    )
    assert "raising executors from 1 to 2 moved nothing (341.0 → 345.0 jobs/s)" in text_of(verdict)


def test_what_was_not_raised_is_said_not_to_be_confirmed() -> None:
    report = with_knees(MEASURED)
    rows = [replace(one, findings=[LOOP]) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert verdict.access == "per-worker"
    assert "Not confirmed: it was not raised." in text_of(verdict)


def test_without_the_control_nobody_can_tell_executor_from_machine() -> None:
    report = with_knees(MEASURED)
    verdict = decide(
        replace(
            report,
            curves=[one for one in report.curves if one.candidate != "per-worker"],
            candidates=[one for one in report.candidates if one.access != "per-worker"],
        )
    )
    assert verdict.access == verdict.command == ""
    assert verdict.sentences[0].text == (
        "No verdict about the access: `per-worker` was not measured beside `shared` and `peer`."
    )
    assert "cannot be told without `per-worker` beside `shared` and `peer`." in text_of(verdict)


def test_an_interval_across_twenty_says_both_and_which_measurement_decides() -> None:
    report = with_knees(MEASURED | {"shared": (20.5, 17.0, 23.0)})
    verdict = decide(report)
    assert verdict.access == ""
    assert verdict.command == "mvmci bench topologies/shared.yaml --profile waiting --workers 1,20"
    asked = {"waiting": ["--module", "my build.wasm"]}
    assert (
        "shared.yaml --module 'my build.wasm' --workers 1,20" in decide(replace(report, asked=asked)).command
    )
    assert verdict.sentences[0].text.startswith("No verdict yet: ")
    rule = next(one.text for one in verdict.sentences if "Or, " in one.text)
    assert rule == (
        "By the study's rule, 5 to 20 workers for one executor: `per-worker` for production. Or, 20 or more: "
        "`shared` may stay, within limits. The interval allows both, and 20 workers would decide, "
        "if `per-worker` still grows there: `mvmci bench topologies/shared.yaml --profile waiting "
        "--workers 1,20`."
    )


def test_an_interval_across_five_leaves_the_access_as_it_is() -> None:
    verdict = decide(with_knees(MEASURED | {"shared": (6.0, 4.0, 9.0)}))
    assert verdict.access == "per-worker"
    assert "under 5 workers for one executor: `per-worker` now" in text_of(verdict)
    assert "5 workers would decide" in text_of(verdict)


@pytest.mark.parametrize(
    ("knee", "says"),
    [((3.0, 2.5, 3.5), "`pool` where the engine is the dear part"), ((7.0, 6.0, 9.0), "for production")],
)
def test_the_rule_below_twenty_is_the_studys(knee: tuple[float, float, float], says: str) -> None:
    verdict = decide(with_knees(MEASURED | {"shared": knee, "peer": knee}))
    assert verdict.access == "per-worker"
    assert says in text_of(verdict)


def test_an_executor_that_keeps_up_with_twenty_may_stay() -> None:
    verdict = decide(
        with_knees({"per-worker": (44, 43, 46), "shared": (30.0, 26.0, 33.0), "peer": (11, 9, 14)})
    )
    assert (verdict.access, verdict.candidate) == ("shared", "shared")
    assert verdict.sentences[0].text == (
        "`shared` may stay: one executor keeps up with at least 26 workers of 2 slots."
    )
    assert verdict.command.endswith("mvmci up topologies/shared.yaml")


def test_an_executor_that_kept_up_with_twenty_did_so_whatever_ended_then() -> None:
    report = with_knees({"per-worker": (33, 30, 36), "shared": (32, 28, 36), "peer": (11, 9, 14)})
    report = replace(report, curves=alike(report))
    rows = [replace(one, findings=[PROCESSORS]) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert verdict.access == "shared"
    text = text_of(verdict)
    assert "Where `per-worker` bends together with `shared`, it is not an executor that ends." in text
    assert "By the study's rule, 20 or more workers for one executor: `shared` may stay" in text


def test_where_nothing_bends_an_executor_carries_at_least_so_many() -> None:
    straight = {"per-worker": [15.0 * n for n in (1, 2, 4, 8)], "shared": [14.9 * n for n in (1, 2, 4, 8)]}
    verdict = decide(reported({"waiting": repeated(straight, [1, 2, 4, 8])}))
    assert verdict.access == ""
    text = text_of(verdict)
    assert "up to over 8 with `shared` (16 jobs at once, 119 jobs/s); with" in text
    assert "Where the curve of `shared` bends: more workers, or more windows, would show it." in text
    many = {name: [rates[0] * n for n in (1, 8, 24)] for name, rates in straight.items()}
    assert decide(reported({"waiting": repeated(many, [1, 8, 24])})).access == "shared"


def test_of_a_pool_an_executor_carries_its_part() -> None:
    pool = replace(with_knees(MEASURED), candidates=[candidate("per-worker"), candidate("pool")])
    curves = [replace(one, candidate="pool") if one.candidate == "shared" else one for one in pool.curves]
    rows = [replace(one, candidate="pool") if one.candidate == "shared" else one for one in pool.diagnoses]
    verdict = decide(replace(pool, curves=curves, diagnoses=rows))
    assert verdict.access == "per-worker"
    text = text_of(verdict)
    assert "with `pool` (33 jobs at once, 276 jobs/s, for each executor 2.9 workers at least)" in text
    assert "under 5 workers" not in text.partition("Or, ")[2]
    assert verdict.sentences[0].text.endswith("with only so many workers of 2 slots: 8 (`pool`).")


def test_what_was_seen_of_several_is_told_of_each() -> None:
    full = replace(PROCESSORS, why="the machine's processors were 99% busy")
    report = with_knees(MEASURED)
    rows = [
        replace(one, findings=[full if one.candidate == "peer" else PROCESSORS]) for one in report.diagnoses
    ]
    text = text_of(decide(replace(report, diagnoses=rows)))
    assert (
        "this machine's processors: `shared`: the machine's processors were 93% busy; `peer`: the machine's "
        "processors were 99% busy. Not confirmed: these are all that there are."
    ) in text


def test_of_those_that_bend_with_the_control_only_they_are_named() -> None:
    report = with_knees(MEASURED | {"per-worker": (11.0, 9.0, 13.0), "shared": (10.0, 8.0, 12.0)})
    rows = [replace(one, findings=[PROCESSORS]) for one in report.diagnoses]
    control = next(one for one in report.curves if one.candidate == "per-worker")
    curves = [
        replace(
            one,
            means=control.means if one.candidate == "shared" else {n: r / 2 for n, r in one.means.items()},
        )
        if one is not control
        else one
        for one in report.curves
    ]
    first = decide(replace(report, diagnoses=rows, curves=curves)).sentences[0].text
    assert first.endswith("with `per-worker` as with `shared`, was this machine's processors.")


@pytest.mark.parametrize(("share", "said"), [(0.07, True), (0.01, False)])
def test_what_clusters_take_that_wait_for_their_turn_is_told(share: float, said: bool) -> None:
    report = with_knees(MEASURED)
    rows = [replace(one, evidence=replace(one.evidence, beside=share)) for one in report.diagnoses]
    unseen = [one.text for one in decide(replace(report, diagnoses=rows)).unseen]
    told = (
        "How far each goes with the machine to itself: the clusters that waited for their turn took 7% of "
        "it, so all knees are further to the left. It is the same for all that are compared, and less with "
        "fewer files at a time."
    )
    assert [one for one in unseen if "waited for their turn" in one] == [told] * said


def test_light_tells_the_detour_as_a_ratio_of_rates_and_as_the_time_of_a_job_alone() -> None:
    lives = [
        Life(
            candidate=name,
            profile="light",
            workers=1,
            alone=True,
            jobs=100,
            parts={"queue": 0.9, "order": order, "guest": 1.0},
        )
        for name, order in (("per-worker", 0.0), ("shared", 1.0))
    ]
    rates = repeated({name: LIGHT[name] for name in ("per-worker", "shared")}, [1])
    report = reported({"light": rates}, lives=lives)
    (told,) = [one for one in decide(report).sentences if one.text.startswith("`light`")]
    assert told.text == (
        "`light`, with 1 worker, of what `per-worker` does (1,321 jobs/s): `shared` 0.30; one job alone "
        "takes 2.9 ms instead of 1.9: that is what the way to the engine costs."
    )
    assert told.figures == ["curve/shared/light", "curve/per-worker/light"]
    assert decide(report).sentences[0].text == (
        "No verdict about the access: nothing that was run shows what an executor carries, and `--profile "
        "waiting` does."
    )


def test_a_profile_that_shows_the_machine_does_not_take_back_what_waiting_shows() -> None:
    both = {"effects": EFFECTED, "waiting": WAITED}
    report = reported(both)
    rows = [
        replace(
            one,
            findings=[PROCESSORS] if one.profile == "effects" or one.candidate == "per-worker" else [MOVED],
        )
        for one in report.diagnoses
    ]
    knees = {one.candidate: one.knee for one in with_knees(MEASURED).curves}
    curves = [
        replace(one, knee=knees[one.candidate]) if one.profile == "waiting" else one for one in report.curves
    ]
    verdict = decide(replace(report, curves=curves, diagnoses=rows))
    assert verdict.access == "per-worker"
    effects = [one.text for one in verdict.sentences if "`effects`" in one.text]
    assert len(effects) == 1


def test_a_full_loop_is_no_knee_of_the_executor_where_the_control_bends_with_it() -> None:
    """Behind a machine that is full the executor's loop waits for a processor, and looks full itself."""
    report = reported({"effects": EFFECTED}, {"shared": [LOOP], "peer": [MOVED], "per-worker": [PROCESSORS]})
    assert all(one.ceiling is not None for one in report.curves)
    verdict = decide(report)
    assert verdict.access == ""
    assert "The knee of an executor alone was not reached." in text_of(verdict)
    assert "with `per-worker` as with the others, was this machine's processors" in verdict.sentences[0].text


def test_what_cannot_be_told_from_the_control_is_not_said_to_bend_with_it() -> None:
    """Of few windows: the executor's loop was raised and moved, and it does much less than the control."""
    knees = {"per-worker": (18.5, 1.5, None), "shared": (8.8, 1.6, 14.6), "peer": (9.0, 1.6, 15.0)}
    verdict = decide(with_knees(knees))
    assert (verdict.access, verdict.command) == ("", "mvmci bench topologies/*.yaml")
    assert verdict.sentences[0].text == (
        "No verdict about the access: what was measured does not tell `shared` and `peer` from `per-worker`, "
        "where nothing is shared."
    )
    text = text_of(verdict)
    assert "bend together" not in text
    assert (
        "What bounds `shared` with 12 workers and `peer` with 12 workers is the loop of the executor" in text
    )
    assert "It takes more windows, which a longer --budget has, or a quieter machine." in text


def test_what_ended_is_told_even_where_it_is_not_known_whether_an_executor_did_before() -> None:
    report = with_knees(
        {"per-worker": (17.8, 10.5, 22.1), "shared": (11.1, 8.3, 15.9), "peer": (11.5, 8.4, 25.2)}
    )
    rows = [replace(one, findings=[PROCESSORS]) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert (verdict.access, verdict.command) == ("", "")
    assert verdict.sentences[0].text == (
        "No verdict about the access: what ended, with 12 workers, was this machine's processors, and "
        "whether an executor did before is not known."
    )
    assert "It takes executors on a machine of their own" in verdict.unseen[0].text


def test_of_what_bends_but_may_not_the_rule_says_nothing() -> None:
    report = with_knees(dict.fromkeys(MEASURED, (5.0, 1.1, None)))
    rows = [replace(one, findings=[PROCESSORS]) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert (verdict.access, verdict.command) == ("", "")
    assert verdict.sentences[0].text.endswith("and whether an executor did before is not known.")
    assert "By the study's rule" not in text_of(verdict)


def test_what_does_much_less_than_the_control_does_not_bend_with_it_however_alike_their_knees() -> None:
    report = with_knees(MEASURED | {"per-worker": (11.0, 9.0, 13.0), "shared": (10.0, 8.0, 12.0)})
    assert "Where `per-worker` bends together with `shared`" in text_of(
        decide(replace(report, curves=alike(report)))
    )
    assert "That does not tell `shared` and `peer` from `per-worker`." in text_of(
        decide(replace(report, curves=alike(report, 0.8)))
    )


def test_what_is_found_further_on_says_what_bounds_a_curve_that_bends_slowly() -> None:
    report = with_knees(MEASURED)
    rows = [replace(one, findings=one.findings if one.workers >= 32 else []) for one in report.diagnoses]
    verdict = decide(replace(report, diagnoses=rows))
    assert verdict.access == "per-worker"
    assert "What bounds `shared` with 32 workers and `peer` with 32 workers is the loop" in text_of(verdict)


def test_waiting_speaks_before_other_profiles() -> None:
    waiting = with_knees(MEASURED)
    others = with_knees({"per-worker": (44, 43, 46), "shared": (30, 26, 33), "peer": (30, 26, 33)})
    named = {"curves": "cpu", "diagnoses": "cpu", "windows": "cpu"}
    both = {
        part: [
            *(replace(one, profile=profile) for one in getattr(others, part)),
            *getattr(waiting, part),
        ]
        for part, profile in named.items()
    }
    verdict = decide(replace(waiting, profiles={"cpu": "", "waiting": ""}, **both))
    assert verdict.access == "per-worker"
    assert verdict.sentences[1].text.startswith("`waiting`")


def test_an_access_of_one_executor_decides_and_not_a_pool_beside_it() -> None:
    report = with_knees(MEASURED | {"per-worker": (47.0, 46.0, 48.0), "peer": (42.0, 41.0, 43.0)})
    candidates = [
        replace(one, name="pool", access="pool", executors=2) if one.name == "peer" else one
        for one in report.candidates
    ]
    curves = [replace(one, candidate="pool") if one.candidate == "peer" else one for one in report.curves]
    rows = [replace(one, candidate="pool") if one.candidate == "peer" else one for one in report.diagnoses]
    verdict = decide(replace(report, candidates=candidates, curves=curves, diagnoses=rows))
    assert verdict.access == "per-worker"
    assert "20 or more workers for one executor: `pool` may stay" in text_of(verdict)


def test_no_ceiling_is_told_of_an_executor_whose_own_knee_was_measured() -> None:
    report = with_knees(MEASURED)
    top = Ceiling(workers=24, loop_ms=2.0, rate=500.0, workers_at_most=26.0)
    given = [replace(one, ceiling=top) for one in report.curves]
    assert "Calculated" not in text_of(decide(replace(report, curves=given)))


def test_failures_are_named_with_what_the_kernel_ended() -> None:
    memory = Finding(
        cause="memory", why="the kernel ended 52 processes for want of memory, and 39 jobs failed"
    )
    report = with_knees(MEASURED)
    windows = [
        replace(one, failed=1) if one.candidate == "shared" and one.workers == 8 else one
        for one in report.windows
    ]
    rows = [
        replace(one, findings=[memory, MOVED]) if one.candidate == "shared" else one
        for one in report.diagnoses
    ]
    verdict = decide(replace(report, windows=windows, diagnoses=rows))
    second = verdict.sentences[1]
    assert second.text.startswith("`shared`, `waiting`: 4 of ")
    assert second.text.endswith("the kernel ended 52 processes for want of memory, and 39 jobs failed.")
    assert second.figures == ["windows", "diagnosis/shared/waiting"]
    without = decide(replace(report, diagnoses=rows)).sentences[1].text
    assert without.startswith("`shared`, `waiting`: the kernel ended 52 processes")


def test_where_too_many_jobs_failed_nothing_is_concluded() -> None:
    report = with_knees({"per-worker": (44, 43, 46), "shared": (30.0, 26.0, 33.0), "peer": (30, 26, 33)})
    assert decide(report).access == "shared"
    for name, access in (("shared", "peer"), ("per-worker", "")):
        windows = [
            replace(one, failed=one.ended // 50) if one.candidate == name else one for one in report.windows
        ]
        assert decide(replace(report, windows=windows)).access == access
    assert decide(replace(report, windows=windows)).sentences[0].text == (
        "No verdict about the access: too many jobs failed."
    )


def test_windows_with_something_against_them_give_no_verdict() -> None:
    report = with_knees(MEASURED)
    for share, access in ((0.4, "per-worker"), (0.6, "")):
        marked = round(share * len(report.windows))
        windows = [
            replace(one, marks=["other programs took much"], others=0.4 + place / 1_000)
            if place < marked
            else one
            for place, one in enumerate(report.windows)
        ]
        verdict = decide(replace(report, windows=windows))
        assert verdict.access == access
    assert verdict.sentences[0].text == (
        "These figures are worth little, so nothing is concluded: other programs took 40% to 46% of the "
        "machine in most of 65 of 108 windows."
    )
    assert verdict.command == report.command
    assert "By the study's rule" not in text_of(verdict)
    slow = [replace(one, marks=["the processor was 20% slower"]) for one in report.windows]
    assert "as against the last: the processor was 20% slower" in (
        decide(replace(report, windows=slow)).sentences[0].text
    )


def test_noise_is_not_told_as_what_the_way_costs() -> None:
    rates = repeated({"per-worker": [1_000.0], "shared": [900.0], "peer": [880.0]}, [1], noise=0.2)
    text = text_of(decide(reported({"light": rates})))
    assert "of what `per-worker` does (1,000 jobs/s): `shared` and `peer` with no difference seen" in text
    rates = repeated({"per-worker": [1_000.0], "shared": [900.0], "peer": [880.0]}, [1], noise=0.005)
    assert "jobs/s): `shared` 0.90, `peer` 0.88" in text_of(decide(reported({"light": rates})))


def test_it_is_told_for_the_number_of_workers_that_the_file_has() -> None:
    report = with_knees(MEASURED)
    own = replace(report, candidates=[replace(one, workers=3) for one in report.candidates])
    text = text_of(decide(own))
    assert "With 3 workers, as the file has, of what `per-worker` does (58.0 jobs/s): `shared` and " in text
    assert (
        "may stay where fewer workers are enough, as with the 3 of the file of `shared` and `peer`." in text
    )
    beyond = replace(report, candidates=[replace(one, workers=60) for one in report.candidates])
    assert "60" not in text_of(decide(beyond))


def test_slots_that_were_added_for_it_are_to_be_added_to_the_file() -> None:
    report = with_knees({"per-worker": (44, 43, 46), "shared": (30.0, 26.0, 33.0), "peer": (11, 9, 14)})
    changed = ["executors.slots: 64 instead of 4", "broker.listen: port 4300"]
    candidates = [replace(one, changed=changed) for one in report.candidates]
    assert decide(replace(report, candidates=candidates)).sentences[-1].text == (
        "What was measured had executors.slots: 64 instead of 4: let the file have the same, or that ends "
        "first."
    )


def test_of_a_run_that_was_cut_it_is_said_that_less_is_known() -> None:
    for report in (with_knees(MEASURED), replace(with_knees(MEASURED), against="demo")):
        verdict = decide(replace(report, cut="it was interrupted"))
        assert verdict.sentences[1].text.startswith("Not all was measured: it was interrupted. ")


def test_jobs_that_were_lost_are_told_before_any_speed() -> None:
    counted = Counted(submitted=9, ended_once=7, lost=1, twice=1, in_windows=9, heard=9)
    verdict = decide(replace(with_knees(MEASURED), counted=counted))
    assert "1 jobs were lost and 1 ended twice" in verdict.sentences[1].text


def test_many_at_once_is_told_in_one_sentence_or_by_what_went_wrong() -> None:
    floods = [
        Flood(
            candidate=name,
            profile="waiting",
            workers=4,
            jobs=jobs,
            seconds=5,
            succeeded=jobs,
            failed=0,
            lost=0,
            twice=0,
        )
        for name in ("per-worker", "shared")
        for jobs in (100, 500, 1_000)
    ]
    report = with_knees(MEASURED)
    assert (
        "100, 500 and 1,000 jobs at once on `per-worker` and `shared`: by their journals each ended once, "
        "and none was lost."
    ) in text_of(decide(replace(report, floods=floods)))
    floods[1] = replace(floods[1], lost=3)
    text = text_of(decide(replace(report, floods=floods)))
    assert "`per-worker`, 500 `waiting` jobs at once: by their journals 3 were lost" in text
    assert "none was lost" not in text


def test_so_many_workers_pay_only_for_jobs_that_last() -> None:
    (told,) = [one for one in decide(with_knees(MEASURED)).sentences if "Kubernetes" in one.text]
    assert "1,000 workers of 2 slots pay only for jobs of at least 3.4 s" in told.text
    assert told.figures == ["capacity/peer/waiting"]


def test_a_control_without_a_file_says_what_to_change_in_one() -> None:
    report = with_knees(MEASURED)
    candidates = [replace(one, file="") if one.access == "per-worker" else one for one in report.candidates]
    order = sorted(candidates, key=lambda one: one.name != "shared")
    verdict = decide(replace(report, candidates=order))
    assert verdict.sentences[-1].text.startswith("In topologies/shared.yaml set `access: per-worker`")
    assert verdict.command == "mvmci plan topologies/shared.yaml && mvmci up topologies/shared.yaml"


def test_a_file_whose_name_has_a_space_can_be_pasted() -> None:
    report = with_knees(MEASURED)
    candidates = [replace(one, file=f"my files/{one.name}.yaml") for one in report.candidates]
    verdict = decide(replace(report, candidates=candidates))
    assert verdict.command == "mvmci plan 'my files/per-worker.yaml' && mvmci up 'my files/per-worker.yaml'"


def test_of_a_cluster_that_is_up_it_says_what_it_cannot_know() -> None:
    rates = repeated({"demo": [77.1]}, [4])
    report = reported(
        {"waiting": rates}, {"demo": [LOOP]}, candidates=[replace(candidate("shared"), name="demo")]
    )
    verdict = decide(replace(report, against="demo"))
    assert verdict.access == verdict.command == ""
    text = text_of(verdict)
    assert "4 workers of 2 slots did 77.1 jobs/s" in text
    assert "what seems to bound it is the loop of the executor" in text
    assert "By the study's rule" not in text
    assert "whether that is the executor or the machine" in verdict.unseen[0].text
    assert "worth little" not in text
    windows = [replace(one, marks=["others took 20%"]) for one in report.windows]
    assert "worth little" in decide(replace(report, against="demo", windows=windows)).sentences[1].text


def test_one_machine_shows_no_network_and_windows_that_stayed_marked_are_told() -> None:
    report = with_knees(MEASURED)
    windows = [replace(one, marks=["others took 20%"]) if one.workers == 8 else one for one in report.windows]
    unseen = [one.text for one in decide(replace(report, windows=windows)).unseen]
    assert any("12 of 108 windows count" in one for one in unseen)
    assert any("What a network between machines costs" in one for one in unseen)
    (machine,) = report.machines
    two = replace(report, machines=[replace(machine, hosts=[host]) for host in ("a", "b")])
    assert not any("network between machines" in one.text for one in decide(two).unseen)


def test_each_sentence_of_the_full_report_leads_to_figures_that_are_on_the_page() -> None:
    report = make_report()
    verdict = decide(report)
    there = page(replace(report, verdict=verdict))
    ids = set(re.findall(r' id="([^"]+)"', there))
    named = {figure for one in [*verdict.sentences, *verdict.unseen] for figure in one.figures}
    assert named
    assert named <= ids


@pytest.mark.parametrize(
    "part",
    ["windows", "curves", "lives", "diagnoses", "floods", "demands", "capacity", "machines", "latencies"],
)
def test_a_report_without_a_part_has_a_verdict_without_it(part: str) -> None:
    for report in (make_report(), with_knees(MEASURED)):
        verdict = decide(replace(report, **{part: []}))
        assert verdict.sentences
        assert all(one.text.endswith(".") for one in [*verdict.sentences, *verdict.unseen])
    if part in ("curves", "diagnoses"):
        assert verdict.access == ""
    if part == "diagnoses":
        assert verdict.sentences[0].text.endswith(
            "`shared` and `peer` bend first, and nothing was seen to be full."
        )


def test_candidates_that_were_not_measured_with_as_many_workers_are_not_compared() -> None:
    rates = {"per-worker": {1: [1_000.0] * 3, 2: [1_001.0] * 3}, "shared": {3: [900.0] * 3, 6: [910.0] * 3}}
    report = reported({"light": rates, "effects": rates}, {"shared": [PROCESSORS]})
    text = text_of(decide(report))
    assert "of what `per-worker` does" not in text


def test_the_boundaries_of_the_rule_are_the_studys() -> None:
    assert [one.least for one in RULE] == [20, 5, 0]
    assert [choice(workers).range for workers in (0.5, 4.9, 5, 19.9, 20, 500)] == [
        "under 5",
        "under 5",
        "5 to 20",
        "5 to 20",
        "20 or more",
        "20 or more",
    ]
