"""An open GGUF file: typed access to its metadata, and its tensors as rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, quants

from stagecoach.errors import CheckpointError
from stagecoach_gguf.gguf_header import check_header

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor as it lies in the file.

    `shape` is in the order of torch: [out_features, in_features] for a linear layer. `data` is a view into the mapped
    file, [*shape[:-1], bytes or elements of one row]; quantization never crosses a row.
    """

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    data: npt.NDArray[Any]

    def values(self, rows: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float32]:
        """What `rows` of `data`, by default all, stand for. Raises CheckpointError for what cannot be undone."""
        try:
            values: npt.NDArray[np.float32] = quants.dequantize(self.data if rows is None else rows, self.quantization)
        except NotImplementedError as error:
            raise CheckpointError(
                f"tensor {self.name} is quantized as {self.quantization.name}, which cannot be undone",
                field=self.name,
                value=self.quantization.name,
            ) from error
        return values


class GGUFFile:
    """Raises CheckpointError for a file that is no GGUF, truncated, or has a key missing or of the wrong type."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_header(path)
            reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{path.name} cannot be read: {error}", field="source", value=path.name) from error
        self._fields = reader.fields
        self.tensors: dict[str, GGUFTensor] = {
            tensor.name: GGUFTensor(
                tensor.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                tensor.tensor_type,
                tensor.data,
            )
            for tensor in reader.tensors
        }

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def keys_under(self, prefix: str) -> list[str]:
        """The metadata keys that begin with `prefix`."""
        return [key for key in self._fields if key.startswith(prefix)]

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, str, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        return self._get(key, bool, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        return self._get(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A real number, as the shortest decimal that gives the stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self._get(key, float, default)
        return float(str(np.float32(value)))

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        """An array of whole numbers."""
        return self._list(key, int)

    def numbers(self, key: str) -> list[float]:
        """An array of real numbers."""
        return self._list(key, float)

    def _get(self, key: str, kind: type[T], default: T | None) -> T:
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise CheckpointError(f"{self.path.name} has no {key}", field=key)
            return default
        return self._checked(key, self._contents(key), kind)

    def _list(self, key: str, kind: type[T]) -> list[T]:
        if key not in self._fields:
            raise CheckpointError(f"{self.path.name} has no {key}", field=key)
        items = self._contents(key)
        if not isinstance(items, list):
            raise CheckpointError(f"{key} is not an array", field=key, value=items)
        return [self._checked(key, item, kind) for item in items]

    def _contents(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{key} is not UTF-8: {error}", field=key) from error

    @staticmethod
    def _checked(key: str, value: Any, kind: type[T]) -> T:
        # bool is an int to Python, and never one in a GGUF file
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{key} must be of type {kind.__name__}; it is {type(value).__name__}", field=key, value=value
            )
        return value
