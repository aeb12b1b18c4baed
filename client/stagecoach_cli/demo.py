"""`stagecoach demo`: starts a cluster, asks it a few questions at the same time, shows the answers, and stops it."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagecoach.errors import StagecoachError
from stagecoach_cli import extras
from stagecoach_cli.options import DType, Stages
from stagecoach_cli.stop_signals import interrupt_on_stop_signals
from stagecoach_cli.terminal import format_bytes, make_console, without_control

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from stagecoach_client import AsyncClient, ClusterStatus
    from stagecoach_local import LocalCluster, ProcessExit

# The answer to the first question is known. It is asked greedily, so that the answer is the same every time.
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
OTHER_QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about a stagecoach.",
    "Name three rivers in Europe.",
)
MAX_TOKENS = 80
SEED = 7
_COLOURS = ("cyan", "green", "yellow", "magenta")
# A sentence ends in a mark and a space, but not after a digit: "1. The Danube" is one sentence.
_END_OF_SENTENCE = re.compile(r"(?<=[^\d\s][.!?])\s+|\n")


@dataclass(slots=True)
class Answer:
    """One question, and what has come of its answer so far."""

    question: str
    temperature: float
    text: str = ""
    num_tokens: int = 0
    first_token_s: float | None = None
    num_printed: int = field(default=0, repr=False)  # characters of `text` that are on the screen


def demo(
    model: Annotated[Path, typer.Option(help="The folder of the model's checkpoint.")],
    stages: Stages = "2",
    dtype: Annotated[
        DType, typer.Option(help="What the shards compute in. In float32 the answers are the same everywhere.")
    ] = DType.FLOAT32,
) -> None:
    """Show on this machine what Stagecoach does. The exit status is 1 if anything is not as it should be."""
    from stagecoach_local import LocalCluster

    extras.require("demo", extras.CLUSTER, "[router] and [shard] extras")
    extras.require("demo", extras.CERTIFICATES, "[cli] extra")
    from stagecoach_local.certificates import throwaway_certificates

    console = make_console()
    progress = console.status("starting")
    interrupt_on_stop_signals()
    with throwaway_certificates() as certificates:
        cluster = LocalCluster(
            model,
            stages,
            dtype=dtype.value,
            certificates=certificates,
            on_wait=lambda reason: progress.update(f"starting: {reason}"),
        )
        faults = run_demo(cluster, console, progress)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def run_demo(cluster: LocalCluster, console: Console, progress: Status) -> list[str]:
    """Starts the cluster, asks it, shows the answers and stops it. Returns what was not as it should be."""
    with progress, cluster:
        progress.stop()
        began = time.monotonic()
        try:
            answers, status = asyncio.run(_ask_all(cluster.address, console))
        except StagecoachError:
            cluster.check()  # if a process has died, that says more than what it did to a caller
            raise
        elapsed_s = time.monotonic() - began
        cluster.check()
        console.print(_table(cluster, status))
    _print_summary(console, answers, elapsed_s)
    faults = find_faults(answers, cluster.exits)
    if not faults:
        console.print(f"all {len(cluster.exits)} processes stopped when told to, with status 0")
    return faults


def find_faults(answers: Sequence[Answer], exits: Sequence[ProcessExit]) -> list[str]:
    """What is wrong with the answers, and with how the processes ended."""
    faults = [str(ended) for ended in exits if not ended.clean]
    first = answers[0]
    if EXPECTED not in first.text:
        faults.insert(0, f"the answer to {first.question!r} does not say {EXPECTED}: {first.text!r}")
    return faults


async def _ask_all(target: str, console: Console) -> tuple[list[Answer], ClusterStatus]:
    from stagecoach_client import AsyncClient

    answers = [Answer(QUESTION, 0.0), *(Answer(question, 0.7) for question in OTHER_QUESTIONS)]
    for index, answer in enumerate(answers):
        _print_line(console, index, f"asked: {answer.question}")
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
        if answer.first_token_s is None:
            answer.first_token_s = time.monotonic() - began
        answer.text += chunk.text
        answer.num_tokens += len(chunk.token_ids)
        lines, length = finished_lines(answer.text[answer.num_printed :], last=chunk.finish_reason is not None)
        answer.num_printed += length
        for line in lines:
            _print_line(console, index, line)


def finished_lines(text: str, *, last: bool) -> tuple[list[str], int]:
    """The whole sentences at the start of `text`, as lines without line ends, and how many characters they take.

    The answers come at the same time and share the screen, so nothing less than a sentence is printed. Of an answer
    that has ended (`last`) all is.
    """
    end = len(text) if last else max((match.end() for match in _END_OF_SENTENCE.finditer(text)), default=0)
    return [line.strip() for line in text[:end].splitlines() if line.strip()], end


def _print_line(console: Console, index: int, text: str) -> None:
    from rich.text import Text

    prefix = (f"[{index}] ", _COLOURS[index % len(_COLOURS)])
    console.print(Text.assemble(prefix, without_control(text)), soft_wrap=True)


def _table(cluster: LocalCluster, status: ClusterStatus) -> Table:
    """Which process held which layers, and how long it computed."""
    from rich.table import Table

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
