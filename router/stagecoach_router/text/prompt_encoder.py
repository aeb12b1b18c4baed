"""From a request's text to its tokens, without holding up the event loop: every stream waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stagecoach_router.text.chat_template import ChatTemplate, Message
from stagecoach_router.text.serial_queue import SerialQueue
from stagecoach_router.text.tokenizer import Tokenizer

# Characters that are encoded on the event loop: some 0.1 ms of work. Longer texts are encoded on a thread.
MAX_LENGTH_ON_LOOP = 4096


class PromptEncoder:
    """Renders conversations in their process, and encodes long texts on another thread, one at a time."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._long_texts = SerialQueue("to be tokenized")

    async def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a plain prompt. Raises InvalidArgument, and Overloaded where too much text waits."""
        return await self._encode(text, self._tokenizer.encode)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where its answer begins. Raises the same, and what `render` raises."""
        return await self._encode(await self._chat_template.render(messages), self._tokenizer.encode_chat)

    async def close(self) -> None:
        """Ends the process of the chat template."""
        await self._chat_template.close()

    async def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        if len(text) <= MAX_LENGTH_ON_LOOP:
            return encode(text)
        loop = asyncio.get_running_loop()
        return await self._long_texts.run(len(text), lambda: loop.run_in_executor(None, encode, text))
