"""What the model may leave out, and how much it lets go wrong.

`Rules` has a switch for each rule of docs/protocol.md that carries a promise; with all of them on, the model
is mvmci as it is built. `Setting` is one job and a bound on each kind of fault: what is explored is every
order in which they may strike.

Some rules have no switch. That hints and timers lie outside of a job's messages, of which none is ever
deleted singly, is how the streams are made. That a refused batch is sent again message by message saves an
attempt and no promise: a holder that took it for fencing would be gone like any other. That an effect was
interrupted needs no record, and so no rule to write one: a newer lease behind its intent says it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True)
class Rules:
    """The rules that carry the promises. Each is a sentence that holds while it is on."""

    # every write (docs/protocol.md §2)
    writes_are_compare_and_set: bool = True
    one_message_of_a_job_in_a_batch: bool = True
    silence_is_answered_by_reading: bool = True
    fencing_is_looked_at_first: bool = True  # and then, whether one's own message is there
    an_end_fences_too: bool = True  # unless it stands in one's own message
    runs_are_told_apart_by_name: bool = True  # not by their epoch
    refused_leases_read_afresh: bool = True
    own_records_are_recognised: bool = True
    after_a_cancel_only_cancelled: bool = True

    # every read (§2)
    misfits_are_ignored: bool = True  # what its writer may not say there, or says too late

    # what is on disk before what (§2)
    intents_come_first: bool = True  # they do not ride with their result
    intents_are_awaited: bool = True
    results_come_before_the_next_effect: bool = True
    interrupted_is_not_done_again: bool = True
    sleeps_end_at_their_time: bool = True
    tombstones_are_kept: bool = True

    # who takes a hint (§3)
    takers_look_for_the_end: bool = True
    takers_look_for_the_spec: bool = True
    takers_look_for_a_cancel: bool = True
    takers_look_at_the_time: bool = True
    a_live_holder_is_followed: bool = True
    a_later_delivery_leases_at_once: bool = True
    only_lost_holders_are_attempts: bool = True
    hints_are_acknowledged_after_the_end: bool = True
    the_fenced_leave_their_hint: bool = True  # to whoever fenced them

    # who looks after it (§3)
    presence_is_per_job: bool = True  # not per process
    somebody_reconciles: bool = True
    the_reconciler_looks_for_hints: bool = True


class Budget(NamedTuple):
    """How often each kind of fault, or of news from outside, may still come."""

    crash: int = 0  # a holder is gone without a word
    timeout: int = 0  # a write is not answered: it may have landed, or land later
    suspicion: int = 0  # somebody takes a live holder for dead
    lapse: int = 0  # a hint that is at work is handed out again
    loss: int = 0  # the broker forgets hints and timers
    cancel: int = 0
    drain: int = 0
    forget: int = 0  # retention goes by
    forge: int = 0  # somebody writes what he may not


NO_FAULTS = Budget()
NO_BOUND = 9  # more attempts than any setting has faults


@dataclass(frozen=True)
class Setting:
    """One job. `effects` has a letter for each: A at most once, I idempotent, S a sleep."""

    effects: str
    budget: Budget = NO_FAULTS
    attempts: int = NO_BOUND
    deadly: bool = False  # the guest kills its holder whenever it runs
    sent_twice: bool = False  # a copy of the submit is still on its way
    timed_writes: bool = False  # what waits may be written at any time, as the timers of a holder do

    def __str__(self) -> str:
        told = [
            repr(self.effects),
            *(f"{name}={count}" for name, count in self.budget._asdict().items() if count),
        ]
        for one in fields(self)[2:]:
            if getattr(self, one.name) != one.default:
                told.append(f"{one.name}={getattr(self, one.name)}")
        return " ".join(told)
