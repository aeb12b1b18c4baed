"""Turns tokens into text as they come: never half a character, never a character twice.

We do not use the tokenizers library's DecodeStream. It raises on some sequences of byte tokens, releases text that the
rest of the sequence changes, and takes quadratic time on bytes that never become a character. Instead we read which
decoder tokenizer.json asks for and do the same, one token at a time. What comes out is what the library's `decode`
makes of the whole sequence.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from stagecoach.errors import CheckpointError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# The text of a token as the vocabulary spells it; None for a token to leave out.
TokenSpelling = Callable[[int], str | None]


class IncrementalDetokenizer(Protocol):
    """The text of one completion. Time is linear in the tokens."""

    def feed(self, token_id: int) -> str:
        """One more token; returns the text that is now final, often empty or several characters."""

    def flush(self) -> str:
        """The sequence ends here; returns what was held back, U+FFFD for bytes that make no character."""


class TextDecoder(Protocol):
    """A tokenizer's way from tokens to text."""

    def start(self, spelling: TokenSpelling, prompt: Sequence[int]) -> IncrementalDetokenizer:
        """For the tokens that follow `prompt`. A character that the prompt leaves unfinished is finished in them."""

    def token_text(self, token: str) -> str:
        """A token by itself, as it reads in the midst of text; bytes that make no character are U+FFFD."""


def text_decoder(decoder: Any) -> TextDecoder:
    """The decoder that tokenizer.json describes. CheckpointError for one that no language model we know of uses."""
    try:
        steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return ByteLevelDecoder()
        if kinds == ["Metaspace"]:
            return MetaspaceDecoder(steps[0]["replacement"], drops_first=steps[0]["prepend_scheme"] != "never")
        return _sentence_piece(kinds, steps)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer's decoder cannot be used: {str(decoder)[:200]}",
            field="tokenizer.json",
            limit="ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip",
            value=decoder,
        ) from error


def _sentence_piece(kinds: list[str], steps: list[dict[str, Any]]) -> SentencePieceDecoder:
    """Replace, ByteFallback, Fuse, Strip: in this order, all but the first optional. ValueError for anything else."""
    replacements, rest = [], list(zip(kinds, steps, strict=True))
    while rest and rest[0][0] == "Replace":
        step = rest.pop(0)[1]
        replacements.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(rest) and rest[0][0] == "ByteFallback"
    rest = rest[1:] if byte_fallback else rest
    fuses = bool(rest) and rest[0][0] == "Fuse"
    rest = rest[1:] if fuses else rest
    strip = ""
    if fuses and rest and rest[0][0] == "Strip" and (rest[0][1]["start"], rest[0][1]["stop"]) == (1, 0):
        strip = rest.pop(0)[1]["content"]
    if rest or not replacements:
        raise ValueError(kinds)
    return SentencePieceDecoder(tuple(replacements), byte_fallback, strip)


class _TokenTexts(dict[int, str | bytes]):
    """What tokens add, by id, kept from their first use: text where a token is whole characters, else bytes."""

    __slots__ = ("_spelling",)

    def __init__(self, spelling: TokenSpelling) -> None:
        self._spelling = spelling

    def __missing__(self, token_id: int) -> str | bytes:
        data = _bytes_of(self._spelling(token_id) or "")
        text: str | bytes
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data
        self[token_id] = text
        return text


class ByteLevelDecoder:
    """Every character of a token stands for one byte (GPT-2, Llama 3, Qwen, SmolLM)."""

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[TokenSpelling, _TokenTexts] = WeakKeyDictionary()

    def start(self, spelling: TokenSpelling, prompt: Sequence[int]) -> IncrementalDetokenizer:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # An unfinished character lies in the last three bytes; what comes before cannot matter.
        tail = b""
        for token_id in reversed(prompt):
            tail = _bytes_of(spelling(token_id) or "") + tail
            if len(tail) >= 3:
                break
        decoder.decode(tail)
        texts = self._texts.get(spelling)
        if texts is None:
            texts = self._texts[spelling] = _TokenTexts(spelling)
        return _ByteLevelDetokenizer(texts, decoder)

    def token_text(self, token: str) -> str:
        return _bytes_of(token).decode("utf-8", "replace")


class _ByteLevelDetokenizer:
    """`_in_character`: bytes are held back, so that what comes next is not text by itself."""

    def __init__(self, texts: _TokenTexts, decoder: codecs.IncrementalDecoder) -> None:
        self._texts = texts
        self._decoder = decoder
        self._in_character = bool(decoder.getstate()[0])

    def feed(self, token_id: int) -> str:
        text = self._texts[token_id]
        if isinstance(text, str):
            if not self._in_character or not text:
                return text
            text = text.encode()
        text = self._decoder.decode(text)
        self._in_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    """The bytes a token stands for. An added token with other characters stands for itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


@dataclass(frozen=True, slots=True)
class SentencePieceDecoder:
    """Tokens are text with marked spaces, and bytes as <0xNN> where the vocabulary lacks a character (Llama 2, Gemma).

    `strip` is taken from the start of the text, once, where the encoder had put a space; "" for none.
    """

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip: str

    def start(self, spelling: TokenSpelling, prompt: Sequence[int]) -> IncrementalDetokenizer:
        run = bytearray()
        follows_text = False
        for token_id in reversed(prompt):
            token = spelling(token_id)
            byte = self.byte_of(token) if token else None
            follows_text = follows_text or bool(token)
            if token and byte is None:
                break
            if byte is not None:
                run.insert(0, byte)
        return _SentencePieceDetokenizer(self, spelling, _unfinished(bytes(run)), "" if follows_text else self.strip)

    def token_text(self, token: str) -> str:
        byte = self.byte_of(token)
        return self.replace(token) if byte is None else bytes([byte]).decode("utf-8", "replace")

    def replace(self, token: str) -> str:
        """The token's text, with its spaces."""
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token

    def byte_of(self, token: str) -> int | None:
        """The byte that a token such as <0x0A> stands for."""
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return None
        return None


class _SentencePieceDetokenizer:
    """A run of byte tokens is text only when it has ended: as a whole it is UTF-8, or each byte of it is U+FFFD."""

    def __init__(self, decoder: SentencePieceDecoder, spelling: TokenSpelling, run: bytes, strip: str) -> None:
        self._decoder = decoder
        self._spelling = spelling
        self._run = bytearray(run)
        self._strip = strip

    def feed(self, token_id: int) -> str:
        token = self._spelling(token_id)
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
    """Tokens are text with marked spaces, without byte tokens. `drops_first`: the first token's marks are no spaces."""

    replacement: str
    drops_first: bool

    def start(self, spelling: TokenSpelling, prompt: Sequence[int]) -> IncrementalDetokenizer:
        follows_text = any(spelling(token_id) is not None for token_id in prompt)
        return _MetaspaceDetokenizer(self, spelling, drops_next=self.drops_first and not follows_text)

    def token_text(self, token: str) -> str:
        return token.replace(self.replacement, " ")


class _MetaspaceDetokenizer:
    def __init__(self, decoder: MetaspaceDecoder, spelling: TokenSpelling, *, drops_next: bool) -> None:
        self._decoder = decoder
        self._spelling = spelling
        self._drops_next = drops_next

    def feed(self, token_id: int) -> str:
        token = self._spelling(token_id)
        if token is None:
            return ""
        text = token.replace(self._decoder.replacement, "" if self._drops_next else " ")
        self._drops_next = False
        return text

    def flush(self) -> str:
        return ""
