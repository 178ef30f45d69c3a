"""With every rule of the protocol in place no promise is broken; without any one of them its fault appears.

Every order of events is tried, not some: each setting is small, and explored to the end.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import pytest

from tests.model.log import CANCEL_IGNORED, CORRUPT, FORGED, OTHER_REQUEST, SLEPT_EARLY, TWICE_RECORDED
from tests.model.model import Model
from tests.model.promises import (
    END_TAKEN_BACK,
    KNOWING,
    NO_ATTEMPTS_LEFT,
    SENT_FOR_TWICE,
    STRANDED,
    TAKEN_ASLEEP,
    TWICE,
    TWO_REQUESTS,
    TWO_STRAYS,
    UNCOUNTED,
    wasted,
)
from tests.model.rules import Budget, Rules, Setting
from tests.model.search import Found, explore

WORLDS_MAX = 30_000

SETTINGS = [
    Setting("", Budget(crash=1, timeout=1, lapse=1)),
    Setting("", deadly=True, attempts=2),
    Setting("A", Budget(crash=1, timeout=1)),
    Setting("A", Budget(crash=1, suspicion=1), attempts=2),
    Setting("A", Budget(suspicion=1, drain=1), attempts=2),
    Setting("A", Budget(crash=1, cancel=1)),
    Setting("A", Budget(forge=1)),
    Setting("", Budget(crash=1, cancel=1, forge=1)),
    Setting("S", Budget(forge=1)),
    Setting("A", Budget(timeout=2, suspicion=1, lapse=1, cancel=1)),
    Setting("A", Budget(timeout=1, suspicion=1, drain=1)),
    Setting("A", Budget(timeout=1, suspicion=1, forget=2)),
    Setting("A", Budget(crash=1, forget=1), sent_twice=True),
    Setting("AI", Budget(timeout=2, suspicion=2)),
    Setting("AI", Budget(timeout=1, suspicion=1), timed_writes=True),
    Setting("IA", Budget(crash=1)),
    Setting("II", Budget(timeout=1, suspicion=1, lapse=1)),
    Setting("S", Budget(crash=1)),
    Setting("S", Budget(drain=1, loss=1)),
    Setting("S", Budget(drain=1, cancel=1)),
    Setting("SA", Budget(suspicion=1, cancel=1)),
]

SUSPECTED = Budget(timeout=1, suspicion=1)

FAULTS = [
    ("writes_are_compare_and_set", Setting("A", Budget(lapse=1)), TWICE),
    ("writes_are_compare_and_set", Setting("A", Budget(lapse=1)), CORRUPT),
    ("one_message_of_a_job_in_a_batch", Setting("A", Budget(lapse=1)), TWICE),
    ("silence_is_answered_by_reading", Setting("A", Budget(timeout=1, lapse=1)), TWICE),
    ("fencing_is_looked_at_first", Setting("A", Budget(timeout=1, suspicion=1, lapse=1)), TWICE),
    ("an_end_fences_too", Setting("A", Budget(timeout=1, suspicion=1, cancel=1)), KNOWING),
    ("runs_are_told_apart_by_name", Setting("A", Budget(lapse=1)), TWICE),
    ("refused_leases_read_afresh", Setting("A", Budget(suspicion=1, drain=1), attempts=1), NO_ATTEMPTS_LEFT),
    ("misfits_are_ignored", Setting("A", Budget(forge=1)), FORGED),
    ("misfits_are_ignored", Setting("A", Budget(forge=1)), CORRUPT),
    ("misfits_are_ignored", Setting("A", Budget(forge=1)), END_TAKEN_BACK),
    ("intents_come_first", Setting("A", Budget(crash=1)), TWICE),
    ("intents_are_awaited", Setting("A", Budget(crash=1)), TWICE),
    ("intents_are_awaited", Setting("II", SUSPECTED), TWO_REQUESTS),
    ("results_come_before_the_next_effect", Setting("AI", Budget(crash=1)), TWICE),
    ("results_come_before_the_next_effect", Setting("II", SUSPECTED), OTHER_REQUEST),
    ("interrupted_is_not_done_again", Setting("A", Budget(crash=1)), TWICE),
    ("sleeps_end_at_their_time", Setting("S", Budget(drain=1)), SLEPT_EARLY),
    ("tombstones_are_kept", Setting("", Budget(forget=1), sent_twice=True), END_TAKEN_BACK),
    ("takers_look_for_the_spec", Setting("", Budget(crash=1, forget=2)), CORRUPT),
    ("a_live_holder_is_followed", Setting("A", Budget(lapse=1), attempts=1), NO_ATTEMPTS_LEFT),
    ("a_later_delivery_leases_at_once", Setting("", deadly=True, attempts=2), UNCOUNTED),
    ("only_lost_holders_are_attempts", Setting("A", Budget(drain=1), attempts=1), NO_ATTEMPTS_LEFT),
    ("presence_is_per_job", Setting("A", Budget(crash=1)), STRANDED),
    ("somebody_reconciles", Setting("S", Budget(loss=1)), STRANDED),
    ("somebody_reconciles", Setting("S", Budget(crash=1)), STRANDED),
]

# A hint brings back what its holder left behind, and so does the reconciler: without both, nothing does.
TOGETHER = [
    ("hints_are_acknowledged_after_the_end", Setting("A", Budget(crash=1))),
    ("the_fenced_leave_their_hint", Setting("A", Budget(crash=1, suspicion=1))),
]

# What a writer must not write its readers ignore: without both, it counts.
WRITTEN_AND_READ = [
    ("fencing_is_looked_at_first", Setting("II", SUSPECTED), TWO_STRAYS),
    ("own_records_are_recognised", Setting("A", SUSPECTED), TWICE_RECORDED),
    ("after_a_cancel_only_cancelled", Setting("A", Budget(cancel=1)), CANCEL_IGNORED),
    ("an_end_fences_too", Setting("A", Budget(timeout=1, suspicion=1, cancel=1)), CORRUPT),
    ("takers_look_for_the_end", Setting("A", Budget(lapse=1)), END_TAKEN_BACK),
    ("takers_look_for_a_cancel", Setting("S", Budget(cancel=1)), END_TAKEN_BACK),
]

COSTS = [
    ("takers_look_at_the_time", Setting("S", Budget(lapse=1)), TAKEN_ASLEEP),
    ("the_reconciler_looks_for_hints", Setting("A"), SENT_FOR_TWICE),
]


@cache
def found(setting: Setting, *without: str, until: str = "") -> Found:
    rules = replace(Rules(), **dict.fromkeys(without, False))
    return explore(Model(setting, rules), until=until, worlds_max=WORLDS_MAX)


def assert_sound(found: Found) -> None:
    assert not found.faults, str(found)
    assert found.complete, str(found)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_with_every_rule_no_order_of_events_breaks_a_promise(setting: Setting) -> None:
    assert_sound(found(setting))


@pytest.mark.parametrize(("rule", "setting", "fault"), FAULTS, ids=str)
def test_without_a_rule_its_fault_appears(rule: str, setting: Setting, fault: str) -> None:
    without = found(setting, rule, until=fault)
    assert fault in without.faults, str(without)
    assert_sound(found(setting))


@pytest.mark.parametrize(("rule", "setting"), TOGETHER, ids=str)
def test_either_of_two_rules_keeps_a_job_from_staying_behind(rule: str, setting: Setting) -> None:
    assert STRANDED in found(setting, rule, "somebody_reconciles", until=STRANDED).faults
    assert_sound(found(setting, rule))
    assert_sound(found(setting, "somebody_reconciles"))


@pytest.mark.parametrize(("rule", "setting", "fault"), WRITTEN_AND_READ, ids=str)
def test_either_the_writer_or_its_readers_keep_what_may_not_stand_from_counting(
    rule: str, setting: Setting, fault: str
) -> None:
    without = found(setting, rule, "misfits_are_ignored", until=fault)
    assert fault in without.faults, str(without)
    assert fault not in found(setting, rule).faults
    assert fault not in found(setting, "misfits_are_ignored").faults


@pytest.mark.parametrize(("rule", "setting", "waste"), COSTS, ids=str)
def test_without_a_rule_that_saves_work_more_is_done_and_no_promise_broken(
    rule: str, setting: Setting, waste: str
) -> None:
    rules = replace(Rules(), **{rule: False})
    assert waste in explore(Model(setting, rules), promises=wasted, worlds_max=WORLDS_MAX).faults
    assert waste not in explore(Model(setting, Rules()), promises=wasted, worlds_max=WORLDS_MAX).faults
    assert_sound(found(setting, rule))


def test_every_rule_is_taken_out_by_one_of_these_tests() -> None:
    taken_out = {case[0] for case in (*FAULTS, *TOGETHER, *WRITTEN_AND_READ, *COSTS)}
    assert taken_out == {field.name for field in fields(Rules)}
