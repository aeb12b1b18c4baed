"""The arguments of a call: what is refused before it is sent, and the message that is made of the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES
from stagecoach.sampling_params import SAMPLING_FIELDS, SamplingParams
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client.requests import (
    GenerateOptions,
    check_timeout,
    generate_call,
    sampling_to_proto,
    tokenize_request,
)

USER: Any = {"role": "user", "content": "hi"}


def test_every_sampling_field_can_be_given() -> None:
    assert set(SAMPLING_FIELDS) <= GenerateOptions.__annotations__.keys()
    assert set(SAMPLING_FIELDS) == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}


def test_defaults_are_those_of_the_sampling_parameters() -> None:
    assert generate_call("x", {}).request.sampling == sampling_to_proto(SamplingParams())


@pytest.mark.parametrize("name", sorted(GenerateOptions.__annotations__))
def test_none_is_the_same_as_not_given(name: str) -> None:
    assert generate_call("x", {name: None}) == generate_call("x", {})  # type: ignore[misc]


sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1000, 1000), max_size=3),
    seed=st.none() | st.integers(0, 2**64 - 1),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(min_size=1, max_size=3, alphabet="ab\né"), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 100),
    n=st.integers(1, 64),
)


@given(sampling)
def test_sampling_parameters_go_over_the_wire_unchanged(params: SamplingParams) -> None:
    message = pb.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    for name in SAMPLING_FIELDS:
        value = getattr(params, name)
        if value is None:
            assert not message.HasField(name)
        elif isinstance(value, tuple):
            assert tuple(getattr(message, name)) == value
        elif name == "logit_bias":
            assert dict(message.logit_bias) == value
        else:
            assert getattr(message, name) == value


@pytest.mark.parametrize(("stop", "expected"), [("end", ["end"]), (["a", "b"], ["a", "b"]), ((), [])])
def test_stop_is_a_string_or_several(stop: Any, expected: list[str]) -> None:
    assert list(generate_call("x", {"stop": stop}).request.sampling.stop) == expected


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        ("x", {"token_ids": [1]}),
        ("", {"messages": [USER]}),
        (None, {"token_ids": [1], "messages": [USER]}),
    ],
)
def test_exactly_one_input_is_wanted(prompt: str | None, options: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        generate_call(prompt, options)
    assert caught.value.field == "input"


def test_each_kind_of_input_arrives_as_itself() -> None:
    assert generate_call("", {}).request.WhichOneof("input") == "prompt"
    assert list(generate_call(None, {"token_ids": range(3)}).request.token_ids.ids) == [0, 1, 2]
    assert generate_call(None, {"messages": [USER]}).request.chat.messages[0].role == "user"
    assert tokenize_request(None, [USER], "m").chat.messages[0].content == "hi"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("token_ids", {"token_ids": [-1]}),
        ("token_ids", {"token_ids": [2**32]}),
        ("token_ids", {"token_ids": [1.5]}),
        ("token_ids", {"token_ids": "12"}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages", {"messages": USER}),
        ("messages[1]", {"messages": [USER, {"role": "user"}]}),
        ("messages[0]", {"messages": [{**USER, "name": "x"}]}),
        ("messages[0]", {"messages": [{"role": "", "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": "a\ud800"}),
        ("stop", {"prompt": "x", "stop": ["a\ud800"]}),
        ("stop", {"prompt": "x", "stop": 7}),
        ("stop", {"prompt": "x", "stop": [7]}),
        ("stop", {"prompt": "x", "stop": ""}),
        ("stop_token_ids", {"prompt": "x", "stop_token_ids": 7}),
        ("logit_bias", {"prompt": "x", "logit_bias": [1]}),
        ("temperature", {"prompt": "x", "temperature": math.nan}),
        ("n", {"prompt": "x", "n": 0}),
        ("priority", {"prompt": "x", "priority": 2**31}),
        ("priority", {"prompt": "x", "priority": True}),
        ("request_id", {"prompt": "x", "request_id": "r" * 129}),
        ("model", {"prompt": "x", "model": 5}),
        ("timeout_s", {"prompt": "x", "timeout_s": 0}),
        ("timeout_s", {"prompt": "x", "timeout_s": math.inf}),
        ("input", {"prompt": "x" * (MAX_PUBLIC_MESSAGE_BYTES + 1)}),
    ],
)
def test_a_bad_value_is_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        generate_call(options.pop("prompt", None), options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        generate_call("x", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


def test_a_timeout_may_be_left_open() -> None:
    assert check_timeout(None) is None
    assert check_timeout(0.5) == 0.5
