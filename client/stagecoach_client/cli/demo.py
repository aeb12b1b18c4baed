"""`stagecoach demo`: a cluster, a few questions at the same time, their answers as they come, and a clean end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagecoach_client.cli.options import DType

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stagecoach_client import AsyncClient, ClusterStatus
    from stagecoach_client.local_cluster import LocalCluster

# The first is the one whose answer is known; it is asked greedily, so the answer is the same every time.
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
OTHER_QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about a stagecoach.",
    "Name three rivers in Europe.",
)
MAX_TOKENS = 80
SEED = 7


@dataclass(slots=True)
class Answer:
    """One question and what has come of its answer."""

    question: str
    temperature: float
    text: str = ""
    num_tokens: int = 0
    first_token_s: float | None = None
    printed: int = field(default=0, repr=False)  # characters of `text` that are on the screen


def demo(
    model: Annotated[Path, typer.Option(help="The checkpoint folder.")],
    stages: Annotated[str, typer.Option(metavar="N|RANGES", help="Shards to split the layers over.")] = "2",
    dtype: Annotated[DType, typer.Option(help="float32 answers the same everywhere.")] = DType.FLOAT32,
) -> None:
    """Show what Stagecoach does, on this machine. Exit status 1 if anything is not as it should be."""
    from stagecoach_client.cli.terminal import make_console
    from stagecoach_client.local_cluster import LocalCluster

    console = make_console()
    with console.status("starting") as progress:
        cluster = LocalCluster(
            model, stages, dtype=dtype.value, on_wait=lambda reason: progress.update(f"starting: {reason}")
        )
        with cluster:
            progress.stop()
            began = time.monotonic()
            answers, status = asyncio.run(_ask_all(cluster.address, console))
            elapsed_s = time.monotonic() - began
            cluster.check()
            console.print(_table(cluster, status))
    _print_summary(console, answers, elapsed_s)
    if EXPECTED not in answers[0].text:
        console.print(f"the answer to {QUESTION!r} does not say {EXPECTED}: {answers[0].text!r}")
        raise typer.Exit(1)
    console.print("all processes have stopped")


async def _ask_all(target: str, console: Console) -> tuple[list[Answer], ClusterStatus]:
    from stagecoach_client import AsyncClient

    answers = [Answer(QUESTION, 0.0), *(Answer(question, 0.7) for question in OTHER_QUESTIONS)]
    for index, answer in enumerate(answers):
        console.print(f"[{index}] asked: {answer.question}")
    async with AsyncClient(target) as client:
        await asyncio.gather(*(_ask(client, index, answer, console) for index, answer in enumerate(answers)))
        return answers, await client.status()


async def _ask(client: AsyncClient, index: int, answer: Answer, console: Console) -> None:
    began = time.monotonic()
    messages = [{"role": "user", "content": answer.question}]
    stream = await client.generate(
        messages=messages, stream=True, temperature=answer.temperature, max_tokens=MAX_TOKENS, seed=SEED
    )
    async for chunk in stream:
        answer.first_token_s = answer.first_token_s or time.monotonic() - began
        answer.text += chunk.text
        answer.num_tokens += len(chunk.token_ids)
        _print_lines(index, answer, console, last=chunk.finish_reason is not None)


def _print_lines(index: int, answer: Answer, console: Console, *, last: bool) -> None:
    """Prints what is new in whole lines or sentences: answers come at the same time, and share the screen."""
    new = answer.text[answer.printed :]
    ends = [new.rfind(mark) + len(mark) for mark in ("\n", ". ") if mark in new]
    end = len(new) if last else max(ends, default=0)
    for line in new[:end].splitlines():
        if line.strip():
            console.print(f"[{index}] {line.strip()}", soft_wrap=True)
    answer.printed += end


def _table(cluster: LocalCluster, status: ClusterStatus) -> Table:
    """Which process held what, and how long it computed."""
    from rich.table import Table

    from stagecoach_client.cli.terminal import format_bytes

    table = Table(title="who did it", title_justify="left")
    for name in ("process", "pid", "layers", "weights", "steps", "computing"):
        table.add_column(name)
    stages = {stage.pid: stage for pipeline in status.pipelines for stage in pipeline.stages}
    for process in cluster.processes:
        stage = stages.get(process.pid)
        if stage is None:
            table.add_row(process.name, str(process.pid), "-", "-", "-", "-")
        else:
            layers = f"{stage.first_layer}:{stage.end_layer}"
            weights = format_bytes(stage.weights_bytes)
            table.add_row(
                process.name, str(process.pid), layers, weights, str(stage.num_steps), f"{stage.compute_s:.1f} s"
            )
    return table


def _print_summary(console: Console, answers: list[Answer], elapsed_s: float) -> None:
    num_tokens = sum(answer.num_tokens for answer in answers)
    first_s = max(answer.first_token_s or 0.0 for answer in answers)
    console.print(
        f"{len(answers)} answers at the same time: {num_tokens} tokens in {elapsed_s:.1f} s, "
        f"{num_tokens / elapsed_s:.0f} tokens/s; every first token within {first_s:.2f} s"
    )
