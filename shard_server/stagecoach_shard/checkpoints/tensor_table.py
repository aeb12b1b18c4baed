"""The tensors of a checkpoint, from the headers of its safetensors files, with nothing trusted.

The format: eight bytes, little-endian, say how long the JSON header is; the header maps each name to dtype, shape and
the byte range in what follows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8
# The limit of the format's own implementation.
_MAX_HEADER_BYTES = 100_000_000
# A file can hold no more dimensions, and no larger numbers, that mean anything; larger ones take for ever to multiply.
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2**63 - 1
_MAX_INDEX_BYTES = 64 << 20
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies."""

    name: str
    dtype: str  # as safetensors spells it, such as "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    num_bytes: int


def read_tensor_table(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint in `folder` by name, from the single file or else from those of the index.

    Raises CheckpointError, `field` naming the file or tensor at fault.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; other formats must be converted first",
            field=SINGLE_FILE,
        )
    weight_map = _read_weight_map(folder / INDEX_FILE)
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    table = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{name} is not in {file}, where {INDEX_FILE} says it is", field=name, value=file)
        table[name] = headers[file][name]
    return table


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name. Raises CheckpointError for a file that is missing, truncated or malformed."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if file_bytes < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
                raise CheckpointError(
                    f"{path.name} is truncated or not safetensors: its header would be {length} bytes of {file_bytes}",
                    field=path.name,
                    limit=file_bytes,
                    value=length,
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", field=path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: its header cannot be read: {error}", field=path.name) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header must be a JSON object", field=path.name)
    start = _LENGTH_BYTES + length
    return {
        name: _parse_entry(path, name, fields, start, file_bytes - start)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _parse_entry(path: Path, name: str, fields: Any, start: int, data_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        good = dtype in _ITEM_BYTES and isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        good = good and all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{name}: its entry in {path.name} is not well-formed: {str(fields)[:200]}", field=name, value=fields
        )
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{name}: {path.name} gives it {end - begin} bytes; {dtype} {shape} takes {num_bytes}",
            field=name,
            limit=num_bytes,
            value=end - begin,
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{name}: {path.name} is truncated: it ends {end - data_bytes} bytes before this tensor, {shape}, does",
            field=name,
            limit=data_bytes,
            value=end,
        )
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, num_bytes)


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_INDEX_BYTES:
            raise CheckpointError(
                f"{path.name} has {num_bytes} bytes", field=path.name, limit=_MAX_INDEX_BYTES, value=num_bytes
            )
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error!r}", field=path.name) from error
    if not good:
        raise CheckpointError(f"{path.name}: weight_map must map names to file names", field=path.name)
    for name, file in weight_map.items():
        # A plain name: what the index says must not open files elsewhere.
        if not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path.name}: {name} is said to be in {file!r}; it must be a .safetensors file in the same folder",
                field=path.name,
                value=file,
            )
    return weight_map
