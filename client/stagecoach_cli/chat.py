"""`stagecoach chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagecoach.errors import OutOfRange, StagecoachError
from stagecoach.visible_text import visible
from stagecoach_cli.options import (
    DEFAULT_TARGET,
    ApiKey,
    ModelName,
    Target,
    TlsCA,
    TlsCert,
    TlsKey,
    TlsServerName,
    choose_tls,
)
from stagecoach_cli.sampling_options import MaxTokens, Seed, Temperature, TopK, TopP
from stagecoach_cli.terminal import describe, not_text, write_model_text

if TYPE_CHECKING:
    from stagecoach_client import Client, Message

_KEYS = "ctrl-C stops an answer; /new forgets the conversation; /exit or ctrl-D leaves."


def chat(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    model: ModelName = "",
    system: Annotated[str | None, typer.Option(help="The system message, which says what the model should be.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    tls_ca: TlsCA = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
) -> None:
    """Talk to a chat model. ctrl-C stops an answer, /new forgets the conversation, /exit or ctrl-D leaves."""
    from stagecoach_client import Client

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() line editing and a history

    options = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    with Client(target, api_key=api_key, tls=choose_tls(tls_ca, tls_cert, tls_key, tls_server_name)) as client:
        names = [served.name for served in client.models()]
        print(visible(f"{model or ', '.join(names)} at {target}. {_KEYS}"))
        converse(Conversation(client, system, options))


class Conversation:
    """What was said so far. A question whose answer failed or never began is not kept."""

    def __init__(self, client: Client, system: str | None, options: dict[str, Any]) -> None:
        self._beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = self._beginning
        self._client = client
        self._options = options

    @property
    def is_new(self) -> bool:
        """Whether nothing has been said yet."""
        return self.messages == self._beginning

    def forget(self) -> None:
        """Forgets what was said, but for the system message."""
        self.messages = self._beginning

    def say(self, text: str) -> None:
        """Prints the model's answer to `text` as it comes. A KeyboardInterrupt stops the answer, and nothing else."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        finish_reason = None
        try:
            with self._client.generate(messages=messages, stream=True, **self._options) as stream:
                for chunk in stream:
                    write_model_text(chunk.text)
                    answer.append(chunk.text)
                    finish_reason = chunk.finish_reason
        except KeyboardInterrupt:
            write_model_text(" [stopped]")
        except StagecoachError:
            if answer:  # the error is not part of the answer, so it begins a line
                write_model_text("\n")
            raise
        write_model_text(" [cut off: no room for more tokens]\n" if finish_reason == "length" else "\n")
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]


def converse(conversation: Conversation) -> None:
    """Reads lines from standard input until it ends, and has the model answer each."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or ctrl-D leaves")
            continue
        except UnicodeDecodeError as error:
            raise not_text(error, "input") from error
        if text == "/exit":
            return
        if text == "/new":
            conversation.forget()
            continue
        if not text:
            continue
        try:
            conversation.say(text)
        except StagecoachError as error:
            outgrown = isinstance(error, OutOfRange) and not conversation.is_new
            hint = "; /new forgets the conversation and begins another" if outgrown else ""
            print(f"error: {describe(error)}{hint}", file=sys.stderr)
