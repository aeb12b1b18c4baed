"""Text must come out as the tokenizers library's `decode` of the whole sequence gives it, whatever the tokens."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stagecoach.errors import CheckpointError
from stagecoach_router.text.detokenizer import IncrementalDetokenizer, text_decoder
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.tokenizer import Tokenizer as OurTokenizer

WORDS = ["▁", "▁▁", "a", "▁a", "b", "é", "▁日", "\ufffd", "<0x4", "▁the"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = ["日本語 🎉🎉 naïve", "👩‍👩‍👧 family", " leading", "a\n\nb\t ", "مرحبا", "", " ", "\ufffd real"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "日本語 🎉🎉🎉 日本", "naïve café"], trainer)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens(["a tool é"])
    return tokenizer


def llama2(decoder: decoders.Decoder | None = None) -> Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate([*SPECIAL, *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def unigram(decoder: decoders.Decoder, *, byte_fallback: bool) -> Tokenizer:
    scored = [(token, -float(index)) for index, token in enumerate([*SPECIAL, *BYTES, *WORDS])]
    tokenizer = Tokenizer(models.Unigram(scored, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


LIBRARY = {
    "byte-level": byte_level(),
    "llama2": llama2(),
    "gemma": llama2(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
    "unigram-bytes": unigram(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), byte_fallback=True
    ),
    "metaspace": unigram(decoders.Metaspace(), byte_fallback=False),
    "metaspace-never": unigram(decoders.Metaspace(prepend_scheme="never"), byte_fallback=False),
}
OURS = {
    name: OurTokenizer(ModelFiles({"tokenizer.json": tokenizer.to_str().encode()}))
    for name, tokenizer in LIBRARY.items()
}


def collect(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> str:
    return "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.flush()


def spelt(text: str) -> list[int]:
    """`text` as byte tokens of the Llama 2 style vocabulary."""
    return [len(SPECIAL) + byte for byte in text.encode()]


# Ids past the vocabulary too: a model has logits for padding.
tokens = st.lists(
    st.one_of(st.integers(0, 320), st.sampled_from(spelt("日🎉é")), st.sampled_from([0, 1, 2])), max_size=40
)


@pytest.mark.parametrize("name", LIBRARY)
@given(token_ids=tokens, skip=st.booleans())
@example(token_ids=[*spelt("é"), 1, 259], skip=True)
@example(token_ids=[3 + 0xED, 3 + 0xA0, 3 + 0x80, 3 + 0xF4, 3 + 0x90], skip=True)
def test_any_tokens_come_out_as_the_whole_is_decoded(name: str, token_ids: list[int], skip: bool) -> None:
    text = collect(OURS[name].detokenizer((), skip_special_tokens=skip), token_ids)
    assert text == LIBRARY[name].decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", LIBRARY)
@given(data=st.data())
def test_text_survives_the_way_there_and_back(name: str, data: st.DataObject) -> None:
    token_ids = LIBRARY[name].encode(data.draw(st.one_of(st.text(max_size=20), st.sampled_from(TEXTS)))).ids
    assert collect(OURS[name].detokenizer(), token_ids) == LIBRARY[name].decode(token_ids)


@given(raw=st.one_of(st.binary(max_size=24), st.text(max_size=8).map(str.encode)))
def test_any_bytes_come_out_as_utf8_with_replacements(raw: bytes) -> None:
    spelling = {byte: char for char, byte in zip(_alphabet(), range(256), strict=True)}
    token_ids = [LIBRARY["byte-level"].token_to_id(spelling[byte]) for byte in raw]
    assert collect(OURS["byte-level"].detokenizer(), token_ids) == raw.decode("utf-8", "replace")


def _alphabet() -> list[str]:
    """The character for each byte, found by encoding, for bytes that can be; the others are made by GPT-2's rule."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize("name", LIBRARY)
@given(prompt=st.sampled_from(TEXTS), answer=st.sampled_from(TEXTS))
def test_a_completion_is_what_it_adds_to_the_prompt(name: str, prompt: str, answer: str) -> None:
    library = LIBRARY[name]
    before, after = library.encode(prompt).ids, library.encode(answer).ids
    text = collect(OURS[name].detokenizer(before), after)
    assert library.decode(before) + text == library.decode(before + after)


@pytest.mark.parametrize(("name", "first_special"), [("byte-level", "<s>"), ("llama2", "<s>")])
def test_a_prompt_of_special_tokens_alone_is_no_text(name: str, first_special: str) -> None:
    library = LIBRARY[name]
    bos, answer = library.token_to_id(first_special), library.encode("the a").ids
    assert collect(OURS[name].detokenizer([bos]), answer) == library.decode([bos, *answer])


@pytest.mark.parametrize("name", ["byte-level", "llama2"])
def test_a_character_the_prompt_left_half_done_is_completed(name: str) -> None:
    whole = "🎉"
    if name == "llama2":
        ids = spelt(whole)
    else:
        ids = [LIBRARY[name].token_to_id(_alphabet()[byte]) for byte in whole.encode()]
    for cut in range(1, 4):
        assert collect(OURS[name].detokenizer(ids[:cut]), ids[cut:]) == whole


@pytest.mark.parametrize("name", ["byte-level", "llama2"])
def test_nothing_comes_out_before_a_character_is_whole(name: str) -> None:
    ids = spelt("é") if name == "llama2" else [LIBRARY[name].token_to_id(_alphabet()[b]) for b in "é".encode()]
    detokenizer = OURS[name].detokenizer()
    assert detokenizer.feed(ids[0]) == ""
    assert detokenizer.feed(ids[1]) + detokenizer.flush() == "é"
    half = OURS[name].detokenizer()
    assert half.feed(ids[0]) + half.flush() == "\ufffd"


@pytest.mark.parametrize("name", ["byte-level", "llama2"])
def test_bytes_that_never_become_a_character_take_linear_time(name: str) -> None:
    broken = 3 + 0x80 if name == "llama2" else LIBRARY[name].token_to_id(_alphabet()[0x80])

    def cpu_s(num_tokens: int) -> float:
        detokenizer = OURS[name].detokenizer()
        began = time.thread_time()
        assert collect(detokenizer, [broken] * num_tokens) == "\ufffd" * num_tokens
        return time.thread_time() - began

    # 16 times the tokens: quadratic work would take 256 times as long.
    assert min(cpu_s(32_000) for _ in range(3)) < 64 * min(cpu_s(2_000) for _ in range(3))


def test_a_token_by_itself_keeps_its_space() -> None:
    llama = LIBRARY["llama2"]
    assert OURS["llama2"].token_text(llama.token_to_id("▁the")) == " the"
    assert OURS["llama2"].token_text(3 + 0x0A) == "\n"
    assert OURS["llama2"].token_text(3 + 0xC3) == "\ufffd"
    assert OURS["byte-level"].token_text(LIBRARY["byte-level"].token_to_id("Ġ")) == " "
    assert OURS["metaspace"].token_text(LIBRARY["metaspace"].token_to_id("▁a")) == " a"
    assert OURS["llama2"].token_text(10_000) == ""


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": []},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace"}]},
        json.loads(decoders.Sequence([decoders.Replace("_", " "), decoders.Strip(" ", 1, 1)]).__getstate__()),
    ],
)
def test_a_decoder_we_do_not_know_is_refused(decoder: object) -> None:
    with pytest.raises(CheckpointError, match="decoder"):
        text_decoder(json.loads(json.dumps(decoder)), lambda token_id: None)


@given(st.lists(st.integers(0, 299), max_size=30), st.lists(st.integers(0, 299), max_size=4))
def test_tokens_that_were_seen_before_read_the_same(token_ids: list[int], prompt: list[int]) -> None:
    fresh = OurTokenizer(ModelFiles({"tokenizer.json": LIBRARY["byte-level"].to_str().encode()}))
    first, again = (collect(fresh.detokenizer(prompt), token_ids) for _ in range(2))
    assert first == again


def test_a_token_is_spelt_out_once_for_all_completions() -> None:
    asked: list[int] = []

    def spelling(token_id: int) -> str:
        asked.append(token_id)
        return "ab"

    decoder = text_decoder({"type": "ByteLevel"}, spelling)
    for _ in range(3):
        detokenizer = decoder.start([])
        assert detokenizer.feed(5) + detokenizer.feed(5) == "abab"
    assert asked == [5]


@pytest.mark.parametrize("name", LIBRARY)
@given(st.lists(st.integers(0, 320), max_size=12), st.lists(st.integers(0, 320), max_size=6), st.booleans())
def test_of_a_prompt_its_tail_is_all_that_matters(name: str, prompt: list[int], answer: list[int], skip: bool) -> None:
    ours = OURS[name]
    tail = ours.prompt_tail(prompt, skip_special_tokens=skip)
    assert len(tail) <= 4
    whole, short = (collect(ours.detokenizer(each, skip_special_tokens=skip), answer) for each in (prompt, tail))
    assert short == whole


@pytest.mark.parametrize("name", LIBRARY)
def test_no_prompt_costs_each_completion_its_length(name: str) -> None:
    ours = OURS[name]
    begin_s = time.thread_time()
    for token_id in {0, 1, 2, 3, 130, 299, ours.num_known_ids, 10**6}:  # special ones, bytes, text, and no token at all
        prompt = (token_id,) * 131_071
        ours.detokenizer(prompt[:100])
        tail = ours.prompt_tail(prompt)
        for _ in range(64):
            ours.detokenizer(tail)
    assert time.thread_time() - begin_s < 1.0, "a second for each completion, with bytes that nothing ended"
