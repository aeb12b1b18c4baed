"""`stagecoach up`: a whole cluster on this machine."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagecoach.process.output_relay import OutputRelay
from stagecoach.rpc.addresses import check_address, split_address
from stagecoach.security.tls import ROUTER_NAME
from stagecoach.visible_text import visible
from stagecoach_cli import extras
from stagecoach_cli.options import DEFAULT_TARGET, DType, Stages
from stagecoach_cli.stop_signals import interrupt_on_stop_signals
from stagecoach_cli.terminal import make_console, write_at_once

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from stagecoach_local import LocalCluster
    from stagecoach_local.certificates import ClusterCertificates

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
_TLS_HELP = (
    "Encrypt the links between the processes, and to callers unless --listen is on loopback. "
    "The certificates are made for this run."
)


def up(
    model: Annotated[Path, typer.Option(help="The folder of the model's checkpoint.")],
    stages: Stages = "2",
    replicas: Annotated[int, typer.Option(min=1, help="How many pipelines of --stages there are.")] = 1,
    spares: Annotated[
        int, typer.Option(min=0, help="How many shards stand by for one that is lost, with as much memory.")
    ] = 0,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router answers.")] = DEFAULT_TARGET,
    dtype: Annotated[DType, typer.Option(help="What the shards compute in.")] = DType.BFLOAT16,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N. Several, separated by commas, are given to the shards in turn.")
    ] = "cpu",
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="K/V memory of each shard, for example 2G. By default, a share of what is free."
        ),
    ] = None,
    threads_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Threads of each shard. By default, an even share of the cores.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Start a process that ends by itself again.")] = True,
    tls: Annotated[bool, typer.Option(help=_TLS_HELP)] = True,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="With --no-tls, allow a --listen that other machines can reach.")
    ] = False,
) -> None:
    """Start shards and a router on this machine, and stay until ctrl-C."""
    from rich.text import Text

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
            on_line=log.line_of,
            on_event=lambda text: log.say(text, style="bold"),
            on_wait=lambda reason: progress.update(Text(f"starting: {visible(reason)}")),
        )
        _serve(cluster, log, progress)


def _serve(cluster: LocalCluster, log: _Log, progress: Status) -> None:
    """Starts the cluster, and stops it on ctrl-C, SIGTERM or SIGHUP. Raises what ends a process for good."""
    interrupt_on_stop_signals()
    try:
        with cluster:
            with contextlib.suppress(OSError):  # of an output that is full or gone
                progress.stop()
            _say_welcome(log, cluster)
            cluster.wait()
    except KeyboardInterrupt:
        log.say("stopped")
    finally:
        log.close()


def _certificates(listen: str, tls: bool) -> contextlib.AbstractContextManager[ClusterCertificates | None]:
    if not tls:
        return contextlib.nullcontext()
    from stagecoach_local.addresses import WILDCARD_HOSTS
    from stagecoach_local.certificates import throwaway_certificates

    host, _ = split_address(check_address(listen, "listen", listening=True), "listen")
    return throwaway_certificates(router_hosts=() if host in WILDCARD_HOSTS else (host,))


class _Log:
    """What is printed while the cluster runs: the processes' output, each in a colour of its own, and our own lines.

    May be called from several threads, none of which waits for the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._relay = OutputRelay(lambda count: self._print(f"({count} lines could not be written)", style="dim"))
        self._lock = threading.Lock()
        self._colours: dict[str, str] = {}

    def line_of(self, name: str, line: str) -> None:
        """Prints a line of the process `name`. What would move the cursor in it is made visible."""
        from rich.text import Text

        with self._lock:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
        text = Text.assemble((f"[{name}] ", colour), visible(line, keep="\t"))
        self._relay.put(lambda: self._print(text))

    def say(self, text: str, style: str | None = None) -> None:
        """Prints what no process has written, though it may quote one."""
        shown = visible(text, keep="\t\n")
        self._relay.put(lambda: self._print(shown, style=style))

    def close(self) -> None:
        """Returns when everything is printed, or that takes too long."""
        self._relay.close()

    def _print(self, text: str | Text, style: str | None = None) -> None:
        # Not by the console itself: it keeps what it could not write, and writes that again with every later line.
        with self._console.capture() as captured:
            self._console.print(text, style=style, soft_wrap=True)
        write_at_once(self._console.file, captured.get())


def _say_welcome(log: _Log, cluster: LocalCluster) -> None:
    for process in cluster.processes:
        log.say(f"  {process.name:<16} pid {process.pid:<8} {process.address}")
    where = f"--target {cluster.address}" + (f" --tls-ca {cluster.tls.ca}" if cluster.tls is not None else "")
    log.say(f"ready at {cluster.address}. Try, in another terminal:")
    log.say(f"  stagecoach chat {where}")
    log.say(f'  stagecoach generate "Once upon a time" {where}')
    if cluster.tls is not None:
        log.say(f"At another of this machine's addresses, add --tls-server-name {ROUTER_NAME}.")
    log.say("ctrl-C stops it.")
