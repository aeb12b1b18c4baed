"""Texts become tokens without holding up the event loop, whether they are prompts or conversations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from stagecoach.errors import FailedPrecondition, InvalidArgument, OutOfRange, Overloaded, RateLimited, Unavailable
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.prompt_encoder import MAX_LENGTH_ON_LOOP, PromptEncoder
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import Encoded, TextKind, Tokenizer
from tests.unit.router.anyone import ANYONE, Metered
from tests.unit.router.test_tokenizer import files, library

MAX_TOKENS = 1 << 20
TIMEOUT_S = 10.0
USER = [{"role": "user", "content": "hi"}]


class ThreadOfEach(Tokenizer):
    """Notes on which thread each text was encoded."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self.threads: list[threading.Thread] = []

    def encode_within(self, text: str, max_tokens: int, kind: TextKind) -> Encoded:
        self.threads.append(threading.current_thread())
        return super().encode_within(text, max_tokens, kind)


class HeldUpByLength(Tokenizer):
    """Looks at no text's length before it may; notes how each text begins."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self.may_go_on, self.looked_at = threading.Event(), ""

    def check_length(self, text: str, max_tokens: int, kind: TextKind) -> None:
        assert self.may_go_on.wait(TIMEOUT_S)
        self.looked_at += text[0]
        super().check_length(text, max_tokens, kind)


class HeldUp(Tokenizer):
    """Encodes nothing before it may."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self.began, self.may_end = threading.Event(), threading.Event()

    def encode_within(self, text: str, max_tokens: int, kind: TextKind) -> Encoded:
        self.began.set()
        assert self.may_end.wait(TIMEOUT_S)
        return super().encode_within(text, max_tokens, kind)


@pytest.fixture
async def process() -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    await process.close()


async def test_short_texts_are_encoded_at_once_and_long_ones_on_another_thread(process: TemplateProcess) -> None:
    tokenizer = ThreadOfEach(files(library()))
    encoder = PromptEncoder(
        tokenizer, ChatTemplate("{{ messages[0].content * 5000 }}", {}, process), max_tokens=MAX_TOKENS
    )
    assert len(await encoder.encode_prompt("a" * MAX_LENGTH_ON_LOOP, ANYONE)) == MAX_LENGTH_ON_LOOP
    assert len(await encoder.encode_prompt("a" * (MAX_LENGTH_ON_LOOP + 1), ANYONE)) == MAX_LENGTH_ON_LOOP + 1
    assert len(await encoder.encode_chat(USER, ANYONE)) == 10_000, "what the template makes of it counts"
    assert [thread is threading.main_thread() for thread in tokenizer.threads] == [True, False, False]


async def test_a_conversation_is_rendered_and_gets_no_second_bos(process: TemplateProcess) -> None:
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    checkpoint = files(library(bos=True), tokenizer_config=config)
    encoder = PromptEncoder(Tokenizer(checkpoint), ChatTemplate.from_files(checkpoint, process), MAX_TOKENS)
    chat, prompt = await asyncio.gather(encoder.encode_chat(USER, ANYONE), encoder.encode_prompt("hi", ANYONE))
    assert chat == prompt


async def test_without_a_chat_template_a_conversation_is_refused_and_a_prompt_is_not(process: TemplateProcess) -> None:
    checkpoint = files(library())
    encoder = PromptEncoder(Tokenizer(checkpoint), ChatTemplate.from_files(checkpoint, process), MAX_TOKENS)
    with pytest.raises(FailedPrecondition, match="no chat template"):
        await encoder.encode_chat(USER, ANYONE)
    assert len(await encoder.encode_prompt("hi", ANYONE)) == 2


async def test_half_a_character_out_of_a_template_is_refused(process: TemplateProcess) -> None:
    encoder = PromptEncoder(
        Tokenizer(files(library())), ChatTemplate(r"{{ '\ud800' }}", {}, process), max_tokens=MAX_TOKENS
    )
    with pytest.raises(InvalidArgument) as caught:
        await encoder.encode_chat(USER, ANYONE)
    assert caught.value.field == "messages"


async def test_what_cannot_fit_is_refused_before_it_is_encoded(process: TemplateProcess) -> None:
    tokenizer = ThreadOfEach(files(library()))  # a token for every byte
    encoder = PromptEncoder(tokenizer, ChatTemplate("{{ messages[0].content }}", {}, process), max_tokens=1000)
    ann = Metered(10_000)
    caller = Caller("ann", ann)
    for encode, field, value in (
        (encoder.encode_prompt("a" * 1001, caller), "prompt", "1001"),
        (encoder.encode_chat([{"role": "user", "content": "ä" * 600}], caller), "messages", "1200"),
    ):
        with pytest.raises(OutOfRange) as caught:
            await encode
        assert (caught.value.field, caught.value.limit, caught.value.value) == (field, "1000", value)
    assert not tokenizer.threads
    assert len(await encoder.encode_prompt("a" * 1000, caller)) == 1000


async def test_a_text_of_too_many_tokens_is_refused_also_where_its_length_does_not_tell(
    process: TemplateProcess,
) -> None:
    tokenizer = ThreadOfEach(files(library(longest="ab" * 25)))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), max_tokens=1000)
    ann = Metered(10_000)
    caller = Caller("ann", ann)
    with pytest.raises(OutOfRange) as caught:
        await encoder.encode_prompt("ab" * 1000, caller)
    assert (caught.value.limit, caught.value.value) == ("1000", "2000")
    assert ann.num_charged == 2000, "it was work, and is paid for"
    assert len(tokenizer.threads) == 1


async def test_what_was_done_is_charged_also_when_the_caller_has_gone(process: TemplateProcess) -> None:
    tokenizer = HeldUp(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), MAX_TOKENS)
    ann = Metered(10_000)
    caller = Caller("ann", ann)
    gone = asyncio.create_task(encoder.encode_prompt("a" * 3000, caller))
    await asyncio.to_thread(tokenizer.began.wait, TIMEOUT_S)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    tokenizer.may_end.set()
    async with asyncio.timeout(TIMEOUT_S):
        await encoder.encode_prompt("b" * 1000, ANYONE)  # its turn comes after the other's
    assert ann.num_charged == 3000
    assert len(await encoder.encode_prompt("short", caller)) == 5
    assert ann.num_charged == 3005


async def test_who_owes_tokens_when_its_turn_comes_is_refused_without_work(process: TemplateProcess) -> None:
    tokenizer = ThreadOfEach(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), MAX_TOKENS)
    ann = Metered(1000)
    caller = Caller("ann", ann)
    caller.tenant.charge(0, time.monotonic())
    results = await asyncio.gather(
        *(encoder.encode_prompt("a" * 5000, caller) for _ in range(8)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, RateLimited)]
    assert (len(refused), len(tokenizer.threads)) == (7, 1)
    assert refused[0].field == "tokens_per_minute"
    assert refused[0].retry_after_s > 230.0, "4,000 tokens are to be made up for"


async def test_a_conversation_is_paid_for_once_and_also_where_the_template_refuses_it(process: TemplateProcess) -> None:
    tokenizer = Tokenizer(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate("{{ messages[0].content }}", {}, process), MAX_TOKENS)
    ann = Metered(100_000)
    caller = Caller("ann", ann)
    tokens = await encoder.encode_chat([{"role": "user", "content": "a" * 8000}], caller)
    assert ann.num_charged == len(tokens) == 8000
    refusing = PromptEncoder(tokenizer, ChatTemplate("{{ raise_exception('no') }}", {}, process), MAX_TOKENS)
    with pytest.raises(InvalidArgument):
        await refusing.encode_chat([{"role": "user", "content": "a" * 8000}], caller)
    assert 9000 <= ann.num_charged <= 9002, "a token for every 8 characters"


async def test_other_threads_go_on_while_a_long_text_is_encoded(process: TemplateProcess) -> None:
    encoder = PromptEncoder(Tokenizer(files(library())), ChatTemplate(None, {}, process), MAX_TOKENS)
    text, gaps_s = "never mind " * 30_000, [0.0]
    await encoder.encode_prompt("so that the thread is there " * 100, ANYONE)
    begin_s = last_s = time.perf_counter()
    encoding = asyncio.create_task(encoder.encode_prompt(text, ANYONE))
    while not encoding.done():
        await asyncio.sleep(0)
        gaps_s.append(time.perf_counter() - last_s)
        last_s += gaps_s[-1]
    assert len(await encoding) == len(text)
    assert max(gaps_s) < (last_s - begin_s) / 2, "the interpreter's lock was kept to the end"


async def test_whose_turn_comes_after_the_end_is_told_to_go_elsewhere_and_who_has_it_goes_on(
    process: TemplateProcess,
) -> None:
    tokenizer = HeldUp(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), MAX_TOKENS)
    first = asyncio.create_task(encoder.encode_prompt("a" * 3000, ANYONE))
    await asyncio.to_thread(tokenizer.began.wait, TIMEOUT_S)
    second = asyncio.create_task(encoder.encode_prompt("b" * 3000, ANYONE))
    await asyncio.sleep(0)
    await encoder.close()
    tokenizer.may_end.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert len(await first) == 3000
        with pytest.raises(Unavailable, match="stopping"):
            await second


async def test_nobody_waits_for_all_texts_of_another_that_are_too_long(process: TemplateProcess) -> None:
    tokenizer = HeldUpByLength(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), max_tokens=1000)
    hog, ann = Caller("hog", ANYONE.tenant), Caller("ann", ANYONE.tenant)
    refused = [asyncio.create_task(encoder.encode_prompt("h" * 5000, hog)) for _ in range(50)]
    await asyncio.sleep(0)
    encoding = asyncio.create_task(encoder.encode_prompt("a" * 600, ann))
    await asyncio.sleep(0)
    tokenizer.may_go_on.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert len(await encoding) == 600
        results = await asyncio.gather(*refused, return_exceptions=True)
    assert all(isinstance(result, OutOfRange) for result in results)
    assert "a" in tokenizer.looked_at[:3]


async def test_more_text_than_may_wait_is_refused_before_anything_is_made_of_it(process: TemplateProcess) -> None:
    tokenizer = HeldUpByLength(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate(None, {}, process), max_tokens=1000)
    text = "h" * (4 << 20)
    tasks = [asyncio.create_task(encoder.encode_prompt(text, ANYONE)) for _ in range(20)]
    await asyncio.wait(tasks, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    tokenizer.may_go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [OutOfRange] * 3 + [Overloaded] * 17
    assert len(tokenizer.looked_at) == 3
