"""Renders a conversation with the checkpoint's chat template, as transformers does.

Messages that name a special token, such as <|im_end|>, become that token, as with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stagecoach.errors import FailedPrecondition, InvalidArgument
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.model_files import ModelFiles, named_tokens
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.template_worker import Outcome

MAX_TEMPLATE_LENGTH = 1 << 20  # characters

# With at least "role" and "content".
Message = Mapping[str, Any]


class ChatTemplate:
    """A checkpoint's chat template.

    `source` is the template's text, None where the checkpoint has none. `variables` are what it may use besides the
    messages, such as bos_token. It is rendered in `process`, which closes with it.
    """

    def __init__(self, source: str | None, variables: Mapping[str, str], process: TemplateProcess) -> None:
        self._source = source
        self._variables = dict(variables)
        self._process = process

    @classmethod
    def from_files(cls, files: ModelFiles, process: TemplateProcess) -> ChatTemplate:
        """From chat_template.jinja, or tokenizer_config.json: one text, or several of which "default" is taken."""
        variables = named_tokens(files)
        if "chat_template.jinja" in files:
            return cls(files.text("chat_template.jinja"), variables, process)
        entry = files.json("tokenizer_config.json").get("chat_template")
        if isinstance(entry, list):
            templates = [item for item in entry if isinstance(item, dict) and item.get("name") == "default"]
            entry = templates[-1].get("template") if templates else None
        return cls(entry if isinstance(entry, str) else None, variables, process)

    async def render(self, messages: Sequence[Message], caller: Caller, *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text, to be encoded without adding special tokens: the template writes them.

        The caller is charged `tokens_for_rendering`, whatever comes of it.

        Raises FailedPrecondition where there is no usable template, and InvalidArgument(field="messages") where the
        template refuses the messages, fails on them, or passes a limit. Also see TemplateProcess.render.
        """
        # A broken template does not keep a model from answering plain prompts: it is reported when it is needed.
        if self._source is None:
            raise FailedPrecondition("the checkpoint has no chat template; send a prompt instead", field="messages")
        if len(self._source) > MAX_TEMPLATE_LENGTH:
            text = f"the chat template has {len(self._source):,} characters; at most {MAX_TEMPLATE_LENGTH:,}"
            raise FailedPrecondition(text, field="messages")
        variables = {
            **self._variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        num_characters = sum(len(str(text)) + 1 for message in messages for text in message.values())
        outcome, text = await self._process.render(self._source, variables, num_characters, caller)
        if outcome is Outcome.UNUSABLE:
            raise FailedPrecondition(f"the checkpoint's chat template cannot be used: {text}", field="messages")
        if outcome is Outcome.REFUSED:
            raise InvalidArgument(f"the chat template does not take these messages: {text}", field="messages")
        if outcome is Outcome.TOO_LONG:
            limit = self._process.limits.max_output_length
            raise InvalidArgument(
                f"the chat template makes more than {limit:,} characters of the messages", field="messages", limit=limit
            )
        return text

    async def close(self) -> None:
        """Ends the process."""
        await self._process.close()
