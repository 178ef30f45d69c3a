"""The benchmark's own arithmetic, and what a reader is shown of it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import picture, report
from benchmarks.compare import Outcome
from benchmarks.figures import Line, deciles, lines_table, number, percentile, spread, table, tail
from benchmarks.peers import PEERS


def outcome(rate: float) -> Outcome:
    return Outcome(
        noop=[rate, rate * 1.1, rate * 0.9],
        step=[rate / 2],
        alone=[2.0, 3.0, 50.0],
        cpu={"client": [100.0, 120.0], "server": [400.0, 500.0]},
        others=[1.0, 4.0],
        durability="fsync on",
        syncs={"fdatasync": 2.0},
    )


OUTCOMES = {
    "mvmci": outcome(4000),
    "dbos": outcome(800),
    "restate": outcome(1000),
    "celery": outcome(9000),
    "temporal": Outcome(missing="could not be installed: no <index> | answers"),
    "batches": Outcome(noop=[16_000, 16_000, 16_000], others=[1.0]),
}


@pytest.mark.parametrize(("percent", "found"), [(1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)])
def test_a_percentile_is_a_value_that_was_measured(percent: float, found: int) -> None:
    assert percentile(range(100, 0, -1), percent) == found
    assert percentile([7.0], percent) == 7.0


def test_three_digits_of_a_number_are_shown() -> None:
    assert [number(value) for value in (0.3149, 4.2, 61.04, 348.7, 3481.2, 15_530, 0)] == [
        "0.31", "4.2", "61.0", "349", "3,480", "15,500", "0",
    ]  # fmt: skip


def test_a_median_stands_with_its_spread() -> None:
    assert spread([3, 1, 2], "ms") == "2.0 ms (1.0–3.0)"
    assert spread([2.0]) == "2.0"
    assert deciles([float(value) for value in range(1, 100)]) == "50.0 (10.0–90.0)"
    assert tail([1.0] * 98 + [9.0, 10.0]) == "1.0 / 9.0"


def test_a_line_is_met_when_its_median_is_within_the_limit() -> None:
    at_most = Line(what="a", values=[1, 3, 99], unit="ms", limit=3)
    at_least = Line(what="b", values=[1, 3, 99], unit="jobs/s", limit=4, better="≥")
    free = Line(what="c", values=[1], unit="MB")
    assert (at_most.met, at_least.met, free.met) == (True, False, None)
    rows = lines_table([at_most, at_least, free]).splitlines()
    assert rows[2] == "| a | 3.0 ms (1.0–99.0) | ≤ 3.0 ms | met |  |"
    assert rows[3] == "| b | 3.0 jobs/s (1.0–99.0) | ≥ 4.0 jobs/s | **missed** |  |"
    assert rows[4] == "| c | 1.0 MB |  |  |  |"


def test_a_cell_cannot_break_its_table() -> None:
    assert table(("a", "b"), [("x|y", "z")]).splitlines()[2] == "| x\\|y | z |"
    with pytest.raises(AssertionError):
        table(("a", "b"), [("x",)])


def test_the_best_durable_peer_is_what_the_ratio_is_taken_of() -> None:
    """Not the quickest of all, which would be the one that loses jobs, nor the one that is missing."""
    jobs, times, share = report.beside_peers(OUTCOMES)
    assert list(jobs.values) == OUTCOMES["mvmci"].noop
    assert "Restate" in times.what
    assert times.values == pytest.approx([4, 4, 4])
    assert share.values == pytest.approx([50, 55, 45])  # a light job is two messages


def test_the_readme_shows_what_has_a_target_and_the_page_everything() -> None:
    lines = [Line(what="a", values=[1], unit="ms", limit=3), Line(what="b", values=[1], unit="ms")]
    facts = dict.fromkeys(("cores", "processor", "memory", "filesystem", "kernel"), "x")
    facts |= dict.fromkeys(("python", "wasmtime", "nats-server"), "1")
    short = report.promises(lines, OUTCOMES, facts, "./just bench")
    whole = report.markdown(lines, OUTCOMES, facts, "./just bench", "bench.svg")
    assert [row.split(" | ")[0] for row in short.splitlines() if "| met" in row or "missed" in row] == [
        "| light jobs, many at once through one client",
        "| the same, over the best durable peer (Restate)",
        "| a",
    ]
    assert "| b |" in whole and "| b |" not in short
    assert "`./just bench` on x cores" in short and "`./just bench` on x cores" in whole


def test_a_peer_that_is_missing_says_why() -> None:
    rows = {line.split(" | ")[0]: line for line in report.peers_table(OUTCOMES).splitlines()}
    assert rows["| Temporal, dev server on SQLite"].endswith("no <index> \\| answers |")
    assert "| Celery on Redis (not durable)" in rows
    assert "| 560: client 110, server 450 | 2.0 fdatasync | fsync on |" in rows["| Restate"]


def test_the_picture_is_an_svg_with_a_bar_for_each_peer_that_ran() -> None:
    drawn = ElementTree.fromstring(picture.draw(OUTCOMES))
    space = "{http://www.w3.org/2000/svg}"
    widths = {bar.get("class"): float(bar.get("width", "")) for bar in drawn.iter(f"{space}rect")}
    assert widths["ours"] / widths["loose"] == pytest.approx(4 / 9, rel=0.01)
    texts = {text.text for text in drawn.iter(f"{space}text")}
    assert {PEERS["mvmci"].title, PEERS["dbos"].title, "Celery on Redis, not durable"} <= texts
    assert PEERS["temporal"].title not in texts
    for mark in drawn.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(mark.get(name, "0")) <= picture.WIDTH


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_into(readme, "new")
    report.put_into(readme, "newer")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"
