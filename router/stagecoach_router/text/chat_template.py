"""Renders a conversation with the checkpoint's chat template, as transformers does, but bounded.

A template is a program from whoever made the checkpoint. Bounded are its length, the output's length, loop rounds and
calls together, the size of what one operation makes, and the time that all of them take. Messages that name a special
token, such as <|im_end|>, become that token, as with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from stagecoach.errors import FailedPrecondition, InvalidArgument, StagecoachError
from stagecoach_router.text.chat_sandbox import ChatSandbox, step_budget
from stagecoach_router.text.model_files import ModelFiles

MAX_TEMPLATE_LENGTH = 1 << 20
MAX_OUTPUT_LENGTH = 16 << 20
# A loop round or a call is a step, of some 100 ns.
MAX_STEPS = 2_000_000
# Of the rendering thread's own time: what steps do not measure, such as copies of long texts.
MAX_RENDER_S = 5.0

Message = Mapping[str, Any] | tuple[str, str]


class ChatTemplate:
    """A checkpoint's chat template.

    `source` is the template's text, None where the checkpoint has none. `variables` are what it may use besides the
    messages, such as bos_token. `now` is the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source: str | None,
        variables: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        max_output_length: int = MAX_OUTPUT_LENGTH,
        max_steps: int = MAX_STEPS,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        self._variables = dict(variables)
        self._max_output_length = max_output_length
        self._max_steps = max_steps
        self._max_render_s = max_render_s
        self._template: jinja2.Template | None = None
        # A broken template must not keep a model from answering plain prompts: it is reported when it is needed.
        self._problem = "the checkpoint has no chat template; send a prompt instead" if source is None else ""
        if source is not None and len(source) > MAX_TEMPLATE_LENGTH:
            self._problem = f"the chat template has {len(source):,} characters; at most {MAX_TEMPLATE_LENGTH:,}"
        elif source is not None:
            try:
                self._template = ChatSandbox(now).compile_counted(source)
            except Exception as error:  # the compiler of a foreign program: syntax, nesting, or a bug in it
                self._problem = f"the checkpoint's chat template cannot be used: {error or type(error).__name__}"

    @classmethod
    def from_files(cls, files: ModelFiles, variables: Mapping[str, str]) -> ChatTemplate:
        """From chat_template.jinja, or tokenizer_config.json: one text, or several of which "default" is taken."""
        if "chat_template.jinja" in files:
            return cls(files.text("chat_template.jinja"), variables)
        entry = files.json("tokenizer_config.json").get("chat_template")
        if isinstance(entry, list):
            templates = [item for item in entry if isinstance(item, dict) and item.get("name") == "default"]
            entry = templates[-1].get("template") if templates else None
        return cls(entry if isinstance(entry, str) else None, variables)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text, to be encoded without adding special tokens: the template writes them.

        Raises FailedPrecondition where there is no usable template, and InvalidArgument(field="messages") where the
        template refuses the messages, fails on them, or passes a bound.
        """
        if self._template is None:
            raise FailedPrecondition(self._problem, field="messages")
        conversation = [_as_mapping(message) for message in messages]
        variables = {
            **self._variables,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            with step_budget(self._max_steps, self._max_render_s):
                return self._bounded_output(self._template, variables)
        except StagecoachError:
            raise
        except Exception as error:  # whatever a foreign program may raise
            reason = str(error) or type(error).__name__
            raise InvalidArgument(
                f"the chat template does not take these messages: {reason}", field="messages"
            ) from error

    def _bounded_output(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            if length > self._max_output_length:
                raise InvalidArgument(
                    f"the chat template made more than {self._max_output_length:,} characters of the messages",
                    field="messages",
                    limit=self._max_output_length,
                    value=length,
                )
            pieces.append(piece)
        return "".join(pieces)


def _as_mapping(message: Message) -> Mapping[str, Any]:
    if isinstance(message, tuple):
        role, content = message
        return {"role": role, "content": content}
    return dict(message)
