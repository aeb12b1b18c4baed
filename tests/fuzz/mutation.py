"""Makes a hostile input of a valid one. Deterministic: an input follows from the random source alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

# How many changes one input gets: mostly one, as each is likely to end in the same first check.
_NUM_MUTATIONS = (1, 1, 1, 1, 2, 2, 3, 5)
_MAX_REPEATS = 2048
# Where sizes and signs turn over.
_NUMBERS = (0, 1, -1, 7, 8, 15, 16, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53)
_LARGE_NUMBERS = (2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**18, 10**40, 10**400)
_WORDS = (
    b"0", b"-0.0", b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b'""',
    b'"\\ud800"', b'"\\u0000"', b"[[[[[[[[", b'{"a":{"a":{"a":', b"\xff\xfe", b"\xc3\x28", b"\x00", b"\r\n",
    b"\xe2\x80\xae", b"../", b"%s%n",
)  # fmt: skip
_DIGITS = re.compile(rb"-?[0-9]+")

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutate(rng: random.Random, corpus: Sequence[bytes], words: Sequence[bytes], max_bytes: int) -> bytes:
    """One of `corpus`, changed in up to five ways and cut to `max_bytes`; one in sixteen as it is.

    `words` are pieces that mean something to the decoder, to be put anywhere.
    """
    data = rng.choice(corpus)
    if rng.randrange(16) == 0:
        return data
    for _ in range(rng.choice(_NUM_MUTATIONS)):
        choice = rng.randrange(len(_MUTATIONS) + 2)
        if choice < len(_MUTATIONS):
            data = _MUTATIONS[choice](rng, data, corpus)
        else:
            data = _insert(rng, data, rng.choice(words) if words and rng.random() < 0.8 else rng.choice(_WORDS))
    return data[:max_bytes]


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _place(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def _piece(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + int(rng.expovariate(1 / 8)) + 1)


def _insert(rng: random.Random, data: bytes, piece: bytes) -> bytes:
    start = _place(rng, data)
    end = start if rng.random() < 0.5 else min(len(data), start + len(piece))
    return data[:start] + piece + data[end:]


def _flip_bit(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_byte(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _truncate(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    return data[: _place(rng, data)]


def _delete(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    start, end = _piece(rng, data)
    return data[:start] + data[end:]


def _repeat(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    start, end = _piece(rng, data)
    return data[:end] + data[start:end] * rng.randint(1, rng.choice((2, 16, _MAX_REPEATS))) + data[end:]


def _splice(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _take_over(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A piece of another input in the midst of this one."""
    other = rng.choice(corpus)
    start, end = _piece(rng, other)
    return _insert(rng, data, other[start:end])


def _set_integer(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A fixed-width little-endian number, as headers of files and fixed64 fields have."""
    width = rng.choice((2, 4, 8))
    number = rng.choice(_NUMBERS + _LARGE_NUMBERS) % (1 << 8 * width)
    start = _place(rng, data)
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


def _set_varint(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A lie about a length, or a number far out of range: in the place of one byte, or of several."""
    start = _place(rng, data)
    number = rng.choice((len(data), len(data) + 1, *(number for number in _NUMBERS + _LARGE_NUMBERS if number >= 0)))
    over_long = varint(number % (1 << 64)) if rng.random() < 0.9 else b"\xff" * rng.randint(1, 12)
    return data[:start] + over_long + data[start + rng.randint(0, 2) :]


def _set_digits(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Another number where text has one."""
    found = list(_DIGITS.finditer(data))
    if not found:
        return _set_integer(rng, data, corpus)
    match = rng.choice(found)
    return data[: match.start()] + b"%d" % rng.choice(_NUMBERS + _LARGE_NUMBERS) + data[match.end() :]


_MUTATIONS: tuple[Mutation, ...] = (
    _flip_bit,
    _set_byte,
    _truncate,
    _delete,
    _repeat,
    _splice,
    _take_over,
    _set_integer,
    _set_varint,
    _set_digits,
)
