"""Texts become tokens without holding up the event loop, whether they are prompts or conversations."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from stagecoach.errors import FailedPrecondition, InvalidArgument
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.prompt_encoder import MAX_LENGTH_ON_LOOP, PromptEncoder
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import Tokenizer
from tests.unit.router.test_tokenizer import files, library

USER = [{"role": "user", "content": "hi"}]


class ThreadOfEach(Tokenizer):
    """Notes on which thread each text was encoded."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self.threads: list[threading.Thread] = []

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        self.threads.append(threading.current_thread())
        return super()._encode(text, field, add_special_tokens=add_special_tokens)


@pytest.fixture
async def process() -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    await process.close()


async def test_short_texts_are_encoded_at_once_and_long_ones_on_another_thread(process: TemplateProcess) -> None:
    tokenizer = ThreadOfEach(files(library()))
    encoder = PromptEncoder(tokenizer, ChatTemplate("{{ messages[0].content * 5000 }}", {}, process))
    assert len(await encoder.encode_prompt("a" * MAX_LENGTH_ON_LOOP)) == MAX_LENGTH_ON_LOOP
    assert len(await encoder.encode_prompt("a" * (MAX_LENGTH_ON_LOOP + 1))) == MAX_LENGTH_ON_LOOP + 1
    assert len(await encoder.encode_chat(USER)) == 10_000, "what the template makes of it counts"
    assert [thread is threading.main_thread() for thread in tokenizer.threads] == [True, False, False]


async def test_a_conversation_is_rendered_and_gets_no_second_bos(process: TemplateProcess) -> None:
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    checkpoint = files(library(bos=True), tokenizer_config=config)
    encoder = PromptEncoder(Tokenizer(checkpoint), ChatTemplate.from_files(checkpoint, process))
    chat, prompt = await asyncio.gather(encoder.encode_chat(USER), encoder.encode_prompt("hi"))
    assert chat == prompt


async def test_without_a_chat_template_a_conversation_is_refused_and_a_prompt_is_not(process: TemplateProcess) -> None:
    checkpoint = files(library())
    encoder = PromptEncoder(Tokenizer(checkpoint), ChatTemplate.from_files(checkpoint, process))
    with pytest.raises(FailedPrecondition, match="no chat template"):
        await encoder.encode_chat(USER)
    assert len(await encoder.encode_prompt("hi")) == 2


async def test_half_a_character_out_of_a_template_is_refused(process: TemplateProcess) -> None:
    encoder = PromptEncoder(Tokenizer(files(library())), ChatTemplate(r"{{ '\ud800' }}", {}, process))
    with pytest.raises(InvalidArgument) as caught:
        await encoder.encode_chat(USER)
    assert caught.value.field == "messages"
