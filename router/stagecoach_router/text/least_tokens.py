"""How few tokens a text can have, told from its bytes alone: what cannot fit the context need not be encoded. Pure.

A byte cannot take up less of a token than one byte's part of the longest token that it occurs in. So the sum of these
parts over a text is never more than its tokens, whatever the merges and wherever the words end. Digits, which many
vocabularies have one by one, count whole; a letter counts as a twentieth or so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken

from stagecoach_router.text.detokenizer import bytes_of_token

# A byte's part of a token is a whole number of these, rounded down, so that the sum has no error.
_UNITS_PER_TOKEN = 1 << 20
# Characters that are counted at a time: some 0.2 ms, in which no other thread gets on.
_SLICE_CHARACTERS = 1 << 16
# What an added token may swallow beside it, where it says so.
_WHITESPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))
_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """The bound for one vocabulary.

    `units`: int64[256], by byte, its part of a token in 1/2^20. `composes`: characters may be put together before they
    are tokenized (NFC); then only ASCII counts, less what accents may have taken.
    """

    units: npt.NDArray[np.int64]
    composes: bool = False

    def of(self, text: str, enough: int) -> int:
        """So many tokens the text has at least. Counts no further than past `enough`."""
        num_units = 0
        composes = self.composes and not text.isascii()
        for start in range(0, len(text), _SLICE_CHARACTERS):
            data = np.frombuffer(text[start : start + _SLICE_CHARACTERS].encode("utf-8", "replace"), np.uint8)
            if composes:
                num_others = int(np.count_nonzero(data >= 0xC0))  # bytes that begin a character beyond ASCII
                num_taken = num_others + 1  # the next slice may begin with an accent
                num_ascii = int(self.units[data[data < 0x80]].sum()) - num_taken * int(self.units[:0x80].max())
                num_units += max(0, num_ascii)
            else:
                num_units += int(self.units[data].sum())
            if num_units // _UNITS_PER_TOKEN > enough:
                break
        return num_units // _UNITS_PER_TOKEN


def least_tokens(tokenizer: Mapping[str, Any], added: Sequence[AddedToken]) -> LeastTokens | None:
    """The bound for a tokenizer.json, and the tokens that were added to its vocabulary.

    None where we know of none that holds: with a normalizer or a pre-tokenizer that may leave text out, and with models
    other than BPE.
    """
    try:
        composes = _composes(tokenizer.get("normalizer"))
        tokens, known = _tokens(tokenizer["model"], byte_level=_is_byte_level(tokenizer.get("pre_tokenizer")))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    tokens += [(token.content.encode(), len(token.content.encode())) for token in added]
    units = np.zeros(256, np.int64)
    # What has no token of its own is left out, or goes with any number of others into the token for the unknown.
    missing = set(known)
    if any(token.lstrip or token.rstrip for token in added):
        missing -= set(_WHITESPACE.encode())
    for data, length in sorted(tokens, key=lambda token: token[1], reverse=True):  # the first that has a byte decides
        found = missing.intersection(data)
        units[list(found)] = _UNITS_PER_TOKEN // max(1, length)
        missing -= found
    return LeastTokens(units, composes)


def _composes(normalizer: Any) -> bool:
    """Whether the normalizer may put characters together. ValueError for one that may do more than mark spaces."""
    steps = _steps(normalizer, "normalizers")
    for step in steps:
        marks_spaces = step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, _MARK)
        if not marks_spaces and step["type"] not in ("Prepend", "NFC"):
            raise ValueError(step["type"])
    return any(step["type"] == "NFC" for step in steps)


def _is_byte_level(pre_tokenizer: Any) -> bool:
    """Whether the tokens are spelled in GPT-2's bytes. ValueError for a pre-tokenizer that may leave text out."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    for step in steps:
        splits = step["type"] == "Split" and step["behavior"] != "Removed"
        if not splits and step["type"] not in ("ByteLevel", "Digits", "Metaspace"):
            raise ValueError(step["type"])
    return any(step["type"] == "ByteLevel" for step in steps)


def _steps(entry: Any, name: str) -> list[Any]:
    """The steps of a normalizer or a pre-tokenizer, each of one kind."""
    if entry is None:
        return []
    if entry["type"] == "Sequence":
        return [step for inner in entry[name] for step in _steps(inner, name)]
    return [entry]


def _tokens(model: Mapping[str, Any], *, byte_level: bool) -> tuple[list[tuple[bytes, int]], set[int]]:
    """Of each token the bytes that it may stand for, and how many there are at most in one place; and the known bytes.

    Those are the ones that make a token by themselves where they make none with others.
    """
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(model["type"])
    vocabulary: Mapping[str, int] = model["vocab"]
    if byte_level:
        spelled = [bytes_of_token(token) for token in vocabulary]
        known = {data[0] for data, token in zip(spelled, vocabulary, strict=True) if len(data) == len(token) == 1}
        return [(data, len(data)) for data in spelled], known
    tokens = [((token + token.replace(_MARK, " ")).encode(), len(token.encode())) for token in vocabulary]
    spelled_bytes = [bytes.fromhex(token[3:5]) for token in vocabulary if re.fullmatch("<0x[0-9A-F]{2}>", token)]
    if model.get("byte_fallback") and len(spelled_bytes) == 256:
        return [*tokens, *((byte, 1) for byte in spelled_bytes)], set(range(256))
    return tokens, {byte for byte in range(0x80) if chr(byte).replace(" ", _MARK) in vocabulary}
