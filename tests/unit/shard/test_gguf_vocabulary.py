"""From a GGUF file's metadata to a tokenizer: the same tokens for the same text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_REGEX

from stagecoach.errors import CheckpointError
from stagecoach_gguf.byte_level import byte_level_recipe
from stagecoach_gguf.gguf_file import GGUFFile
from stagecoach_gguf.sentence_piece import merges_of, sentence_piece_tokenizer
from stagecoach_gguf.vocabulary import Vocabulary
from tests.gguf_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, GGUFModel, byte_level_tokens

LLAMA3_REGEX = TikTokenConverter(vocab_file="unused").pattern


def vocabulary(folder: Path, vocab_size: int = 10_000, **metadata: Any) -> Vocabulary:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    model = GGUFModel(metadata={f"tokenizer.{key}": value for key, value in keys.items()})
    return Vocabulary(GGUFFile(model.write(folder / "model.gguf")), vocab_size)


def saved(folder: Path, **metadata: Any) -> tuple[Tokenizer, dict[str, Any]]:
    config = vocabulary(folder, **metadata).write(folder, 128)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), config


def with_regex(pattern: str, *before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([*before, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How the models' own tokenizers cut text, from other sources than ours.
REFERENCES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": with_regex(QWEN2_REGEX),
    "llama-bpe": with_regex(LLAMA3_REGEX),
}
pieces = st.sampled_from(
    [
        "I'll",
        "WE'VE",
        " the",
        "  ",
        "\n\n",
        "\t",
        " \r\n",
        "123",
        "4567890",
        " 42",
        "²Ⅷ",
        "é",
        "東京",
        "...",
        " ?!",
        "🎉",
        "_x",
    ]
)
texts = st.one_of(st.text(max_size=20), st.lists(pieces, max_size=8).map("".join))


@pytest.mark.parametrize("pre", REFERENCES)
@given(text=texts)
@example(text="It's 12345 isn't\n\n  it?  ")
def test_text_is_cut_as_the_models_own_tokenizers_do(pre: str, text: str) -> None:
    tokenizer = byte_level_recipe(pre).tokenizer({"a": 0}, [])
    assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == REFERENCES[pre].pre_tokenize_str(text)


def test_an_unrecognised_tokenizer_is_cut_as_llama_cpp_does() -> None:
    cut = byte_level_recipe("default").tokenizer({"a": 0}, []).pre_tokenizer.pre_tokenize_str("a+b 12345")
    assert [piece for piece, _ in cut] == ["a", "+", "b", "Ġ", "123", "45"]


def test_qwen2_composes_characters() -> None:
    recipe = byte_level_recipe("qwen2")
    assert recipe.tokenizer({"a": 0}, []).normalizer.normalize_str("e\u0301") == "é"
    assert byte_level_recipe("gpt-2").tokenizer({"a": 0}, []).normalizer is None


def test_an_unknown_way_to_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chameleon") as caught:
        vocabulary(tmp_path, ggml__pre="chameleon")
    assert caught.value.field == "tokenizer.ggml.pre"


def test_control_tokens_are_found_in_text_and_left_out_of_it(tmp_path: Path) -> None:
    tokenizer, _ = saved(tmp_path)
    tokens = byte_level_tokens()
    token_ids = tokenizer.encode("<|user|>he<|end|>").ids
    assert [tokens[token_id] for token_id in token_ids] == ["<|user|>", "he", "<|end|>"]
    assert tokenizer.decode(token_ids) == "he"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<|user|>he<|end|>"


def test_user_defined_tokens_are_found_in_text_and_stay_in_it(tmp_path: Path) -> None:
    tokens = [*byte_level_tokens(), "<tool call>"]
    tokenizer, _ = saved(tmp_path, ggml__tokens=tokens, ggml__token_type=[*[NORMAL] * (len(tokens) - 1), USER_DEFINED])
    token_ids = tokenizer.encode("a<tool call>b").ids
    assert token_ids[1] == len(tokens) - 1
    assert tokenizer.decode(token_ids) == "a<tool call>b"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "h i"),
        ({"ggml__add_bos_token": True}, "<s> h i"),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, "<s> h i <|end|>"),
        ({"ggml__pre": "llama-bpe"}, "<s> h i"),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, "h i"),
        ({"ggml__pre": "qwen2"}, "h i"),
    ],
)
def test_a_prompt_gets_the_special_tokens_the_file_asks_for(
    metadata: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    tokenizer, _ = saved(tmp_path, ggml__bos_token_id=byte_level_tokens().index("<s>"), **metadata)
    assert tokenizer.encode("hi").tokens == expected.split()
    assert tokenizer.encode("hi", add_special_tokens=False).tokens == ["h", "i"]


def test_every_token_that_ends_a_turn_ends_a_completion(tmp_path: Path) -> None:
    special = vocabulary(tmp_path, ggml__eot_token_id=257, ggml__eom_token_id=256, ggml__padding_token_id=258).special
    assert special.config() == {"eos_token_id": 256, "pad_token_id": 258}
    assert special.generation_config() == {"eos_token_id": [256, 257], "pad_token_id": 258}


def test_chat_templates_come_along(tmp_path: Path) -> None:
    _, config = saved(tmp_path, chat_template="{{ messages }}")
    assert config["chat_template"] == "{{ messages }}"
    assert (config["eos_token"], config["model_max_length"]) == ("<|end|>", 128)
    _, config = saved(tmp_path, **{"chat_template": "plain", "chat_template.tool_use": "tools"})
    assert config["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    _, config = saved(tmp_path)
    assert "chat_template" not in config


def test_transformers_reads_the_files_the_same_way(tmp_path: Path) -> None:
    tokenizer, config = saved(tmp_path, ggml__pre="smollm", chat_template="<s>{{ messages[0].content }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>héhe 123<|end|>"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.eos_token_id == 256
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi"


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"ggml__model": "bert"}, "tokenizer.ggml.model"),
        ({"ggml__tokens": None}, "tokenizer.ggml.tokens"),
        ({"ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"ggml__tokens": "text"}, "tokenizer.ggml.tokens"),
        ({"ggml__merges": None}, "tokenizer.ggml.merges"),
        ({"ggml__merges": ["he"]}, "tokenizer.ggml.merges"),
        ({"ggml__merges": ["h e r"]}, "tokenizer.ggml.merges"),
        ({"ggml__merges": ["h nothing"]}, "tokenizer.ggml.merges"),
        ({"ggml__token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"ggml__token_type": [9] * len(byte_level_tokens())}, "tokenizer.ggml.token_type"),
        ({"ggml__tokens": ["a"] * len(byte_level_tokens())}, "tokenizer.ggml.tokens"),
        ({"ggml__eos_token_id": 10_000}, "tokenizer.ggml.eos_token_id"),
        ({"ggml__add_bos_token": True}, "tokenizer.ggml.bos_token_id"),
    ],
)
def test_a_tokenizer_that_does_not_fit_together_is_refused(
    metadata: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        saved(tmp_path, **metadata)
    assert caught.value.field == field


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        vocabulary(tmp_path, vocab_size=10)
    assert (caught.value.limit, caught.value.value) == ("10", str(len(byte_level_tokens())))


def sentence_piece(text: str, scores: dict[str, float]) -> list[str]:
    """The algorithm as SentencePiece describes it: join the best-scored neighbours, the leftmost of equals."""
    symbols = list(text)
    while True:
        joint = [left + right for left, right in itertools.pairwise(symbols)]
        known = [(-scores[piece], place) for place, piece in enumerate(joint) if piece in scores]
        if not known:
            return symbols
        _, place = min(known)
        symbols[place : place + 2] = [joint[place]]


@given(
    st.lists(st.text("ab▁", min_size=2, max_size=5), unique=True, max_size=16),
    st.lists(st.text("ab▁", min_size=1, max_size=16), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_merges_join_text_as_sentence_piece_does(longer: list[str], texts: list[str], random: Any) -> None:
    vocab = ["a", "b", "▁", *longer]
    ranks = list(range(len(vocab)))
    random.shuffle(ranks)
    scores = {piece: -float(rank) for piece, rank in zip(vocab, ranks, strict=True)}
    ids = {piece: index for index, piece in enumerate(vocab)}
    tokenizer = sentence_piece_tokenizer(ids, merges_of(list(scores.items())), None, adds_space=False)
    for text in texts:
        assert tokenizer.encode(text).tokens == sentence_piece(text, scores)


def test_pieces_with_equal_scores_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        merges_of([("a", -1.0), ("aa", -2.0), ("aaa", -2.0)])
    assert caught.value.field == "tokenizer.ggml.scores"
    # Where no two make one, scores do not matter.
    assert merges_of([("a", 0.0), ("b", 0.0), ("xy", 0.0)]) == []


LLAMA_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
LLAMA = {
    "ggml__model": "llama",
    "ggml__pre": None,
    "ggml__merges": None,
    "ggml__tokens": LLAMA_TOKENS,
    "ggml__token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5],
    "ggml__scores": [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0],
    "ggml__unknown_token_id": 0,
    "ggml__bos_token_id": 1,
    "ggml__eos_token_id": 2,
}


def test_a_sentence_piece_tokenizer_spells_what_it_lacks_in_bytes(tmp_path: Path) -> None:
    tokenizer, _ = saved(tmp_path, **LLAMA)
    encoded = tokenizer.encode("hi é")
    assert encoded.tokens == ["<s>", "▁hi", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "hi é"
    assert tokenizer.encode("hi</s>hi").tokens == ["<s>", "▁hi", "</s>", "▁hi"]
    assert tokenizer.decode(tokenizer.encode("<unk>hi").ids) == "hi"


def test_a_sentence_piece_tokenizer_without_a_first_space(tmp_path: Path) -> None:
    tokenizer, _ = saved(tmp_path, **LLAMA, ggml__add_space_prefix=False, ggml__add_bos_token=False)
    assert tokenizer.encode("hi hi").tokens == ["h", "i", "▁hi"]
    assert tokenizer.decode(tokenizer.encode(" hi").ids) == " hi"


def test_scores_must_be_there_for_each_piece(tmp_path: Path) -> None:
    for scores in (None, [0.0]):
        with pytest.raises(CheckpointError) as caught:
            saved(tmp_path, **{**LLAMA, "ggml__scores": scores})
        assert caught.value.field == "tokenizer.ggml.scores"


@pytest.mark.smollm2
def test_smollm2_counts_digit_by_digit(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("In 2024: 7½").tokens == ["In", "Ġ", "2", "0", "2", "4", ":", "Ġ", "7", "Â½"]
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|>user\n").ids[0] == 1


def test_a_piece_of_absurd_length_is_refused() -> None:
    """There are as many ways to cut it as it has characters, and each is as long."""
    with pytest.raises(CheckpointError) as caught:
        merges_of([("a", -1.0), ("a" * 200_000, -2.0)])
    assert (caught.value.field, caught.value.limit) == ("tokenizer.ggml.tokens", "256")
