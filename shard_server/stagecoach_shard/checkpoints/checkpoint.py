"""A checkpoint folder as transformers writes it, opened read-only: config.json and one or more safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stagecoach.errors import CheckpointError
from stagecoach.model_files import MAX_FILE_BYTES, files_digest
from stagecoach_shard.checkpoints.file_stamps import FileStamps
from stagecoach_shard.checkpoints.fingerprint import fingerprint
from stagecoach_shard.checkpoints.json_file import read_json_object
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.checkpoints.tensor_files import TensorFiles
from stagecoach_shard.checkpoints.tensor_table import INDEX_FILE, TensorEntry, read_tensor_table

_MAX_CONFIG_BYTES = 8 << 20  # a real one has kilobytes
_LAYER = re.compile(r"model\.layers\.([0-9]+)(?:\.|$)")
_MAX_DIGITS = 9
# The dtypes that a weight may be stored in; it is cast to the stage's.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: all that is known of a model before its weights are read."""

    name: str  # the folder's
    path: Path
    config: ModelConfig
    fingerprint: str  # two checkpoints with the same one are taken for the same model
    tensors: dict[str, TensorEntry]
    weight_stamps: FileStamps  # of config.json and the tensor files
    files_digest: str = ""  # of the small files that a router needs; "": there is no tokenizer among them
    names_read: list[str] = field(default_factory=list)  # tensors whose data was read, in order

    @classmethod
    def open(cls, path: Path, read_config: Callable[[RawConfig], ModelConfig]) -> Checkpoint:
        """Reads config.json, the tensor files' headers and samples of their bytes.

        `read_config` is told config.json's fields, and knows the families of models. Raises CheckpointError, `field`
        naming the file, the config field or the tensor at fault.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder", field="path", value=path)
        # Before anything is read, so that no change after it goes unseen.
        weight_stamps = FileStamps([path / "config.json", path / INDEX_FILE, *path.glob("*.safetensors")])
        config = read_config(RawConfig(read_json_object(path / "config.json", _MAX_CONFIG_BYTES)))
        tensors = read_tensor_table(path)
        for name in tensors:
            layer = _LAYER.match(name)
            if layer is not None and (len(layer[1]) > _MAX_DIGITS or int(layer[1]) >= config.num_layers):
                raise CheckpointError(
                    f"{name}: config.json says there are {config.num_layers} layers",
                    field="num_hidden_layers",
                    limit=config.num_layers,
                    value=layer[1],
                )
        digest = files_digest({name: file.read_bytes() for name, file in _small_files(path).items()})
        return cls(
            name=path.resolve().name,
            path=path,
            config=config,
            fingerprint=fingerprint(config, tensors),
            tensors=tensors,
            weight_stamps=weight_stamps,
            files_digest=digest,
        )

    def tokenizer_files(self) -> dict[str, Path]:
        """By name, the files that a router needs to tokenize and to render chats, as far as they are there."""
        return _small_files(self.path)

    @contextmanager
    def reader(
        self, dtype: torch.dtype, device: torch.device, on_read: Callable[[], None] = lambda: None
    ) -> Iterator[TensorReader]:
        """Reads tensors one at a time, cast to `dtype` on `device`. `on_read` is called after each."""
        with TensorFiles() as files:
            yield TensorReader(self, files, dtype, device, on_read)


def _small_files(folder: Path) -> dict[str, Path]:
    """Those that are there, and not larger than any router takes."""
    paths = {name: folder / name for name in MAX_FILE_BYTES if (folder / name).is_file()}
    return {name: path for name, path in paths.items() if path.stat().st_size <= MAX_FILE_BYTES[name]}


@dataclass(frozen=True, slots=True)
class TensorReader:
    """Reads the tensors of a checkpoint, cast to one dtype on one device."""

    checkpoint: Checkpoint
    files: TensorFiles
    dtype: torch.dtype
    device: torch.device
    on_read: Callable[[], None]

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor, which must have exactly this shape."""
        return self.read_stacked([(name, shape)])

    def read_stacked(self, parts: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        """Tensors that differ in their first dimension at most, one below the other; `parts` are (name, shape).

        Raises CheckpointError, naming the tensor and both shapes, for one that is missing, of another shape or not of
        floating point.
        """
        entries = [self._entry(name, shape) for name, shape in parts]
        rows = sum(entry.shape[0] for entry in entries)
        stacked = torch.empty(rows, *entries[0].shape[1:], dtype=self.dtype, device=self.device)
        start = 0
        for entry in entries:
            stacked[start : start + entry.shape[0]].copy_(self.files.read(entry))
            start += entry.shape[0]
            self.checkpoint.names_read.append(entry.name)
            self.on_read()
        return stacked

    def _entry(self, name: str, shape: Sequence[int]) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(
                f"{name} is missing; config.json asks for it with shape {list(shape)}", field=name, limit=list(shape)
            )
        if list(entry.shape) != list(shape):
            raise CheckpointError(
                f"{name} has shape {list(entry.shape)}; config.json asks for {list(shape)}",
                field=name,
                limit=list(shape),
                value=list(entry.shape),
            )
        if entry.dtype not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{name} has dtype {entry.dtype}; weights must be one of {', '.join(_WEIGHT_DTYPES)}",
                field=name,
                limit=", ".join(_WEIGHT_DTYPES),
                value=entry.dtype,
            )
        return entry
