"""`stagecoach up`: a whole cluster on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from stagecoach_client.cli import extras
from stagecoach_client.cli.options import DEFAULT_TARGET, DType

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_client.local_cluster import LocalCluster

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


def up(
    model: Annotated[Path, typer.Option(help="The checkpoint folder.")],
    stages: Annotated[
        str, typer.Option(metavar="N|RANGES", help="Shards to split the layers over; or layer ranges, 0:10,10:30.")
    ] = "2",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router answers.")] = DEFAULT_TARGET,
    dtype: Annotated[DType, typer.Option(help="To compute in.")] = DType.BFLOAT16,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; or one for each stage, separated by commas.")
    ] = "cpu",
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each shard, for example 2G; default: the shard decides.")
    ] = None,
    threads_per_shard: Annotated[int | None, typer.Option(min=1, help="Default: an even share of the cores.")] = None,
) -> None:
    """Start shards and a router here, and stay until ctrl-C."""
    from stagecoach_client.cli.terminal import make_console
    from stagecoach_client.local_cluster import LocalCluster

    extras.require("up", extras.CLUSTER, "[router] and [shard] extras")
    console = make_console()
    log = _Log(console)
    with console.status("starting") as progress:
        cluster = LocalCluster(
            model,
            stages,
            listen=listen,
            device=device,
            dtype=dtype.value,
            kv_cache_memory=kv_cache_memory,
            threads_per_shard=threads_per_shard,
            on_line=log.print,
            on_wait=lambda reason: progress.update(f"starting: {reason}"),
        )
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        try:
            with cluster:
                progress.stop()
                _print_welcome(console, cluster)
                cluster.wait()
        except KeyboardInterrupt:
            console.print("stopped")


class _Log:
    """Prints the processes' lines, each process in a colour of its own. Called from several threads."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._colours: dict[str, str] = {}

    def print(self, name: str, line: str) -> None:
        from rich.text import Text

        with self._lock:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            self._console.print(Text.assemble((f"[{name}] ", colour), line), soft_wrap=True)


def _print_welcome(console: Console, cluster: LocalCluster) -> None:
    for process in cluster.processes:
        layers = "router" if process.layers is None else f"layers {process.layers}"
        console.print(f"  {layers:<14} pid {process.pid:<8} {process.address}", soft_wrap=True)
    console.print(f"ready at {cluster.address}. Try, in another terminal:", soft_wrap=True)
    console.print(f"  stagecoach chat --target {cluster.address}", soft_wrap=True)
    console.print(f'  stagecoach generate "Once upon a time" --target {cluster.address}', soft_wrap=True)
    console.print("ctrl-C stops it.")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
