"""The level at which builds speak to each other: `mvmci.wire`, and who is in the way of the next one."""

from __future__ import annotations

import pytest

from mvmci.errors import EXIT_VERSIONS, VersionsDiffer
from mvmci.roles.leveller import behind
from mvmci.trust.registry import UnitRecord
from mvmci.wire import OLDEST, WIRE, Level, check, level_of, mark


def test_a_build_understands_the_levels_from_its_oldest_to_its_newest() -> None:
    for wire in range(OLDEST, WIRE + 1):
        check(wire, "it")
    for wire in (WIRE + 1, WIRE + 98):
        with pytest.raises(
            VersionsDiffer, match=f"the cluster is newer than this mvmci .* level {wire}"
        ) as it:
            check(wire, "the cluster")
        assert it.value.exit_code == EXIT_VERSIONS
        assert "`mvmci upgrade`" in str(it.value.hint)


def test_a_level_is_never_lowered_and_one_that_is_not_known_is_not_learnt() -> None:
    level = Level()
    level.learn(WIRE, "the cluster")
    level.learn(OLDEST, "the cluster")
    with pytest.raises(VersionsDiffer):
        level.learn(WIRE + 1, "the cluster")
    assert level.spoken == WIRE


@pytest.mark.parametrize("wire", [0, 1, 2, 99])
def test_the_id_of_a_message_says_its_level(wire: int) -> None:
    assert level_of(mark(wire, "3f2a9c")) == wire


@pytest.mark.parametrize("given", ["", "3f2a", ":a", "-1:a", "1e3:a", "²:a", f"{10**9}:a", "x:1"])
def test_what_is_no_level_is_level_0(given: str) -> None:
    assert level_of(given) == 0


def unit(wire: int, ticket: str = "t1", **more: object) -> UnitRecord:
    return UnitRecord(**{"key": "k", "role": "worker", "ticket": ticket, "wire": wire} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "records", "away", "slow"),
    [
        ({"a": 1}, {"a": unit(1)}, False, set()),
        ({"a": 0}, {}, False, {"a"}),
        ({"a": 0}, {"a": unit(1)}, False, {"a"}),  # it went back
        ({"a": 1}, {"a": unit(0)}, False, set()),  # the registry does not know yet
        ({}, {"a": unit(0)}, True, {"a"}),  # it may come back as it was
        ({}, {"a": unit(0, revoked=5)}, False, set()),
        ({}, {"a": unit(0, role="client")}, False, set()),
        ({}, {"a": unit(0, role="overseer")}, False, {"a"}),
        ({}, {"a": unit(0, ticket="")}, False, {"a"}),
        ({}, {"a": unit(0, ticket="")}, True, set()),  # `up` gives it a program of its own
        ({"a": 2, "b": 1}, {"c": unit(3)}, False, set()),
    ],
)
def test_a_level_waits_for_all_who_may_read_what_is_written_at_it(
    there: dict[str, int], records: dict[str, UnitRecord], away: bool, slow: set[str]
) -> None:
    assert behind(1, there, records, lambda _: away) == slow
