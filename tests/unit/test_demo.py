"""That the demo fails when it did not show what it is about."""

from __future__ import annotations

from typing import Any

import pytest

from examples.demo_proof import missed

Records = list[dict[str, Any]]


def lease(unit: str, why: str = "recovered") -> Records:
    return [{"record": "lease", "unit": unit, "why": why}]


SPEC: Records = [{"record": "spec", "kind": "workflow"}]
INTENT: Records = [{"record": "intent", "index": 0, "kind": "http"}]
RESULT: Records = [{"record": "result", "index": 0}]
DONE: Records = [{"record": "done", "status": "succeeded"}]
BEGUN = SPEC + lease("worker-1", "first") + INTENT
ONCE = {"GET /a": 1}


def test_a_kill_inside_an_effect_after_which_another_worker_goes_on_is_the_point() -> None:
    assert missed(BEGUN + lease("worker-2") + RESULT + DONE, "worker-1", ONCE) == ""


@pytest.mark.parametrize(
    ("records", "counts", "why"),
    [
        (BEGUN + RESULT + DONE, ONCE, "nothing was taken over from it: worker-1 held the job"),
        (
            SPEC + lease("worker-3", "first") + INTENT + lease("worker-2") + RESULT + DONE,
            ONCE,
            "nothing was taken over from it: worker-3, worker-2",
        ),
        (BEGUN + lease("worker-1") + RESULT + DONE, ONCE, "took its own job again"),
        (BEGUN + RESULT + lease("worker-2") + DONE, ONCE, "between two effects"),
        (BEGUN + lease("worker-2") + RESULT + [{"record": "done", "status": "failed"}], ONCE, "not succeed"),
        (BEGUN + lease("worker-2") + RESULT + DONE, {"GET /a": 2}, "made 1 requests, and the server did"),
        (BEGUN + lease("worker-2") + RESULT + DONE, {}, "made 1 requests, and the server did"),
    ],
)
def test_a_run_that_shows_nothing_says_why(records: Records, counts: dict[str, int], why: str) -> None:
    assert why in missed(records, "worker-1", counts)
