"""A request that holds more than the contract allows is refused on its bytes; all others are read as protobuf does."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_router.frontend.convert import MAX_CHAT_MESSAGES, read_params
from stagecoach_router.frontend.request_shape import MAX_NUMBERS, UNCOUNTED_BYTES, check_shape, shape_checking

GENERATE = pb.GenerateRequest.DESCRIPTOR
MANY = 2_000_000
PROMPT = pb.GenerateRequest(prompt="x" * UNCOUNTED_BYTES).SerializeToString()  # large enough to be looked at


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, which may be a message's."""
    head, length = bytearray([number << 3 | 2]), len(content)
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + content


def number_of(name: str, message: type = pb.GenerateRequest) -> int:
    return message.DESCRIPTOR.fields_by_name[name].number  # type: ignore[attr-defined,no-any-return]


HOSTILE = {
    "empty messages": field(number_of("chat"), field(number_of("messages", pb.ChatMessages), b"") * MANY),
    "one message with a field many times": field(
        number_of("chat"), field(number_of("messages", pb.ChatMessages), field(1, b"") * MANY)
    ),
    "stop strings": field(number_of("sampling"), field(number_of("stop", pb.SamplingParams), b"") * MANY),
    "entries of one key": field(number_of("sampling"), field(number_of("logit_bias", pb.SamplingParams), b"") * MANY),
    "one message in parts": field(number_of("sampling"), b"") * MANY,
    "fields that nobody knows": field(15, b"") * MANY,
    "numbers that nobody knows": b"\x78\x01" * MANY,
    "token ids": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (MAX_NUMBERS + 1))).SerializeToString(),
    "token ids one by one": field(number_of("token_ids"), b"\x08\x01" * MANY),
    "stop ids": pb.GenerateRequest(sampling=pb.SamplingParams(stop_token_ids=[1] * MANY)).SerializeToString(),
    "places": pb.GenerateRequest(from_tokens=[1] * MANY).SerializeToString(),
    "a group": PROMPT + b"\x7b\x7c",
    "a long number": PROMPT + b"\x78" + b"\xff" * 11,
    "an end inside a number": PROMPT + b"\x78\xff",
    "an end inside a text": PROMPT + b"\x0a\x05abc",
    "an inner field that ends outside": PROMPT + field(number_of("sampling"), b"\x0a\x7f") + b"\x00" * 200,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_holds_too_much_is_refused_and_nothing_is_made_of_it(name: str) -> None:
    read = shape_checking(pb.GenerateRequest.FromString)
    assert read is not None
    tracemalloc.start()
    refused = read(HOSTILE[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(refused, InvalidArgument), "returned, as gRPC would call it an internal error if it were raised"
    assert refused.field == "request"
    assert peak < 5 << 20


def test_all_that_a_request_may_hold_is_taken() -> None:
    message = pb.ChatMessage(role="user", content="x" * 900)
    request = pb.GenerateRequest(
        request_id="r",
        model="m",
        chat=pb.ChatMessages(messages=[message] * MAX_CHAT_MESSAGES),
        sampling=pb.SamplingParams(
            logit_bias=dict.fromkeys(range(100_000, 100_000 + MAX_LOGIT_BIAS), 1.5),
            stop=["stop"] * MAX_STOP_STRINGS,
            stop_token_ids=range(100_000, 100_000 + MAX_STOP_TOKEN_IDS),
            seed=2**64 - 1,
            temperature=0.5,
        ),
        from_tokens=[1, 2, 3],
        linger_s=1.0,
        priority=-1,
    )
    read = shape_checking(pb.GenerateRequest.FromString)
    assert read is not None
    assert read(request.SerializeToString()) == request
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[200_000] * MAX_NUMBERS))
    assert read(ids.SerializeToString()) == ids


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_taken_or_refused(data: bytes, position: int) -> None:
    valid = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")] * 3),
        sampling=pb.SamplingParams(stop=["x"], logit_bias={3: 1.0}, stop_token_ids=[1, 2]),
    ).SerializeToString()
    for candidate in (data, valid[:position] + data + valid[position:], valid):
        try:
            pb.GenerateRequest.FromString(candidate)
            is_message = True
        except Exception:
            is_message = False
        try:
            check_shape(candidate, GENERATE)
        except InvalidArgument:
            # Groups are protobuf's business, and nobody's who speaks this contract.
            assert not is_message or any(byte & 7 in (3, 4) for byte in candidate)


def test_small_requests_are_protobufs_business_and_what_is_no_message_too() -> None:
    read = shape_checking(pb.GenerateRequest.FromString)
    assert read is not None
    assert isinstance(read(b"\xff"), InvalidArgument)
    assert read(b"") == pb.GenerateRequest()
    assert shape_checking(None) is None
    assert shape_checking(len) is len


@pytest.mark.parametrize(("field_name", "content"), [("stop_token_ids", [1] * MAX_NUMBERS), ("stop", [""] * 15_000)])
def test_long_lists_are_refused_before_anything_is_made_of_them(field_name: str, content: list[object]) -> None:
    message = pb.SamplingParams(**{field_name: content})  # type: ignore[arg-type]
    tracemalloc.start()
    with pytest.raises(InvalidArgument) as caught:
        read_params(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.field, caught.value.value) == (field_name, str(len(content)))
    assert peak < 1 << 16
