"""The small files of a checkpoint that a router needs: tokenizer, configuration, chat template.

They come from a folder or, over gRPC, from a shard. Here they are bytes by name, wherever they came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagecoach.errors import CheckpointError
from stagecoach.model_files import MAX_FILE_BYTES

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ModelFiles:
    """A checkpoint's small files by name: those that MAX_FILE_BYTES names, as far as there are any.

    Everything here raises CheckpointError, with the file as `field`, for one that is too large, is not UTF-8 or holds
    no JSON object.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._contents = {name: contents[name] for name in MAX_FILE_BYTES if name in contents}
        for name, data in self._contents.items():
            _check_size(name, len(data))

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelFiles:
        """Reads those files that the folder has."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no folder {folder}", field="model", value=folder)
        contents = {}
        for name in MAX_FILE_BYTES:
            path = folder / name
            if path.is_file():
                _check_size(name, path.stat().st_size)
                contents[name] = path.read_bytes()
        return cls(contents)

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    def __getitem__(self, name: str) -> bytes:
        """The file's bytes. Raises CheckpointError where it is absent."""
        if name not in self._contents:
            raise CheckpointError(f"the checkpoint has no {name}", field=name)
        return self._contents[name]

    def text(self, name: str) -> str:
        """The file as UTF-8 text."""
        try:
            return self[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{name} is not UTF-8: {error}", field=name) from error

    def json(self, name: str) -> dict[str, Any]:
        """The file's JSON object, or an empty one where the file is absent."""
        if name not in self:
            return {}
        try:
            content = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is not JSON: {error}", field=name) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{name} does not hold a JSON object", field=name)
        return content


def named_tokens(files: ModelFiles) -> dict[str, str]:
    """The tokens with a role, by the names that chat templates know them by."""
    entries = {**files.json("special_tokens_map.json"), **files.json("tokenizer_config.json")}
    named = {}
    for name in _NAMED_TOKENS:
        entry = entries.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and _is_unicode(content):
            named[name] = content
    return named


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can express it. JSON may hold halves of characters, which no tokenizer knows."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_size(name: str, num_bytes: int) -> None:
    limit = MAX_FILE_BYTES[name]
    if num_bytes > limit:
        raise CheckpointError(
            f"{name} has {num_bytes:,} bytes; at most {limit:,}", field=name, limit=limit, value=num_bytes
        )
