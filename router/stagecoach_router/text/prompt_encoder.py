"""From a request's text to its tokens, without holding up the event loop: every stream waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from stagecoach.errors import OutOfRange, Unavailable
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.chat_template import ChatTemplate, Message
from stagecoach_router.text.serial_queue import SerialQueue
from stagecoach_router.text.template_process import STOPPING_RETRY_AFTER_S, tokens_for_rendering
from stagecoach_router.text.tokenizer import Encoded, TextKind, Tokenizer

# Characters that are encoded on the event loop: 0.1 ms of work, 0.7 if each is a token. Longer texts have a thread.
MAX_LENGTH_ON_LOOP = 512


class PromptEncoder:
    """Renders conversations in their process, and encodes long texts on a thread of their own, one at a time.

    A text of more than `max_tokens` is refused: where its length tells, before it is encoded. What was done is charged
    to the caller's tenant, also where the caller has gone meanwhile, or its text is refused in the end. Who owes tokens
    when its turn comes is refused without more work.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._max_tokens = max_tokens
        self._long_texts = SerialQueue("to be tokenized")
        # Not one of the many threads that all others share: each of those would keep the memory of its largest text.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._closed = False

    async def encode_prompt(self, text: str, caller: Caller) -> list[int]:
        """The tokens of a plain prompt.

        Raises InvalidArgument and OutOfRange for a text that cannot be taken, RateLimited for a caller that has no
        tokens left, Overloaded where too much text waits, and Unavailable where its turn comes after `close`.
        """
        return await self._encode(text, TextKind.PROMPT, caller)

    async def encode_chat(self, messages: Sequence[Message], caller: Caller) -> list[int]:
        """The tokens of a conversation, up to where its answer begins. Raises the same, and what `render` raises."""
        text = await self._chat_template.render(messages, caller)
        return await self._encode(text, TextKind.CHAT, caller, num_charged=tokens_for_rendering(len(text)))

    async def close(self) -> None:
        """Ends the process of the chat template, and the thread when it is done with the text that it has."""
        self._closed = True
        self._thread.shutdown(wait=False)
        await self._chat_template.close()

    async def _encode(self, text: str, kind: TextKind, caller: Caller, num_charged: int = 0) -> list[int]:
        """The tokens; for `num_charged` of them the caller has been charged."""

        def encode() -> Encoded:
            if len(text) > MAX_LENGTH_ON_LOOP:
                self._tokenizer.check_length(text, self._max_tokens, kind)
            return self._tokenizer.encode_within(text, self._max_tokens, kind)

        def charge(encoded: Encoded) -> None:
            caller.tenant.charge(max(0, encoded.num_tokens - num_charged), time.monotonic())

        def charge_job(job: asyncio.Future[Encoded]) -> None:
            if not job.cancelled() and job.exception() is None:
                charge(job.result())

        def start() -> asyncio.Future[Encoded]:
            if self._closed:
                raise Unavailable("the router is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)
            caller.tenant.check_tokens(time.monotonic())
            job = asyncio.get_running_loop().run_in_executor(self._thread, encode)
            job.add_done_callback(charge_job)
            return job

        if len(text) <= MAX_LENGTH_ON_LOOP:
            encoded = encode()
            charge(encoded)
        else:
            encoded = await self._long_texts.run(caller.name, len(text), start)
        if encoded.token_ids is None:
            num_tokens, field = encoded.num_tokens, kind.value
            reason = f"{field}: {num_tokens} tokens; the context has room for {self._max_tokens}"
            raise OutOfRange(reason, field=field, limit=self._max_tokens, value=num_tokens)
        return encoded.token_ids
