from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stagecoach.errors import CheckpointError, InvalidArgument
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import TextKind, Tokenizer
from tests.unit.router.anyone import ANYONE

TEXTS = [
    "The capital of France is",
    "  two  spaces\tand\n\n\nlines ",
    "naïve café 東京 مرحبا 한국어",
    "🎉👩‍👩‍👧🇨🇭 emoji",
    "In 2024, 1234567 x 3.14 = ²³ Ⅷ",
    "It's you'll I'VE",
    "<|im_start|>user\nhi<|im_end|> and <|endoftext|>",
    "",
]


def library(*, bos: bool = False, longest: str = "") -> LibraryTokenizer:
    """A token for every byte, the special ones, and `longest`, which nothing comes to: there are no merges."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *filter(None, [longest])]
    tokenizer = LibraryTokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<turn>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def files(tokenizer: LibraryTokenizer, **others: dict[str, Any]) -> ModelFiles:
    contents = {f"{name}.json": json.dumps(content).encode() for name, content in others.items()}
    return ModelFiles({"tokenizer.json": tokenizer.to_str().encode(), **contents})


def encode(tokenizer: Tokenizer, text: str, kind: TextKind = TextKind.PROMPT) -> list[int]:
    """All tokens of a text."""
    token_ids = tokenizer.encode_within(text, 1 << 20, kind).token_ids
    assert token_ids is not None
    return token_ids


def decode(tokenizer: Tokenizer, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """The text of a whole answer."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    return Tokenizer(ModelFiles.from_folder(smollm2))


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.smollm2
class TestSmolLM2:
    @pytest.mark.parametrize("text", TEXTS)
    def test_prompts_are_encoded_as_transformers_does(
        self, ours: Tokenizer, reference: PreTrainedTokenizerBase, text: str
    ) -> None:
        token_ids = encode(ours, text)
        assert token_ids == reference(text).input_ids
        assert decode(ours, token_ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize(
        "messages",
        [
            [("user", "What is the capital of France?")],
            [("system", "Answer in French. 🎉"), ("user", "naïve 東京?")],
            [("user", "a"), ("assistant", "b <b>&"), ("user", " c\n"), ("assistant", ""), ("user", "d")],
        ],
    )
    @pytest.mark.parametrize("prompt", [True, False])
    async def test_conversations_are_encoded_as_transformers_does(
        self,
        smollm2: Path,
        ours: Tokenizer,
        reference: PreTrainedTokenizerBase,
        messages: list[tuple[str, str]],
        prompt: bool,
    ) -> None:
        dicts = [{"role": role, "content": content} for role, content in messages]
        expected = reference.apply_chat_template(dicts, add_generation_prompt=prompt, return_dict=False)
        process = TemplateProcess()
        text = await ChatTemplate.from_files(ModelFiles.from_folder(smollm2), process).render(
            dicts, ANYONE, add_generation_prompt=prompt
        )
        await process.close()
        assert encode(ours, text, TextKind.CHAT) == expected

    def test_knows_its_sizes_and_its_end(self, ours: Tokenizer) -> None:
        assert (ours.vocab_size, ours.num_known_ids) == (49152, 49152)
        assert ours.eos_token_ids == {2}
        assert ours.token_text(2) == "<|im_end|>"

    def test_any_tokens_stream_as_transformers_decodes_them(
        self, ours: Tokenizer, reference: PreTrainedTokenizerBase
    ) -> None:
        @given(st.lists(st.integers(0, 49151), max_size=30), st.booleans())
        def check(token_ids: list[int], skip: bool) -> None:
            detokenizer = ours.detokenizer(skip_special_tokens=skip)
            text = "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()
            assert text == reference.decode(token_ids, skip_special_tokens=skip)

        check()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_special_tokens_go_around_a_prompt_as_with_transformers(
    bos: bool, config: dict[str, bool], tmp_path: Path
) -> None:
    tokenizer = library(bos=bos)
    entries: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    saved = {**entries, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)("hi").input_ids
    assert encode(Tokenizer(files(tokenizer, tokenizer_config=entries)), "hi") == expected


def test_a_conversation_gets_no_second_bos() -> None:
    tokenizer = Tokenizer(files(library(bos=True), tokenizer_config={"bos_token": "<s>"}))
    assert encode(tokenizer, "<s>hi", TextKind.CHAT) == encode(tokenizer, "hi")
    assert encode(tokenizer, "hi")[0] == 256


def test_every_end_that_some_file_names_counts() -> None:
    tokenizer = Tokenizer(
        files(
            library(),
            tokenizer_config={"eos_token": "</s>"},
            config={"eos_token_id": 7, "vocab_size": 320},
            generation_config={"eos_token_id": [258, 9]},
        )
    )
    assert tokenizer.eos_token_ids == {257, 7, 258, 9}
    assert (tokenizer.vocab_size, tokenizer.num_known_ids) == (320, 259)


def test_a_token_that_only_the_configuration_calls_special_is_left_out_of_text() -> None:
    tokenizer = Tokenizer(files(library(), tokenizer_config={"eos_token": "z", "pad_token": "not a token"}))
    (token_id,) = encode(tokenizer, "z")
    assert decode(tokenizer, [token_id]) == ""
    assert tokenizer.num_known_ids == 259


def test_saved_truncation_and_padding_do_not_touch_prompts() -> None:
    library_tokenizer = library()
    library_tokenizer.enable_truncation(max_length=4)
    library_tokenizer.enable_padding(length=4)
    tokenizer = Tokenizer(files(library_tokenizer))
    assert (len(encode(tokenizer, "hello world")), len(encode(tokenizer, "a"))) == (11, 1)


def test_text_that_is_not_unicode_is_refused() -> None:
    tokenizer = Tokenizer(files(library()))
    for kind, field in ((TextKind.PROMPT, "prompt"), (TextKind.CHAT, "messages")):
        with pytest.raises(InvalidArgument) as caught:
            encode(tokenizer, "\ud800", kind)
        assert caught.value.field == field


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_named(content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(ModelFiles({"tokenizer.json": content}))
    assert caught.value.field == "tokenizer.json"


def test_a_checkpoint_without_tokenizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(ModelFiles({"config.json": b"{}"}))
