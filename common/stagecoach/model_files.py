"""A checkpoint's small files, which a shard has and a router needs: which they are, and whether two have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

# The files, and how large each may be. The largest tokenizers in use have some 35 MB.
MAX_FILE_BYTES: Mapping[str, int] = {
    "tokenizer.json": 128 << 20,
    "tokenizer_config.json": 8 << 20,
    "special_tokens_map.json": 1 << 20,
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
}


def files_digest(contents: Mapping[str, bytes]) -> str:
    """SHA-256 over the small files by name, as hexadecimal digits; "" for files without a tokenizer: of no use."""
    if "tokenizer.json" not in contents:
        return ""
    digest = hashlib.sha256()
    for name in sorted(MAX_FILE_BYTES):
        if name in contents:
            digest.update(f"{name} {len(contents[name])}\n".encode())
            digest.update(contents[name])
    return digest.hexdigest()
