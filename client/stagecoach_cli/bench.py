"""`stagecoach bench`: how fast a running cluster is, as a client sees it."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagecoach import __version__
from stagecoach.errors import ConfigError, OutOfRange
from stagecoach_cli.activity_table import activity_line, stage_table
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
from stagecoach_cli.terminal import make_console

if TYPE_CHECKING:
    from stagecoach_cli.load import Load
    from stagecoach_cli.load_figures import LoadResult
    from stagecoach_client import Model
    from stagecoach_client.tls import Tls

_WARM_UP_TOKENS = 8
_COLUMNS = ("concurrency", "requests", "tokens", "wall s", "e2e tok/s", "decode tok/s", "TTFT p50/p90/p99 ms",
            "ITL p50/p90/p99 ms")  # fmt: skip


def bench(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    model: ModelName = "",
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="How many requests are sent at a time. Each number is a run.")
    ] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, chosen at random.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens that each request generates; none stops earlier.")] = 64,
    requests_per_client: Annotated[int, typer.Option(help="Requests that each client sends, one after another.")] = 1,
    warmup: Annotated[bool, typer.Option(help="Before each measurement, run it once with little output.")] = True,
    seed: Annotated[int | None, typer.Option(help="Decides the prompts. By default it is different each time.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file as well.")
    ] = None,
    tls_ca: TlsCA = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
) -> None:
    """Measure throughput and latency. All prompts differ, so that the prefix cache does not help."""
    from stagecoach_cli.load import Load
    from stagecoach_cli.load_figures import DEFINITIONS

    counts = parse_whole_numbers(concurrency, "concurrency")
    loads = [Load(count, prompt_tokens, output_tokens, requests_per_client) for count in counts]
    if json_file is not None:
        _check_writable(json_file)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    tls = choose_tls(tls_ca, tls_cert, tls_key, tls_server_name)
    served, results = asyncio.run(_run(target, api_key, tls, model, loads, warmup, seed))
    _print_results(served, loads[0], results)
    if json_file is not None:
        report = {
            "target": target,
            "model": dataclasses.asdict(served),
            "stagecoach_version": __version__,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "requests_per_client": requests_per_client,
            "warmup": warmup,
            "seed": seed,
            "definitions": DEFINITIONS,
            "results": [dataclasses.asdict(result) for result in results],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


async def _run(
    target: str, api_key: str | None, tls: Tls | None, model: str, loads: list[Load], warmup: bool, seed: int
) -> tuple[Model, list[LoadResult]]:
    from stagecoach_cli.load import run_load
    from stagecoach_client import AsyncClient

    async with AsyncClient(target, max_retries=0, api_key=api_key, tls=tls) as client:
        served = _choose(await client.models(), model, target)
        for load in loads:
            needed = load.prompt_tokens + load.output_tokens
            if needed > served.context_length:
                text = f"{load.prompt_tokens} prompt and {load.output_tokens} output tokens do not fit the context"
                raise OutOfRange(text, field="prompt_tokens", limit=served.context_length, value=needed)
        arguments: dict[str, Any] = {"model": served.name, "vocab_size": served.vocab_size}
        results = []
        for load in loads:
            if warmup:
                typer.echo(f"concurrency {load.concurrency}: warming up", err=True)
                few = dataclasses.replace(
                    load, output_tokens=min(_WARM_UP_TOKENS, load.output_tokens), requests_per_client=1
                )
                await run_load(client, few, seed=seed + 1, **arguments)
            typer.echo(f"concurrency {load.concurrency}: measuring", err=True)
            results.append(await run_load(client, load, seed=seed, **arguments))
        return served, results


def _choose(models: tuple[Model, ...], name: str, target: str) -> Model:
    for model in models:
        if name in ("", model.name):
            return model
    names = ", ".join(model.name for model in models) or "no model"
    raise ConfigError(f"{target} serves {names}, not {name or 'any'}", field="model", value=name)


def _check_writable(path: Path) -> None:
    """Raises ConfigError before minutes of measuring rather than after. It leaves no file that was not there before."""
    try:
        existed = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", field="json", value=path) from error


def _print_results(model: Model, load: Load, results: list[LoadResult]) -> None:
    from rich.table import Table

    console = make_console()
    title = f"{model.name}: {load.prompt_tokens} prompt tokens, {load.output_tokens} output tokens"
    table = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            str(result.concurrency),
            str(result.num_requests),
            str(result.generated_tokens),
            f"{result.wall_s:.2f}",
            f"{result.e2e_tokens_per_s:.1f}",
            "-" if result.decode_tokens_per_s is None else f"{result.decode_tokens_per_s:.1f}",
            _milliseconds(result.ttft_s),
            "-" if result.itl_s is None else _milliseconds(result.itl_s),
        )
    console.print(table)
    for result in results:
        if result.activity is not None:
            title = f"concurrency {result.concurrency}: {activity_line(result.activity)}"
            console.print(stage_table(title, result.activity))
    cached = sum(result.cached_tokens for result in results)
    if cached:
        console.print(f"note: {cached} prompt tokens came from the prefix cache; use another --seed")


def _milliseconds(times: Any) -> str:
    return " / ".join(f"{1000 * value:.1f}" for value in (times.p50, times.p90, times.p99))
