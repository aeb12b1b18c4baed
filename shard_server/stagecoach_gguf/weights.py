"""Writes tensors as bfloat16 safetensors, piece by piece, so that never more than a piece of one tensor is in memory.

The format: eight bytes of header length, little-endian; a JSON header with each tensor's dtype, shape and byte range;
then the bytes. As sizes are known beforehand, the header goes first and the tensors follow as they are made.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stagecoach_gguf.architecture import TensorPlan
from stagecoach_gguf.gguf_file import GGUFFile, GGUFTensor

MAX_FILE_BYTES = 4_000_000_000
# Elements dequantized at a time; float32 and its temporaries take some 12 bytes each.
_PIECE_ELEMENTS = 8 << 20
_BFLOAT16_BYTES = 2


def weights_bytes(plans: Sequence[TensorPlan]) -> int:
    """How many bytes the tensors take on disk, without headers."""
    return sum(_BFLOAT16_BYTES * prod(plan.shape) for plan in plans)


def write_weights(
    file: GGUFFile,
    plans: Sequence[TensorPlan],
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Writes model.safetensors, or several files and an index where one would pass `max_file_bytes`.

    `progress` is told of bytes as they are written. Raises CheckpointError for a quantization that cannot be undone.
    """
    groups = _split(plans, max_file_bytes)
    if len(groups) == 1:
        _write_file(file, groups[0], folder / "model.safetensors", progress)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_file(file, group, folder / name, progress)
        weight_map |= {plan.name: name for plan in group}
    index = {"metadata": {"total_size": weights_bytes(plans)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(plans: Sequence[TensorPlan], max_file_bytes: int) -> list[list[TensorPlan]]:
    groups: list[list[TensorPlan]] = [[]]
    room = max_file_bytes
    for plan in plans:
        size = weights_bytes([plan])
        if size > room and groups[-1]:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(plan)
        room -= size
    return groups


def _write_file(file: GGUFFile, plans: Sequence[TensorPlan], path: Path, progress: Callable[[int], object]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + weights_bytes([plan])
        header[plan.name] = {"dtype": "BF16", "shape": plan.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            for piece in bfloat16_pieces(file.tensors[plan.source], plan.rotary_heads):
                out.write(piece.tobytes())
                progress(piece.nbytes)


def bfloat16_pieces(tensor: GGUFTensor, rotary_heads: int = 0) -> Iterator[npt.NDArray[np.int16]]:
    """The tensor's elements as the bits of bfloat16, rounded to nearest even, in order and in bounded pieces."""
    if len(tensor.shape) == 1:
        values = tensor.values(tensor.data.reshape(1, -1)).reshape(-1)
        yield _bfloat16_bits(undo_rotary_order(values, rotary_heads) if rotary_heads else values)
        return
    rows = undo_rotary_order(tensor.data, rotary_heads) if rotary_heads else tensor.data
    step = max(1, _PIECE_ELEMENTS // max(1, tensor.shape[-1]))
    for start in range(0, len(rows), step):
        yield _bfloat16_bits(tensor.values(rows[start : start + step]))


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    copied = np.array(values, dtype=np.float32, order="C")  # torch wants memory it may write to; the file's is not
    bits: npt.NDArray[np.int16] = torch.from_numpy(copied).to(torch.bfloat16).view(torch.int16).numpy()
    return bits


def undo_rotary_order(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Puts a head's rows back into the order of checkpoints: [num_heads * head_dim, ...] in, the same shape out.

    For llama, llama.cpp turns neighbouring rows (2i, 2i + 1) as a pair, checkpoints turn (i, i + head_dim / 2); its
    converter interleaves the halves, and this is the inverse. Rows move whole, so they may still be quantized.
    """
    half = len(rows) // num_heads // 2
    return rows.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)
