"""No text has fewer tokens than its bytes say, whatever the vocabulary; and what they say is not nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from stagecoach_router.text.least_tokens import LeastTokens, least_tokens

PROSE = [
    "the theme of these 1999 theses, und Tränen äöü",
    "  spaces    in code == 東京 12345",
    "e\u0301a\u030a naïve " * 3,
]
# What vocabularies have long tokens of, and what normalizers, pre-tokenizers and added tokens treat apart.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "the",
                " the",
                "  ",
                "    ",
                "==",
                "1999",
                "e\u0301",
                "\u212a",
                "äöü",
                "東京",
                "<mask>",
                "\t\n",
                "\u3000",
                "▁",
            ]
        ),
        st.text(max_size=6),
    ),
    max_size=40,
).map("".join)


def byte_level(*, normalizer: Any = None, added: tuple[AddedToken, ...] = (), alphabet: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    every_byte = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=every_byte, show_progress=False)
    tokenizer.train_from_iterator(PROSE * 20, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def sentence_piece(*, byte_fallback: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if byte_fallback else ["<unk>"]
    trained.train_from_iterator(
        PROSE * 20, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    saved = json.loads(trained.to_str())
    saved["model"]["byte_fallback"] = byte_fallback
    saved["added_tokens"] = saved["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(saved))


TOKENIZERS = {
    "bytes": byte_level(),
    "some bytes": byte_level(alphabet=False),
    "composing": byte_level(normalizer=normalizers.NFC()),
    "swallowing": byte_level(
        added=(AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("==========", special=True))
    ),
    "byte fallback": sentence_piece(byte_fallback=True),
    "unknown": sentence_piece(byte_fallback=False),
}


def bound(tokenizer: Tokenizer) -> LeastTokens | None:
    return least_tokens(json.loads(tokenizer.to_str()), list(tokenizer.get_added_tokens_decoder().values()))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_has_fewer(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    least = bound(tokenizer)
    assert least is not None

    @given(texts)
    @settings(max_examples=200)
    def check(text: str) -> None:
        assert least.of(text, enough=10**9) <= len(tokenizer.encode(text, add_special_tokens=False))

    check()
    long = "the theme of 1999 " * 100
    num_tokens = len(tokenizer.encode(long, add_special_tokens=False))
    assert 10 < least.of(long, enough=10**9) <= num_tokens


def test_what_stands_for_one_byte_counts_whole() -> None:
    least = bound(TOKENIZERS["bytes"])
    assert least is not None
    assert least.of("7" * 1000, enough=10**9) == 1000


def test_a_long_text_is_looked_at_until_it_is_too_long() -> None:
    least = bound(TOKENIZERS["bytes"])
    assert least is not None
    assert 100 < least.of("7" * 10**6, enough=100) < 10**6
    assert least.of("7" * 10**6, enough=10**6) == 10**6


def test_an_accent_on_what_the_next_slice_begins_with_is_not_counted_twice() -> None:
    least = bound(TOKENIZERS["composing"])
    assert least is not None
    text = "e\u0301" * 100_000
    assert least.of(text, enough=10**9) <= len(TOKENIZERS["composing"].encode(text))


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": {"type": "BPE", "vocab": {}, "continuing_subword_prefix": "##"}},
        {"model": None},
        {"model": {"type": "BPE", "vocab": None}},
    ],
)
def test_where_nothing_is_certain_nothing_is_said(changed: dict[str, Any]) -> None:
    assert least_tokens(json.loads(TOKENIZERS["bytes"].to_str()) | changed, []) is None


@pytest.mark.smollm2
def test_a_real_vocabulary(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    least = bound(tokenizer)
    assert least is not None
    for text, share in (("The quick brown fox. " * 500, 0.15), ("1234567890" * 500, 1.0), ("東京都" * 500, 0.1)):
        num_tokens = len(tokenizer.encode(text))
        assert share * num_tokens <= least.of(text, enough=10**9) <= num_tokens
