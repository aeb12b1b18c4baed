"""Reads tensors out of safetensors files, which stay open and mapped into memory until a `with` block ends."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagecoach.errors import CheckpointError
from stagecoach_shard.checkpoints.tensor_table import TensorEntry

# Beside its own errors `safetensors` passes on what torch makes of a dtype or a size that it does not have.
_READ_ERRORS = (SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError)


class TensorFiles(ExitStack):
    """Opens each file once. What it reads are views into the file, so only what is looked at is fetched from it."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, Any] = {}
        self.callback(self._files.clear)

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor as it was stored, on the CPU. Raises CheckpointError with its name."""
        try:
            file = self._files.get(entry.file)
            if file is None:
                file = self.enter_context(safe_open(entry.file, framework="pt"))
                self._files[entry.file] = file
            tensor: Tensor = file.get_tensor(entry.name)
        except _READ_ERRORS as error:
            raise CheckpointError(
                f"{entry.name} cannot be read from {entry.file.name}: {error}", field=entry.name
            ) from error
        return tensor
