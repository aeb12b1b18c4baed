"""One number for "the same model", cheap enough to take at every start.

It covers the configuration as far as it affects what is computed, the name, dtype and shape of every tensor, and
windows of bytes spread evenly over each tensor. It does not depend on how tensors are spread over files.

What it cannot see: a change that falls between the windows of every tensor it touches, such as a single number set by
hand in a large matrix. Training changes nearly every number, and so every window. It guards against mistakes, not
against someone who builds a second model to match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.tensor_files import TensorFiles
from stagecoach_shard.checkpoints.tensor_table import TensorEntry

_WINDOW_BYTES = 4096
_WINDOWS_A_TENSOR = 8
# Over all tensors; a checkpoint of very many tensors gets fewer windows in each, but one at least.
_MAX_WINDOWS = 16_384


def fingerprint(config: ModelConfig, tensors: Mapping[str, TensorEntry]) -> str:
    """SHA-256, as 64 hexadecimal digits. Raises CheckpointError for a tensor that cannot be read."""
    digest = hashlib.sha256()
    digest.update(json.dumps(asdict(config), sort_keys=True).encode())
    num_windows = max(1, min(_WINDOWS_A_TENSOR, _MAX_WINDOWS // max(1, len(tensors))))
    with TensorFiles() as files:
        for name in sorted(tensors):
            entry = tensors[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            stored = files.read(entry).reshape(-1).view(torch.uint8)  # [bytes]
            for offset, length in _windows(len(stored), num_windows):
                digest.update(stored[offset : offset + length].numpy().data)
    return digest.hexdigest()


def _windows(num_bytes: int, num_windows: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of windows spread evenly from the first byte to the last; all of it where that is no more."""
    if num_bytes <= num_windows * _WINDOW_BYTES:
        yield 0, num_bytes
        return
    room = num_bytes - _WINDOW_BYTES
    for index in range(num_windows):
        yield room * index // max(1, num_windows - 1), _WINDOW_BYTES
