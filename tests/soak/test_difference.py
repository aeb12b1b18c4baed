"""What a test under faults would notice about an answer."""

from dataclasses import replace

import pytest

from stagecoach_client import Completion, Generation, Usage
from stagecoach_client.results import PositionLogprobs, TokenLogprob
from tests.soak.mixed_requests import difference


def logprobs(*values):
    return tuple(PositionLogprobs(TokenLogprob(1, "a", value), (TokenLogprob(1, "a", value),)) for value in values)


COMPLETION = Completion(0, "abc", (1, 2, 3), logprobs(-1.0, -2.0, -3.0), "length")
EXPECTED = Generation((COMPLETION,), Usage(5, 0, 3), "one")


def changed(**changes):
    return replace(EXPECTED, completions=(replace(COMPLETION, **changes),))


def test_the_same_answer_under_another_id_and_with_other_cached_tokens_is_no_difference():
    rounded = replace(COMPLETION, logprobs=logprobs(-1.00001, -2.0, -3.0))
    assert difference(EXPECTED, Generation((rounded,), Usage(5, 4, 3), "other")) is None


@pytest.mark.parametrize(
    ("came", "what"),
    [
        (changed(token_ids=(1, 2, 4)), "completion 0: token 2 of 3 and 3"),
        (changed(token_ids=(1, 2)), "completion 0: token 2 of 3 and 2"),
        (changed(token_ids=(1, 2, 3, 3)), "completion 0: token 3 of 3 and 4"),
        (changed(text="ab"), "the same tokens, but"),
        (changed(finish_reason="stop"), "the same tokens, but"),
        (changed(logprobs=logprobs(-1.0, -2.0, -3.001)), "log-probabilities differ"),
        (changed(logprobs=logprobs(-1.0, -2.0)), "log-probabilities differ"),
        (replace(EXPECTED, usage=Usage(5, 0, 4)), "usage (prompt, completion) (5, 3) expected, (5, 4) came"),
    ],
)
def test_every_difference_is_named(came, what):
    found = difference(EXPECTED, came)
    assert found is not None
    assert what in found
