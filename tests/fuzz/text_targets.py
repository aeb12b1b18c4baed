"""Large texts and prompts: what a caller may send in one message, against encoder, renderer and detokenizer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from stagecoach.errors import OutOfRange
from stagecoach_router.text import tokenizer as router_tokenizer
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import TextKind
from tests.fuzz.engine import Target
from tests.fuzz.public_targets import ANYONE, CHAT_TEMPLATE, SPECIAL_TOKENS, WAIT_S

MAX_TOKENS = 2048
MAX_CHARACTERS = 50_000
MAX_PROMPT_TOKENS = 32_768
MAX_MESSAGES = 4096
SENTENCES = [
    "the theme of these 1999 theses, und Tränen",
    "  spaces    in code == 東京",
    "<|end|> \U0001f600\U0001f680",
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return tokenizer


def _byte_tokens() -> Tokenizer:
    vocabulary = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return tokenizer


def large_text(scratch: Path) -> Target:
    """The first byte says which tokenizer, and whether the rest is a text, a conversation or tokens, over and over."""
    libraries = [_byte_level(), _byte_tokens()]
    made = [
        router_tokenizer.Tokenizer(ModelFiles({"tokenizer.json": library.to_str().encode()})) for library in libraries
    ]
    config = json.dumps({"chat_template": CHAT_TEMPLATE}).encode()
    loop, process = asyncio.new_event_loop(), TemplateProcess()
    template = ChatTemplate.from_files(ModelFiles({"tokenizer_config.json": config}), process)
    pieces = [*SENTENCES, " ", "a", "\n", "7", "e\u0301", "\0", "-=" * 7, "<|user|>", "中"]
    corpus = [bytes([index % 6]) + piece.encode() for index, piece in enumerate(pieces)]

    def check(data: bytes) -> None:
        first = data[0] if data else 0
        tokenizer, kind = made[first % 2], first // 2 % 3
        piece = data[1:].decode("utf-8", "replace") or "x"
        if kind == 2:
            _detokenize(tokenizer, libraries[first % 2], data[1:] or b"x")
            return
        text = piece * (MAX_CHARACTERS // len(piece))
        if kind == 1:
            length = max(len(piece), MAX_CHARACTERS // MAX_MESSAGES)
            parts = [text[start : start + length] for start in range(0, len(text), length)]
            messages = [{"role": "user", "content": part} for part in parts]
            text = loop.run_until_complete(asyncio.wait_for(template.render(messages, ANYONE), WAIT_S))
        _encode(tokenizer, text)

    return Target(
        "large_text", corpus, check, share=1, max_input_bytes=1 << 10, max_s=3.0, max_allocated_bytes=64 << 20
    )


def _encode(tokenizer: router_tokenizer.Tokenizer, text: str) -> None:
    encoded = tokenizer.encode_within(text, MAX_TOKENS, TextKind.PROMPT)
    try:
        tokenizer.check_length(text, MAX_TOKENS, TextKind.PROMPT)
    except OutOfRange:
        assert encoded.num_tokens > MAX_TOKENS, "a text that fits was refused by its length"
        raise
    if encoded.token_ids is None:
        raise OutOfRange("too many tokens")
    assert len(encoded.token_ids) == encoded.num_tokens <= MAX_TOKENS


def _detokenize(tokenizer: router_tokenizer.Tokenizer, library: Tokenizer, data: bytes) -> None:
    """Each byte of `data` is a token, over and over: first of a prompt, and then of an answer."""
    token_ids = [byte * 3 for byte in data]
    prompt = tuple((token_ids * (MAX_PROMPT_TOKENS // len(token_ids)))[:MAX_PROMPT_TOKENS])
    tail = tokenizer.prompt_tail(prompt)
    for _ in range(64):
        tokenizer.detokenizer(tail)
    answer = prompt[: MAX_PROMPT_TOKENS // 16]
    known = [token_id for token_id in answer if token_id < tokenizer.num_known_ids]
    detokenizer = tokenizer.detokenizer()
    text = "".join(map(detokenizer.feed, answer)) + detokenizer.flush()
    assert text == library.decode(known)
