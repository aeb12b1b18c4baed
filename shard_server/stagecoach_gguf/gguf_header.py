"""Checks a GGUF file's header against the file's size before the reader trusts its counts and lengths.

The `gguf` reader takes counts from the file as they come: a truncated file, or one with a huge array length, makes it
fail obscurely or loop for hours. This walk costs a few milliseconds per 10,000 strings and allocates nothing large.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from stagecoach.errors import CheckpointError

MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 4
# In all arrays of a file together: of each item, be it a byte, the reader makes objects of some 700 bytes. The largest
# vocabularies in use, with their merges, have less than half of that.
MAX_ARRAY_ITEMS = 2_000_000
MAX_NAME_BYTES = 65_536

_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def check_header(path: Path) -> None:
    """Raises CheckpointError unless `path` is a little-endian GGUF 2 or 3 file that holds all that its header says."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file", field="source", value=path.name)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data).run()


class _Walk:
    """Steps through the header. Every step checks that it stays within the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._offset = 4
        self._alignment = GGUF_DEFAULT_ALIGNMENT
        self._num_items = 0

    def run(self) -> None:
        version = self._uint32()
        if version not in (2, 3):
            reason = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise self._bad(f"{reason}; little-endian versions 2 and 3 can be read", limit="2 or 3", value=version)
        num_tensors, num_keys = self._uint64(), self._uint64()
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise self._bad(
                f"claims {num_tensors} tensors and {num_keys} keys",
                limit=f"{MAX_TENSORS} tensors, {MAX_KEYS} keys",
                value=f"{num_tensors} tensors, {num_keys} keys",
            )
        for _ in range(num_keys):
            key = self._text()
            self._value(key)
        places = sorted(self._tensor() for _ in range(num_tensors))
        for (_, end, name), (start, _, following) in itertools.pairwise(places):
            if start < end:  # a small file could become as large a checkpoint as it says
                raise self._bad(f"has tensors that overlap: {name!r} and {following!r}", limit=end, value=start)
        data_start = -(-self._offset // self._alignment) * self._alignment
        needed = data_start + max((end for _, end, _ in places), default=0)
        if needed > len(self._data):
            raise self._bad(
                f"is truncated: {needed} bytes are needed, {len(self._data)} are there",
                limit=needed,
                value=len(self._data),
            )

    def _value(self, key: str) -> None:
        kind = self._value_type(key)
        if kind is GGUFValueType.STRING:
            self._skip(self._uint64())
        elif kind is not GGUFValueType.ARRAY:
            if key == "general.alignment":
                self._read_alignment(kind)
            else:
                self._skip(_SCALAR_BYTES[kind])
        else:
            item, count = self._value_type(key), self._uint64()
            if item is GGUFValueType.ARRAY:
                raise self._bad(f"has an array of arrays under {key!r}", value=key)
            self._num_items += count
            if self._num_items > MAX_ARRAY_ITEMS:
                raise self._bad(
                    f"has {self._num_items} items in its arrays, up to {key!r}",
                    limit=MAX_ARRAY_ITEMS,
                    value=self._num_items,
                )
            if item is GGUFValueType.STRING:
                self._require(8 * count)  # the lengths alone: a bound on the loop
                for _ in range(count):
                    self._skip(self._uint64())
            else:
                self._skip(_SCALAR_BYTES[item] * count)

    def _read_alignment(self, kind: GGUFValueType) -> None:
        alignment = self._uint32() if kind is GGUFValueType.UINT32 else 0
        if alignment == 0 or alignment & (alignment - 1):
            raise self._bad("has a general.alignment that is not a power of two", value=alignment)
        self._alignment = alignment

    def _tensor(self) -> tuple[int, int, str]:
        """Where the tensor's bytes begin and end, counted from where tensor data starts, and its name."""
        name = self._text()
        num_dimensions = self._uint32()
        if num_dimensions > MAX_DIMENSIONS:
            raise self._bad(
                f"tensor {name!r} has {num_dimensions} dimensions", limit=MAX_DIMENSIONS, value=num_dimensions
            )
        num_elements, row = 1, 1
        for index in range(num_dimensions):
            size = self._uint64()
            row = size if index == 0 else row
            num_elements *= size
        number = self._uint32()
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise self._bad(f"tensor {name!r} has unknown quantization {number}", value=number) from None
        if row % block:
            raise self._bad(f"tensor {name!r} has rows of {row}, not a multiple of {block}", limit=block, value=row)
        start = self._uint64()
        return start, start + num_elements // block * block_bytes, name

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._uint32()
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._bad(f"has a value of unknown type {number} under {key!r}", value=number) from None

    def _text(self) -> str:
        length = self._uint64()
        if length > MAX_NAME_BYTES:
            raise self._bad(f"has a name of {length} bytes", limit=MAX_NAME_BYTES, value=length)
        self._require(length)
        text = self._data[self._offset : self._offset + length]
        self._offset += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._bad("has a name that is not UTF-8", value=text[:40]) from None

    def _uint32(self) -> int:
        self._require(4)
        (number,) = struct.unpack_from("<I", self._data, self._offset)
        self._offset += 4
        return int(number)

    def _uint64(self) -> int:
        self._require(8)
        (number,) = struct.unpack_from("<Q", self._data, self._offset)
        self._offset += 8
        return int(number)

    def _skip(self, num_bytes: int) -> None:
        self._require(num_bytes)
        self._offset += num_bytes

    def _require(self, num_bytes: int) -> None:
        end = self._offset + num_bytes
        if end > len(self._data):
            raise self._bad(
                f"is truncated: its header goes on to byte {end} at least", limit=len(self._data), value=end
            )

    def _bad(self, reason: str, *, limit: object = "", value: object = "") -> CheckpointError:
        return CheckpointError(f"{self._path.name} {reason}", field="source", limit=limit, value=value)
