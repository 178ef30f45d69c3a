"""Frames: what crosses a slot's socket, and what does not get across."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvmci.engines.embedded.effects.exec import Exec
from mvmci.engines.embedded.effects.http import Http
from mvmci.engines.embedded.effects.sleep import Sleep
from mvmci.jobs.effect import Value
from mvmci.sandbox import frames

TEXT = st.text(max_size=40)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple)
U32 = st.integers(0, 2**32 - 1)
REQUESTS = st.one_of(
    st.builds(
        Http, method=TEXT, url=TEXT, headers=PAIRS, body=TEXT, timeout_ms=U32, idempotent=st.booleans()
    ),
    st.builds(Exec, argv=st.lists(TEXT).map(tuple), env=PAIRS, stdin=TEXT, timeout_ms=U32),
    st.builds(Sleep, ms=st.integers(0, 2**64 - 1)),
).map(Value.fields)
FROM_SLOT = st.one_of(
    st.builds(frames.Call, request=REQUESTS),
    st.builds(frames.Log, level=st.sampled_from(["debug", "info", "warning", "error"]), message=TEXT),
    st.builds(frames.Respond, value=TEXT),
    st.builds(frames.ReportProgress, done=U32, total=U32, message=TEXT),
    st.builds(
        frames.Ended, outcome=st.sampled_from(["ok", "err", "trap"]), text=TEXT, limit=st.none() | TEXT
    ),
)


@given(st.lists(FROM_SLOT, max_size=5), st.lists(st.integers(1, 64), min_size=1))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sent, cuts):
    stream = b"".join(frames.encode(frame) for frame in sent)
    splitter, received, at, turn = frames.Splitter(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        received += [frames.to_parent.decode(body) for body in splitter.feed(stream[at : at + size])]
        at, turn = at + size, turn + 1
    assert received == sent


@given(st.binary(max_size=200))
def test_no_bytes_from_a_slot_end_in_anything_but_a_frame_or_a_refusal(data):
    try:
        for body in frames.Splitter().feed(data):
            frames.to_parent.decode(body)
    except (ValueError, msgspec.DecodeError):
        pass


def test_a_length_over_the_limit_is_refused_before_its_bytes_come():
    announced = (frames.FRAME_BYTES_MAX + 1).to_bytes(frames.LENGTH_BYTES, "little")
    with pytest.raises(ValueError, match="over the limit"):
        list(frames.Splitter().feed(announced))


def test_a_frame_over_the_limit_is_not_made():
    with pytest.raises(ValueError, match="over the limit"):
        frames.encode(frames.Respond(value="x" * frames.FRAME_BYTES_MAX))


@pytest.mark.parametrize(
    "body",
    [
        b'{"frame":"answer","now_ms":1,"value":{"kind":"slept"}}',
        b'{"frame":"command"}',
        b'{"frame":"call"}',
        b'{"frame":"call","request":[]}',
        b'{"frame":"ended","outcome":"fine"}',
        b"[]",
        b"",
        b"[" * 100_000,
    ],
)
def test_a_slot_cannot_say_what_only_its_parent_says_nor_anything_unknown(body):
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        frames.to_parent.decode(body)
