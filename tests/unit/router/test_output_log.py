"""What is read from the log of deltas is what was put into it, wherever reading begins, and costs little to keep."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.output_log import BLOCK_DELTAS, OutputLog
from stagecoach_router.sampling.outputs import Sampled

texts = st.sampled_from(["", "a", " word", "\u00e4\u2028", "\U0001f600", "\x00", "\ud800"])
token_ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(allow_nan=False)


@st.composite
def outputs(draw: st.DrawFn) -> list[OutputDelta]:
    """The deltas of a request of up to 64 completions, without or with some log-probabilities."""
    num_top = draw(st.sampled_from([None, 0, 1, 3]))
    num_deltas = draw(st.integers(0, 1000))
    some = draw(
        st.lists(
            st.tuples(
                st.integers(0, 63),
                texts,
                token_ids,
                logprobs,
                # As a rule as many for each; tokens that cannot come are left out.
                st.lists(st.tuples(token_ids, logprobs), max_size=num_top or 0).map(tuple),
                st.sampled_from([None, None, *FinishReason]),
            ),
            min_size=1,
            max_size=7,
        )
    )
    deltas = []
    for number in range(num_deltas):
        if number % 100 == 99:  # only the end of a completion
            deltas.append(OutputDelta(number % 64, "held back", None, None, FinishReason.LENGTH))
            continue
        index, text, token_id, logprob, top, reason = some[number % len(some)]
        sampled = Sampled(token_id, None if num_top is None else logprob, top)
        deltas.append(OutputDelta(index, text, token_id, sampled, reason))
    return deltas


@given(deltas=outputs(), data=st.data())
def test_it_is_a_list(deltas: list[OutputDelta], data: st.DataObject) -> None:
    log = OutputLog()
    for delta in deltas:
        log.append(delta)
    assert len(log) == len(deltas)
    assert log.read(0, len(deltas)) == deltas
    for _ in range(5):
        start, stop = data.draw(st.integers(0, len(deltas) + 300)), data.draw(st.integers(0, len(deltas) + 300))
        assert log.read(start, stop) == deltas[start:stop]


def test_who_keeps_up_gets_the_objects_that_were_put() -> None:
    """Nothing is packed and unpacked for it."""
    log = OutputLog()
    for number in range(10 * BLOCK_DELTAS):
        delta = OutputDelta(0, "x", number, Sampled(number, None, ()), None)
        log.append(delta)
        [read] = log.read(number, number + 1)
        assert read is delta


@pytest.mark.parametrize(
    ("num_deltas", "num_top", "max_bytes_each", "bytes_as_object"), [(20_000, None, 25, 200), (4000, 20, 300, 3000)]
)
def test_what_is_kept_of_a_token_is_little(
    num_deltas: int, num_top: int | None, max_bytes_each: int, bytes_as_object: int
) -> None:
    log = OutputLog()
    tracemalloc.start()
    try:
        for number in range(num_deltas):
            token_id = 1000 + number
            top = tuple((token_id + each, -0.1 * (each + number)) for each in range(num_top or 0))
            logprob = None if num_top is None else -0.5 * number
            log.append(OutputDelta(0, " word"[: number % 6], token_id, Sampled(token_id, logprob, top), None))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < num_deltas * max_bytes_each + 2 * BLOCK_DELTAS * bytes_as_object
