"""`stagecoach status`: which shards serve what, and how busy they are."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from stagecoach.visible_text import visible
from stagecoach_cli.activity_table import activity_line, stage_table
from stagecoach_cli.options import (
    DEFAULT_TARGET,
    ApiKey,
    Target,
    TlsCA,
    TlsCert,
    TlsKey,
    TlsServerName,
    choose_tls,
)
from stagecoach_cli.terminal import format_bytes, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from stagecoach_client import ClusterStatus, PipelineStatus, SpareStatus

_COLUMNS = ["stage", "layers", "address", "device", "dtype", "host", "pid", "weights", "K/V", "queue"]
_NUMBERS = {"stage", "pid", "weights", "K/V", "queue"}


def status(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", min=0.0, metavar="SECONDS", help="Show what is done in so many seconds from now."),
    ] = 0.0,
    tls_ca: TlsCA = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
) -> None:
    """Show the pipelines, their stages and the spares, and how busy each stage was since the router started.

    The exit status is 1 if no pipeline is ready.
    """
    from stagecoach_client import Client
    from stagecoach_client.activity import activity

    with Client(target, api_key=api_key, tls=choose_tls(tls_ca, tls_cert, tls_key, tls_server_name)) as client:
        before = client.status() if interval_s else None
        time.sleep(interval_s)
        cluster = client.status()
    done = activity(cluster, before)
    if as_json:
        report = dataclasses.asdict(cluster) | {"activity": dataclasses.asdict(done)}
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        console = make_console()
        for line in _headlines(target, cluster):
            console.print(visible(line))
        for index in range(len(cluster.pipelines)):
            console.print(_pipeline_table(cluster, index))
        if cluster.spares:
            console.print(_spare_table(cluster.spares))
        if done.stages:
            when = f"in {interval_s:g} s" if before is not None else "since the router started"
            console.print(stage_table(f"{when}: {activity_line(done)}", done))
    raise typer.Exit(0 if cluster.ready else 1)


def _headlines(target: str, cluster: ClusterStatus) -> list[str]:
    used_blocks = cluster.num_blocks - cluster.num_free_blocks
    return [
        f"router {target}: up {cluster.uptime_s:.0f} s, {cluster.num_running} running, {cluster.num_waiting} waiting, "
        f"{cluster.num_finished} finished, {cluster.num_preemptions} preemptions",
        f"tokens: {cluster.prompt_tokens} in prompts ({cluster.cached_prompt_tokens} of them cached), "
        f"{cluster.completion_tokens} generated; "
        f"K/V blocks of {cluster.block_size}: {used_blocks} of {cluster.num_blocks} in use",
        *_faults(cluster),
    ]


def _faults(cluster: ClusterStatus) -> list[str]:
    """Which pipelines do not serve, and whether others do."""
    if not cluster.pipelines:
        return ["no pipelines"]
    lost = [(index, pipeline) for index, pipeline in enumerate(cluster.pipelines) if not pipeline.ready]
    if not lost or len(cluster.pipelines) == 1:  # the table of a single pipeline says it
        return []
    serving = (
        f"{cluster.num_ready} of {len(cluster.pipelines)} pipelines {'serves' if cluster.num_ready == 1 else 'serve'}"
    )
    return [serving, *(f"pipeline {index} does not serve: {_reason(pipeline)}" for index, pipeline in lost)]


def _reason(pipeline: PipelineStatus) -> str:
    return pipeline.reason or "no reason given"


def _pipeline_table(cluster: ClusterStatus, which: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    pipeline = cluster.pipelines[which]
    name = f"pipeline {which}, " if len(cluster.pipelines) > 1 else ""
    state = "ready" if pipeline.ready else f"not ready: {_reason(pipeline)}"
    load = f"{pipeline.num_running} running, {pipeline.num_waiting} waiting"
    title = Text(visible(f"{name}{pipeline.model.name or 'model unknown'}: {state} (epoch {pipeline.epoch}; {load})"))
    title.stylize("green" if pipeline.ready else "red")
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for index, stage in enumerate(pipeline.stages):
        cells = (
            str(index),
            f"{stage.first_layer}:{stage.end_layer}",
            stage.address + ("" if pipeline.ready else _elsewhere(cluster, stage.address)),
            f"{stage.device} ({stage.kernels})",
            stage.dtype,
            stage.hostname,
            str(stage.pid),
            format_bytes(stage.weights_bytes),
            format_bytes(stage.kv_cache_bytes),
            str(stage.queue_depth),
        )
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _elsewhere(cluster: ClusterStatus, address: str) -> str:
    """For a stage of a lost pipeline that serves in another one by now: in which."""
    index = cluster.serving_pipeline(address)
    return "" if index is None else f" (now in pipeline {index})"


def _spare_table(spares: Sequence[SpareStatus]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("shards in no pipeline"), title_justify="left")
    for name in ("address", "layers", "state"):
        table.add_column(name)
    for spare in spares:
        layers = f"{spare.first_layer}:{spare.end_layer}" if spare.has_layers else "none yet"
        state = spare.reason.removeprefix(f"{spare.address}: ") or ("ready" if spare.has_layers else "not assigned")
        table.add_row(*(Text(visible(cell)) for cell in (spare.address, layers, state)))
    return table
