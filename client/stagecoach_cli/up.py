"""`stagecoach up`: a whole cluster on this machine."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from stagecoach.rpc.channel import check_address, split_address
from stagecoach.security.tls import ROUTER_NAME
from stagecoach_cli import extras
from stagecoach_cli.options import DEFAULT_TARGET, DType

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_local import LocalCluster
    from stagecoach_local.certificates import ClusterCertificates

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
_WILDCARD_HOSTS = ("0.0.0.0", "[::]")


def up(
    model: Annotated[Path, typer.Option(help="The checkpoint folder.")],
    stages: Annotated[
        str, typer.Option(metavar="N|RANGES", help="Shards to split the layers over; or layer ranges, 0:10,10:30.")
    ] = "2",
    replicas: Annotated[int, typer.Option(min=1, help="Whole pipelines of --stages beside each other.")] = 1,
    spares: Annotated[int, typer.Option(min=0, help="Shards that stand by for one that is lost.")] = 0,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router answers.")] = DEFAULT_TARGET,
    dtype: Annotated[DType, typer.Option(help="To compute in.")] = DType.BFLOAT16,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; or one for each shard, separated by commas.")
    ] = "cpu",
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each shard, for example 2G; default: the shard decides.")
    ] = None,
    threads_per_shard: Annotated[int | None, typer.Option(min=1, help="Default: an even share of the cores.")] = None,
    restart: Annotated[bool, typer.Option(help="Start a process again that ends by itself.")] = True,
    tls: Annotated[
        bool,
        typer.Option(
            help="Encrypt the links between the processes, and to callers unless --listen is on loopback, "
            "with certificates made for this run."
        ),
    ] = True,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="With --no-tls: let other machines reach --listen.")
    ] = False,
) -> None:
    """Start shards and a router here, and stay until ctrl-C."""
    from stagecoach_cli.terminal import make_console
    from stagecoach_local import LocalCluster

    extras.require("up", extras.CLUSTER, "[router] and [shard] extras")
    extras.require("up", extras.CERTIFICATES if tls else (), "[cli] extra")
    console = make_console()
    log = _Log(console)
    with _certificates(listen, tls) as certificates, console.status("starting") as progress:
        cluster = LocalCluster(
            model,
            stages,
            replicas=replicas,
            spares=spares,
            restart=restart,
            listen=listen,
            device=device,
            dtype=dtype.value,
            kv_cache_memory=kv_cache_memory,
            threads_per_shard=threads_per_shard,
            certificates=certificates,
            insecure_listen=insecure_listen,
            on_line=log.print,
            on_event=log.say,
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


def _certificates(listen: str, tls: bool) -> contextlib.AbstractContextManager[ClusterCertificates | None]:
    if not tls:
        return contextlib.nullcontext()
    from stagecoach_local.certificates import throwaway_certificates

    host, _ = split_address(check_address(listen, "listen", listening=True), "listen")
    return throwaway_certificates(router_hosts=() if host in _WILDCARD_HOSTS else (host,))


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

    def say(self, text: str) -> None:
        """Something of our own."""
        with self._lock:
            self._console.print(text, style="bold", soft_wrap=True)


def _print_welcome(console: Console, cluster: LocalCluster) -> None:
    for process in cluster.processes:
        console.print(f"  {process.name:<16} pid {process.pid:<8} {process.address}", soft_wrap=True)
    where = f"--target {cluster.address}" + (f" --tls-ca {cluster.tls.ca}" if cluster.tls is not None else "")
    console.print(f"ready at {cluster.address}. Try, in another terminal:", soft_wrap=True)
    console.print(f"  stagecoach chat {where}", soft_wrap=True)
    console.print(f'  stagecoach generate "Once upon a time" {where}', soft_wrap=True)
    if cluster.tls is not None:
        console.print(f"At another of this machine's addresses, add --tls-server-name {ROUTER_NAME}.", soft_wrap=True)
    console.print("ctrl-C stops it.")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
