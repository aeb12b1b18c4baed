"""`stagecoach status`: who serves what, and how it goes."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from stagecoach_client.cli.options import (
    DEFAULT_TARGET,
    ApiKey,
    Target,
    TlsCA,
    TlsCert,
    TlsKey,
    TlsServerName,
    choose_tls,
)

if TYPE_CHECKING:
    from rich.table import Table

    from stagecoach_client import ClusterStatus, PipelineStatus

_COLUMNS = ["stage", "layers", "address", "device", "dtype", "host", "pid", "weights", "K/V", "queue"]
_NUMBERS = {"stage", "pid", "weights", "K/V", "queue"}


def status(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", min=0.0, metavar="SECONDS", help="What the stages did in so many seconds from now."),
    ] = 0.0,
    tls_ca: TlsCA = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
) -> None:
    """Show the pipelines, their stages, and how busy they were: since the router started, or for an interval.

    Exit status 1 if none is ready.
    """
    from stagecoach_client import Client
    from stagecoach_client.activity import activity
    from stagecoach_client.cli.activity_table import activity_line, stage_table
    from stagecoach_client.cli.terminal import make_console

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
            console.print(line)
        for pipeline in cluster.pipelines:
            console.print(_table(pipeline))
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
        *([] if cluster.pipelines else ["no pipelines"]),
    ]


def _table(pipeline: PipelineStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    from stagecoach_client.cli.terminal import format_bytes

    state = "ready" if pipeline.ready else f"not ready: {pipeline.reason or 'no reason given'}"
    title = Text(f"{pipeline.model.name or 'model unknown'}: {state} (epoch {pipeline.epoch})")
    title.stylize("green" if pipeline.ready else "red")
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for index, stage in enumerate(pipeline.stages):
        cells = (
            str(index),
            f"{stage.first_layer}:{stage.end_layer}",
            stage.address,
            f"{stage.device} ({stage.kernels})",
            stage.dtype,
            stage.hostname,
            str(stage.pid),
            format_bytes(stage.weights_bytes),
            format_bytes(stage.kv_cache_bytes),
            str(stage.queue_depth),
        )
        table.add_row(*map(Text, cells))
    return table
