"""SamplingParams refuses what it cannot mean, and says which field and what limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SAMPLING_FIELDS,
    SamplingParams,
)

# field: (low, high, whether low itself is good)
NUMBERS = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.01, 100, True),
    "presence_penalty": (-100.0, 100.0, True),
    "frequency_penalty": (-100.0, 100.0, True),
}
WHOLE_NUMBERS = {
    "top_k": (0, 2**31 - 1),
    "seed": (0, MAX_SEED),
    "max_tokens": (1, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_N),
}
NOT_FINITE = [math.nan, math.inf, -math.inf]
NOT_NUMBERS = ["1", b"1", [1], {}, object(), True, 1j]

number_fields = st.sampled_from(sorted(NUMBERS))
whole_number_fields = st.sampled_from(sorted(WHOLE_NUMBERS))


def refused(**params: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**params)
    (field,) = params
    assert caught.value.field == field
    assert field in caught.value.message
    return caught.value


def test_defaults_are_good_and_the_same_as_nothing() -> None:
    params = SamplingParams()
    assert params.temperature == 1.0
    assert not params.greedy
    assert not params.shapes_logits
    assert set(NUMBERS) | set(WHOLE_NUMBERS) < set(SAMPLING_FIELDS)


@given(data=st.data(), field=number_fields)
def test_a_number_in_its_range_is_taken(data: st.DataObject, field: str) -> None:
    low, high, low_is_good = NUMBERS[field]
    value = data.draw(st.floats(low, high, exclude_min=not low_is_good) | st.integers(math.floor(low) + 1, int(high)))
    assert getattr(SamplingParams(**{field: value}), field) == value


@given(data=st.data(), field=number_fields)
def test_a_number_out_of_its_range_is_refused_with_the_limit(data: st.DataObject, field: str) -> None:
    low, high, low_is_good = NUMBERS[field]
    too_low = st.floats(max_value=low, exclude_max=low_is_good, allow_infinity=False)
    too_high = st.floats(min_value=high, exclude_min=True, allow_infinity=False)
    value = data.draw(too_low | too_high | st.integers(min_value=int(high) + 1))
    error = refused(**{field: value})
    assert error.limit == f"{'[' if low_is_good else '('}{low:g}, {high:g}]"
    assert error.value == str(value)[:200]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", [*NOT_FINITE, *NOT_NUMBERS, None, 10**400, -(10**400)], ids=lambda value: repr(value)[:9]
)
def test_what_is_no_finite_number_is_refused(field: str, value: object) -> None:
    assert refused(**{field: value}).limit


@given(data=st.data(), field=whole_number_fields)
def test_a_whole_number_in_its_range_is_taken(data: st.DataObject, field: str) -> None:
    value = data.draw(st.integers(*WHOLE_NUMBERS[field]))
    assert getattr(SamplingParams(**{field: value}), field) == value


@given(data=st.data(), field=whole_number_fields)
def test_a_whole_number_out_of_its_range_is_refused_with_the_limit(data: st.DataObject, field: str) -> None:
    low, high = WHOLE_NUMBERS[field]
    value = data.draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    assert refused(**{field: value}).limit == f"[{low}, {high}]"


@pytest.mark.parametrize("field", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", [*NOT_FINITE, *NOT_NUMBERS, 1.0, 0.5], ids=lambda value: repr(value)[:9])
def test_what_is_no_whole_number_is_refused(field: str, value: object) -> None:
    assert refused(**{field: value}).limit


@pytest.mark.parametrize("field", ["seed", "max_tokens", "logprobs"])
def test_none_means_not_given(field: str) -> None:
    assert getattr(SamplingParams(**{field: None}), field) is None


@pytest.mark.parametrize(
    "bias", [{1: math.nan}, {1: math.inf}, {1: 1001.0}, {1: "2"}, {-1: 0.0}, {2**31: 0.0}, {"1": 0.0}]
)
def test_a_bad_logit_bias_is_refused(bias: Any) -> None:
    assert refused(logit_bias=bias).limit


@pytest.mark.parametrize("bias", [None, [(1, 2.0)], 3], ids=repr)
def test_a_logit_bias_that_is_no_mapping_is_refused(bias: Any) -> None:
    refused(logit_bias=bias)


@pytest.mark.parametrize("stop", ["a string", None, 3, (1,), (b"x",), ("",)], ids=repr)
def test_a_bad_stop_is_refused(stop: Any) -> None:
    refused(stop=stop)


@pytest.mark.parametrize("ids", [None, 3, "12", (-1,), (2**31,), (1.0,), (True,)], ids=repr)
def test_bad_stop_token_ids_are_refused(ids: Any) -> None:
    refused(stop_token_ids=ids)


@pytest.mark.parametrize("value", [None, 1, "no"], ids=repr)
def test_an_ignore_eos_that_is_no_bool_is_refused(value: Any) -> None:
    refused(ignore_eos=value)


@pytest.mark.parametrize(
    ("field", "full", "overfull", "limit"),
    [
        (
            "logit_bias",
            dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
            dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0),
            MAX_LOGIT_BIAS,
        ),
        ("stop", ("x",) * MAX_STOP_STRINGS, ("x",) * (MAX_STOP_STRINGS + 1), MAX_STOP_STRINGS),
        ("stop", ("x" * MAX_STOP_LENGTH,), ("x" * (MAX_STOP_LENGTH + 1),), MAX_STOP_LENGTH),
        ("stop_token_ids", (1,) * MAX_STOP_TOKEN_IDS, (1,) * (MAX_STOP_TOKEN_IDS + 1), MAX_STOP_TOKEN_IDS),
    ],
    ids=["logit_bias", "stop strings", "stop length", "stop_token_ids"],
)
def test_lengths_are_limited(field: str, full: object, overfull: object, limit: int) -> None:
    SamplingParams(**{field: full})  # type: ignore[arg-type]
    error = refused(**{field: overfull})
    assert error.limit == str(limit)


@pytest.mark.parametrize(
    ("params", "shapes"),
    [
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"logit_bias": {3: -1.0}}, True),
        ({"logit_bias": {3: 0.0}}, False),
        ({"temperature": 0.2, "top_k": 4, "top_p": 0.5, "min_p": 0.1}, False),
    ],
)
def test_only_bias_and_penalties_shape_logits(params: dict[str, Any], shapes: bool) -> None:
    assert SamplingParams(**params).shapes_logits is shapes
