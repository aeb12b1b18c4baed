"""`stagecoach generate`: an answer to one prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from stagecoach.errors import StagecoachError
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
    parse_whole_numbers,
)
from stagecoach_cli.sampling_options import (
    FrequencyPenalty,
    IgnoreEos,
    Logprobs,
    MaxTokens,
    MinP,
    NumCompletions,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from stagecoach_cli.terminal import not_text, write_model_text


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue. - reads it from standard input.")] = None,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    model: ModelName = "",
    chat: Annotated[bool, typer.Option("--chat", help="Treat PROMPT as a user's message to a chat model.")] = False,
    token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="Continue these tokens instead of PROMPT.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    n: NumCompletions = None,
    priority: Annotated[int, typer.Option(help="Requests with a larger priority run first.")] = 0,
    cache_salt: Annotated[
        str, typer.Option(metavar="SALT", help="Share no K/V with requests that have another salt.")
    ] = "",
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after so many seconds.")] = None,
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
        "ignore_eos": ignore_eos,
        "model": model,
        "priority": priority,
        "cache_salt": cache_salt,
        "timeout_s": timeout,
        **_input(prompt, token_ids, chat),
    }
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
        return {"token_ids": parse_whole_numbers(token_ids, "token_ids")}
    text = _read_stdin() if prompt == "-" else prompt
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise not_text(error, "prompt") from error


def _print_stream(stream: Any) -> None:
    any_text = False
    with stream:
        try:
            for chunk in stream:
                write_model_text(chunk.text)
                any_text = any_text or bool(chunk.text)
        except (StagecoachError, KeyboardInterrupt):
            if any_text:  # the error is not part of the answer, so it begins a line
                write_model_text("\n")
            raise
    write_model_text("\n")


def _print_all(generation: Any) -> None:
    for completion in generation.completions:
        write_model_text(f"--- {completion.index} ({completion.finish_reason})\n{completion.text}\n")
