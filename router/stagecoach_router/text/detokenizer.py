"""Turns tokens into text as they come: never half a character, never a character twice.

We do not use the tokenizers library's DecodeStream. It raises on some sequences of byte tokens, releases text that the
rest of the sequence changes, and takes quadratic time on bytes that never become a character. Instead we read which
decoder tokenizer.json asks for and do the same, one token at a time. What comes out is what the library's `decode`
makes of the whole sequence.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stagecoach.errors import CheckpointError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# How the vocabulary spells a token; None for a token that leaves no text.
TokenSpelling = Callable[[int], str | None]


class IncrementalDetokenizer(Protocol):
    """The text of one completion. Its time is linear in the tokens."""

    def feed(self, token_id: int) -> str:
        """Takes one more token. Returns the text that is now final: often none, or several characters."""

    def flush(self) -> str:
        """Ends the sequence. Returns what was held back, with U+FFFD for bytes that make no character."""


class TextDecoder(Protocol):
    """A tokenizer's way from tokens to text."""

    def start(self, prompt: Sequence[int]) -> IncrementalDetokenizer:
        """For the tokens that follow `prompt`. If that ends within a character, they begin with the whole of it."""

    def token_text(self, token_id: int) -> str:
        """One token as it reads in the midst of text. Where it is only part of a character, U+FFFD stands for that."""


def text_decoder(decoder: Any, spelling: TokenSpelling) -> TextDecoder:
    """The decoder that tokenizer.json describes. CheckpointError for one that no language model we know of uses."""
    try:
        steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = " ".join(step["type"] for step in steps)
        if kinds == "ByteLevel":
            return ByteLevelDecoder(spelling)
        if kinds == "Metaspace":
            drops_first = steps[0]["prepend_scheme"] != "never"
            return MetaspaceDecoder(spelling, steps[0]["replacement"], drops_first=drops_first)
        if re.fullmatch(r"Replace( Replace)*( ByteFallback)?( Fuse( Strip)?)?", kinds):
            return _sentence_piece(spelling, steps)
        raise ValueError(kinds)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer's decoder cannot be used: {str(decoder)[:200]}",
            field="tokenizer.json",
            limit="ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip",
            value=decoder,
        ) from error


def _sentence_piece(spelling: TokenSpelling, steps: list[dict[str, Any]]) -> SentencePieceDecoder:
    by_kind = {step["type"]: step for step in steps}
    strip = by_kind.get("Strip")
    if strip is not None and (strip["start"], strip["stop"]) != (1, 0):
        raise ValueError(strip)
    return SentencePieceDecoder(
        spelling,
        replacements=tuple((step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"),
        byte_fallback="ByteFallback" in by_kind,
        strip="" if strip is None else strip["content"],
    )


class ByteLevelDecoder:
    """For tokens of which every character stands for one byte (GPT-2, Llama 3, Qwen, SmolLM)."""

    def __init__(self, spelling: TokenSpelling) -> None:
        self._texts = _TokenTexts(spelling)

    def start(self, prompt: Sequence[int]) -> IncrementalDetokenizer:
        # An unfinished character lies in the last three bytes; what comes before cannot matter.
        tail = b""
        for token_id in reversed(prompt):
            tail = self._texts.bytes_of(token_id) + tail
            if len(tail) >= 3:
                break
        return _ByteLevelDetokenizer(self._texts, tail)

    def token_text(self, token_id: int) -> str:
        return self._texts.bytes_of(token_id).decode("utf-8", "replace")


class _TokenTexts(dict[int, str | bytes]):
    """What each token adds: text where it is whole characters, else bytes. It is looked up once, for all requests."""

    __slots__ = ("_spelling",)

    def __init__(self, spelling: TokenSpelling) -> None:
        self._spelling = spelling

    def __missing__(self, token_id: int) -> str | bytes:
        data = bytes_of_token(self._spelling(token_id) or "")
        text: str | bytes
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data
        self[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> bytes:
        text = self[token_id]
        return text.encode() if isinstance(text, str) else text


class _ByteLevelDetokenizer:
    def __init__(self, texts: _TokenTexts, tail: bytes) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode(tail)

    def feed(self, token_id: int) -> str:
        text = self._texts[token_id]
        if isinstance(text, str):
            if not self._in_character or not text:
                return text
            text = text.encode()
        return self._decode(text)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _decode(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        self._in_character = bool(self._decoder.getstate()[0])  # bytes are held back: what comes next goes with them
        return text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def bytes_of_token(token: str) -> bytes:
    """The bytes a token stands for. An added token with other characters stands for itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


@dataclass(frozen=True, slots=True)
class SentencePieceDecoder:
    """For tokens that are text with marked spaces, and <0xNN> for a byte of what the vocabulary lacks (Llama 2, Gemma).

    `replacements` turn marks into spaces. `strip` is what the encoder put before the text, and is taken off once.
    """

    spelling: TokenSpelling
    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip: str

    def start(self, prompt: Sequence[int]) -> IncrementalDetokenizer:
        run = bytearray()
        follows_text = False
        for token_id in reversed(prompt):
            token = self.spelling(token_id)
            byte = self.byte_of(token) if token else None
            follows_text = follows_text or bool(token)
            if token and byte is None:
                break
            if byte is not None:
                run.insert(0, byte)
            if len(run) >= 3:  # an unfinished character lies in the last three bytes
                break
        return _SentencePieceDetokenizer(self, _unfinished(bytes(run)), "" if follows_text else self.strip)

    def token_text(self, token_id: int) -> str:
        token = self.spelling(token_id) or ""
        byte = self.byte_of(token)
        return self.replace(token) if byte is None else bytes([byte]).decode("utf-8", "replace")

    def replace(self, token: str) -> str:
        """The token's text, with its spaces."""
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token

    def byte_of(self, token: str) -> int | None:
        """The byte that a token such as <0x0A> stands for; None for any other token."""
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return None
        return None


class _SentencePieceDetokenizer:
    """Holds back a run of byte tokens until it ends: it is UTF-8 as a whole, or else each byte of it is U+FFFD."""

    def __init__(self, decoder: SentencePieceDecoder, run: bytes, strip: str) -> None:
        self._decoder = decoder
        self._run = bytearray(run)
        self._strip = strip

    def feed(self, token_id: int) -> str:
        token = self._decoder.spelling(token_id)
        if token is None:
            return ""
        byte = self._decoder.byte_of(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + self._decoder.replace(token))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        if text and self._strip:
            text = text.removeprefix(self._strip)
            self._strip = ""
        return text


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character and do not finish it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


@dataclass(frozen=True, slots=True)
class MetaspaceDecoder:
    """For tokens that are text with marked spaces, without byte tokens.

    `drops_first`: the encoder put a mark before the text, so those of the first token are no spaces.
    """

    spelling: TokenSpelling
    replacement: str
    drops_first: bool

    def start(self, prompt: Sequence[int]) -> IncrementalDetokenizer:
        follows_text = any(self.spelling(token_id) is not None for token_id in prompt)
        return _MetaspaceDetokenizer(self, drops_next=self.drops_first and not follows_text)

    def token_text(self, token_id: int) -> str:
        return (self.spelling(token_id) or "").replace(self.replacement, " ")


class _MetaspaceDetokenizer:
    def __init__(self, decoder: MetaspaceDecoder, *, drops_next: bool) -> None:
        self._decoder = decoder
        self._drops_next = drops_next

    def feed(self, token_id: int) -> str:
        token = self._decoder.spelling(token_id)
        if token is None:
            return ""
        text = token.replace(self._decoder.replacement, "" if self._drops_next else " ")
        self._drops_next = False
        return text

    def flush(self) -> str:
        return ""
