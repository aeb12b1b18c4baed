"""The tensors of a checkpoint: which there are, by the headers of its safetensors files, and where each is read from.

`safetensors` itself checks a header: its length, its JSON, and that the tensors' byte ranges fit their dtypes and
shapes and fill the file without a gap or an overlap. Ours to check is the index, which says what is in which file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stagecoach.errors import CheckpointError
from stagecoach_shard.checkpoints.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What is known of a tensor before it is read."""

    name: str
    dtype: str  # as safetensors spells it, such as "BF16"
    shape: tuple[int, ...]
    file: Path


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
    table = {}
    if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
        raise CheckpointError(f"{path} is not a regular file", field=path.name)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                tensor = file.get_slice(name)
                table[name] = TensorEntry(name, tensor.get_dtype(), tuple(tensor.get_shape()), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", field=path.name) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} is truncated or not safetensors: {error}", field=path.name) from error
    return table


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
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
