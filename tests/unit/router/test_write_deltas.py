"""What a response holds that carries several deltas: all of it, in order, one completion to a response."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach.errors import OutOfRange
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES
from stagecoach.sampling_params import SamplingParams
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_router.frontend.convert import check_answer_size, write_deltas
from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled


class Tokens:
    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"


def delta(index: int, token_id: int, *, logprobs: bool = False) -> OutputDelta:
    sampled = Sampled(token_id, -0.5 if logprobs else None, ((token_id, -0.5), (9, -1.0)) if logprobs else ())
    return OutputDelta(index, f"t{token_id} ", token_id, sampled, None)


def write(*deltas: OutputDelta, logprobs: int | None = None) -> list[pb.GenerateResponse]:
    state = RequestState(Request("r", (1,), SamplingParams(max_tokens=9, logprobs=logprobs)))
    tokenizer: Any = Tokens()
    return write_deltas(deltas, state, tokenizer)


def test_pieces_that_waited_share_a_response() -> None:
    [response] = write(delta(0, 1), delta(0, 2), delta(0, 3))
    assert (response.request_id, response.index, response.text) == ("r", 0, "t1 t2 t3 ")
    assert list(response.token_ids) == [1, 2, 3]
    assert response.finish_reason == pb.FINISH_REASON_UNSPECIFIED


def test_each_completion_has_its_own_response() -> None:
    responses = write(delta(1, 1), delta(0, 2), delta(1, 3))
    assert [(response.index, list(response.token_ids)) for response in responses] == [(1, [1, 3]), (0, [2])]


def test_every_token_keeps_its_log_probabilities() -> None:
    [together] = write(delta(0, 1, logprobs=True), delta(0, 2, logprobs=True))
    apart = [write(delta(0, token_id, logprobs=True))[0] for token_id in (1, 2)]
    assert list(together.logprobs) == [position for response in apart for position in response.logprobs]
    assert len(together.logprobs) == 2


@pytest.mark.parametrize(("logprobs", "num_tokens"), [(None, 200_000), (100, 4096)])
def test_a_long_output_is_cut_into_responses_that_messages_carry(logprobs: int | None, num_tokens: int) -> None:
    top = tuple((100_000 + rank, -1.0) for rank in range(logprobs or 0))
    sampled = Sampled(100_000, None if logprobs is None else -0.5, top)
    deltas = [OutputDelta(0, " internationalisation", token_id, sampled, None) for token_id in range(num_tokens)]
    responses = write(*deltas, logprobs=logprobs)
    assert len(responses) > 1
    assert max(response.ByteSize() for response in responses) <= MAX_PUBLIC_MESSAGE_BYTES
    assert [token_id for response in responses for token_id in response.token_ids] == list(range(num_tokens))
    assert "".join(response.text for response in responses) == " internationalisation" * num_tokens


def test_more_tokens_than_an_answer_carries_are_refused() -> None:
    check_answer_size(pb.TokenizeResponse(token_ids=range(1_000_000)))
    with pytest.raises(OutOfRange) as caught:
        check_answer_size(pb.TokenizeResponse(token_ids=[40_000] * 2_000_000))
    assert caught.value.field == "input"
