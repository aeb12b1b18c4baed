"""How much a request holds, counted on its bytes before protobuf makes objects of them. Pure.

Two bytes are an empty chat message, of which 4 MiB hold two million: reading those takes a tenth of a second, in which
no stream goes on, and a hundred times as much memory. What the contract allows is a few thousand fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stagecoach.errors import InvalidArgument

Deserializer: TypeAlias = Callable[[bytes], Any]

# 4,096 chat messages of two fields each, and everything else, also where it is at its limit. Counting takes 7 ms.
MAX_FIELDS = 16_000
# Token ids in one field: more than any context holds, and 5 ms to read.
MAX_NUMBERS = 1 << 20
# Of smaller requests protobuf reads whatever they hold in less time than counting takes: 32,000 fields in 2 ms.
UNCOUNTED_BYTES = 1 << 16
MAX_DEPTH = 8

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_HIGH_BYTES = bytes(range(0x80, 0x100))
# By field number: the descriptor of a message, None for text and bytes, True for packed numbers.
_Fields: TypeAlias = Mapping[int, "Descriptor | Literal[True] | None"]


def shape_checking(deserialize: Deserializer | None) -> Deserializer | None:
    """Reads as `deserialize` does, but returns, not raises, InvalidArgument for bytes that hold too much or no message.

    gRPC would call whatever is raised there an internal error.
    """
    message_type = getattr(deserialize, "__self__", None)
    descriptor = getattr(message_type, "DESCRIPTOR", None)
    if deserialize is None or not isinstance(descriptor, Descriptor):
        return deserialize

    def read(data: bytes) -> Any:
        try:
            if len(data) > UNCOUNTED_BYTES:
                check_shape(data, descriptor)
            return deserialize(data)
        except InvalidArgument as error:
            return error
        except Exception as error:  # protobuf's DecodeError is not the only one it raises
            return InvalidArgument(f"request: not a {descriptor.name}: {error}", field="request")

    return read


def check_shape(data: bytes, descriptor: Descriptor) -> None:
    """Raises InvalidArgument for a serialised message of more fields or numbers than there may be, or for none."""
    try:
        _count_fields(data, 0, len(data), descriptor, 0, MAX_DEPTH)
    except IndexError:
        raise InvalidArgument("request: it ends inside a number", field="request", limit=len(data)) from None


def _count_fields(data: bytes, position: int, end: int, descriptor: Descriptor, num_fields: int, depth: int) -> int:
    """`num_fields`, and those between the positions, with all that they hold."""
    if depth == 0:
        raise InvalidArgument("request: messages within messages", field="request", limit=MAX_DEPTH)
    fields = _fields_of(descriptor)
    while position < end:
        num_fields += 1
        if num_fields > MAX_FIELDS:
            raise InvalidArgument(f"request: more than {MAX_FIELDS} fields", field="request", limit=MAX_FIELDS)
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = _rest_of_varint(data, position, tag)
        kind = tag & 7
        if kind == _LENGTH:
            length = data[position]
            position += 1
            if length >= 0x80:
                length, position = _rest_of_varint(data, position, length)
            field = fields.get(tag >> 3)
            if field is True:
                _check_numbers(data, position, position + length)
            elif field is not None and position + length <= end:
                num_fields = _count_fields(data, position, position + length, field, num_fields, depth - 1)
            position += length
        elif kind == _VARINT:
            position = _skip_varint(data, position)
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            raise InvalidArgument(f"request: a field of wire type {kind}", field="request")
    if position != end:
        raise InvalidArgument("request: a field ends beyond its message", field="request", limit=end, value=position)
    return num_fields


def _check_numbers(data: bytes, start: int, end: int) -> None:
    """Each packed number ends with a byte below 0x80, or has 4 or 8 bytes: there are at most as many as such bytes."""
    if end - start > MAX_NUMBERS:
        num_numbers = len(data[start:end].translate(None, _HIGH_BYTES))
        if num_numbers > MAX_NUMBERS:
            raise InvalidArgument(
                f"request: {num_numbers} numbers in one field; at most {MAX_NUMBERS}",
                field="request",
                limit=MAX_NUMBERS,
                value=num_numbers,
            )


def _rest_of_varint(data: bytes, position: int, first: int) -> tuple[int, int]:
    """The number of which `first` is the first byte, and the position behind it. IndexError where the bytes end."""
    value, shift = first & 0x7F, 7
    for _ in range(9):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidArgument("request: a number of more than 10 bytes", field="request")


def _skip_varint(data: bytes, position: int) -> int:
    """The position behind the number."""
    for _ in range(10):
        position += 1
        if data[position - 1] < 0x80:
            return position
    raise InvalidArgument("request: a number of more than 10 bytes", field="request")


def _fields_of(descriptor: Descriptor) -> _Fields:
    known = _FIELDS.get(descriptor.full_name)
    if known is None:
        known = _FIELDS[descriptor.full_name] = {field.number: _kind_of(field) for field in descriptor.fields}
    return known


def _kind_of(field: FieldDescriptor) -> Descriptor | Literal[True] | None:
    if field.message_type is not None:
        return field.message_type
    return True if field.is_packed else None


# By the full name of a message.
_FIELDS: dict[str, _Fields] = {}
