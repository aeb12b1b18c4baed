"""Reads and writes the messages that carry a big buffer without protobuf copying the buffer.

`MicroBatch` and `SessionResponse` end in `bytes payload = 15`, the field with the highest number. A frame is written as
the protobuf serialisation of everything before it, followed by the payload's tag, its length and its bytes: what
protobuf itself would write, so any language can speak it. On receipt the payload is a view into the received bytes.
One copy is made on the way out (gRPC wants one `bytes`), none on the way in.

For the view to be of use as a tensor the payload begins at a multiple of 16 bytes. Where the header's size does not
make it so, a payload of a few zeros goes before, which to protobuf means nothing: of two values the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from stagecoach.errors import InvalidArgument

PAYLOAD_FIELD = 15
PAYLOAD_ALIGNMENT = 16  # bytes from the frame's beginning, which the allocator aligns at least as well
_PAYLOAD_TAG = bytes([PAYLOAD_FIELD << 3 | 2])
# The fields at the top of a frame. Our contract has two, and each costs a turn of a Python loop.
MAX_FIELDS = 64
# What is not payload. A hostile header, full of empty messages, takes some 20 times as much memory once it is parsed.
# An honest one is mostly block tables: in so many bytes they name the K/V of more than 40 million positions.
MAX_HEADER_BYTES = 8 << 20
# What answers a micro-batch has no block tables: a few bytes for each stage and each kind of output, or a short fault.
MAX_ANSWER_HEADER_BYTES = 256 << 10
_MAX_VARINT_BYTES = 10


class _Message(Protocol):
    """What framing needs of a generated message class."""

    @classmethod
    def FromString(cls, s: bytes) -> Self: ...  # noqa: N802

    def SerializeToString(self) -> bytes: ...  # noqa: N802


MessageT = TypeVar("MessageT", bound=_Message)


@dataclass(slots=True)
class FrameCounter:
    """How many frames were read, and how many of them without a copy of the payload."""

    num_frames: int = 0
    num_fast_frames: int = 0

    def payload_was_copied(self) -> None:
        """Tells that the reader of the last frame had to copy its payload after all."""
        self.num_fast_frames -= 1


def write_frame(message: _Message, payload: Sequence[memoryview | bytes] = ()) -> bytes:
    """The serialised `message`, with the buffers of `payload` back to back as its field 15.

    `message` itself must not have a payload. The buffers must be contiguous and of bytes (format "B").
    """
    length = sum(len(buffer) for buffer in payload)
    if length == 0:
        return message.SerializeToString()
    header, prefix = message.SerializeToString(), _PAYLOAD_TAG + _varint(length)
    return b"".join((header, _padding(-(len(header) + len(prefix)) % PAYLOAD_ALIGNMENT), prefix, *payload))


def read_frame(
    message_type: type[MessageT],
    data: bytes,
    counter: FrameCounter | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> tuple[MessageT, memoryview]:
    """The message without its payload, and the payload: a view into `data`, empty where there is none.

    `max_header_bytes`: of what is not payload, which is looked at only within this bound.
    Fields may come in any order, as protobuf allows, but a payload that is not the last one costs a copy of the header.
    Raises InvalidArgument(field="frame") where `data` is not a serialised message, or passes a limit.
    """
    view = memoryview(data)
    payload = view[:0]
    header_parts: list[memoryview] = []
    header_start = position = 0
    num_fields = 0
    while position < len(data):
        num_fields += 1
        if num_fields > MAX_FIELDS:
            raise InvalidArgument(f"frame: more than {MAX_FIELDS} fields", field="frame", limit=MAX_FIELDS)
        field_start = position
        tag, position = _read_varint(data, position)
        value_start, position = _skip_value(data, position, tag & 7)
        if tag >> 3 == PAYLOAD_FIELD and tag & 7 == 2:
            payload = view[value_start:position]  # the last one wins, as in protobuf
            header_parts.append(view[header_start:field_start])
            header_start = position
    if counter is not None:
        counter.num_frames += 1
        counter.num_fast_frames += not header_parts or header_start == len(data)
    header_parts.append(view[header_start:])
    header_bytes = sum(map(len, header_parts))
    if header_bytes > max_header_bytes:
        raise InvalidArgument(
            f"frame: a header of {header_bytes} bytes", field="frame", limit=max_header_bytes, value=header_bytes
        )
    try:
        return message_type.FromString(b"".join(header_parts)), payload
    except Exception as error:  # protobuf's DecodeError is not the only one it raises
        raise InvalidArgument(f"frame: not a {message_type.__name__}: {error}", field="frame") from error


def _padding(num_bytes: int) -> bytes:
    """A payload field of zeros, `num_bytes` long, or one alignment longer where its tag and length do not fit."""
    if num_bytes == 0:
        return b""
    num_zeros = num_bytes - 2 if num_bytes > 1 else num_bytes - 2 + PAYLOAD_ALIGNMENT
    return _PAYLOAD_TAG + _varint(num_zeros) + bytes(num_zeros)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise InvalidArgument("frame: it ends inside a number", field="frame", limit=len(data))
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise InvalidArgument("frame: a number of more than 10 bytes", field="frame", limit=_MAX_VARINT_BYTES)


def _skip_value(data: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Where a field's value begins and ends. Our contract has no groups (wire types 3 and 4)."""
    if wire_type == 0:
        return position, _read_varint(data, position)[1]
    if wire_type == 2:
        length, position = _read_varint(data, position)
    elif wire_type == 1:
        length = 8
    elif wire_type == 5:
        length = 4
    else:
        raise InvalidArgument(f"frame: wire type {wire_type} is not used here", field="frame", value=wire_type)
    if position + length > len(data):
        raise InvalidArgument(
            f"frame: a field of {length} bytes in a frame of {len(data)}", field="frame", limit=len(data), value=length
        )
    return position, position + length
