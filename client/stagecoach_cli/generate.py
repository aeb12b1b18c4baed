"""`stagecoach generate`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from stagecoach.errors import InvalidArgument, StagecoachError
from stagecoach_cli.options import (
    DEFAULT_TARGET,
    ApiKey,
    MaxTokens,
    ModelName,
    Seed,
    Target,
    Temperature,
    TlsCA,
    TlsCert,
    TlsKey,
    TlsServerName,
    TopK,
    TopP,
    choose_tls,
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - reads standard input.")] = None,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    model: ModelName = "",
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message to a chat model.")] = False,
    token_ids: Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Instead of PROMPT.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens at least so likely, next to the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer repetitions.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Off the logits of tokens in the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time they are in it.")] = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop where the model would.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and the N likeliest.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="So many completions.")] = None,
    priority: Annotated[int, typer.Option(help="Larger runs first.")] = 0,
    cache_salt: Annotated[str, typer.Option(help="Share no K/V with requests of other salts.")] = "",
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after this long.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    tls_ca: TlsCA = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
) -> None:
    """Continue a text, or answer one message, and print it as it comes."""
    from stagecoach_client import Client

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or None,
        "logprobs": logprobs,
        "n": n,
        "timeout_s": timeout,
    }
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"model": model, "priority": priority, "cache_salt": cache_salt, "ignore_eos": ignore_eos}
    options |= _input(prompt, token_ids, chat)
    with Client(target, api_key=api_key, tls=choose_tls(tls_ca, tls_cert, tls_key, tls_server_name)) as client:
        if as_json:
            print(json.dumps(dataclasses.asdict(client.generate(**options)), ensure_ascii=False, indent=2))
        elif (n or 1) > 1:
            _print_all(client.generate(**options))
        else:
            _print_stream(client.generate(**options, stream=True))


def _input(prompt: str | None, token_ids: str | None, chat: bool) -> dict[str, Any]:
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give either PROMPT or --token-ids")
    if token_ids is not None:
        if chat:
            raise typer.BadParameter("--chat goes with PROMPT, not with --token-ids")
        return {"token_ids": _parse_ids(token_ids)}
    text = _read_stdin() if prompt == "-" else prompt
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        message = f"standard input is not {error.encoding}: {error.reason} at byte {error.start}"
        raise InvalidArgument(message, field="prompt", value=error.start) from error


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        message = f"token_ids must be whole numbers separated by commas; got {text!r:.80}"
        raise InvalidArgument(message, field="token_ids", value=text) from error


def _print_stream(stream: Any) -> None:
    from stagecoach_cli.terminal import write_model_text

    any_text = False
    with stream:
        try:
            for chunk in stream:
                write_model_text(chunk.text)
                any_text = any_text or bool(chunk.text)
        except (StagecoachError, KeyboardInterrupt):
            if any_text:  # what comes next is not part of the answer
                write_model_text("\n")
            raise
    write_model_text("\n")


def _print_all(generation: Any) -> None:
    from stagecoach_cli.terminal import write_model_text

    for completion in generation.completions:
        write_model_text(f"--- {completion.index} ({completion.finish_reason})\n{completion.text}\n")
