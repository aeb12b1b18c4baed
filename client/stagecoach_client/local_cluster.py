"""A whole cluster on this machine, in child processes: to try a model, to develop, to test, to measure."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from stagecoach.channel import check_address, is_loopback, split_address
from stagecoach.errors import ConfigError, DeadlineExceeded, StagecoachError
from stagecoach.topology import LayerRange
from stagecoach_client.child_process import ChildProcess, ProcessDied, describe_exit
from stagecoach_client.client import Client
from stagecoach_client.layer_split import read_shape, split_layers
from stagecoach_client.tls import Tls

if TYPE_CHECKING:
    from stagecoach_client.throwaway_ca import ClusterCertificates, Issued

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
# Who stops a whole cluster wants it to stop: what runs gets a moment to end, well within the time for all of them.
DRAIN_TIMEOUT_S = 2.0
# Of this machine's free memory, for all shards together: each would take its own default of the same memory.
KV_CACHE_FRACTION = 0.3
# Between the choice of a free port and its use somebody else may take it; then all ports are chosen anew.
NUM_START_ATTEMPTS = 3
_PORT_IS_TAKEN = "cannot listen on"  # what our servers say then
_POLL_INTERVAL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    """One of the cluster's processes."""

    name: str
    pid: int
    address: str
    layers: LayerRange | None  # None: the router


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How one of the cluster's processes ended."""

    name: str
    status: int  # minus the signal's number where a signal ended it
    killed: bool  # by us, because it had not ended in time

    @property
    def clean(self) -> bool:
        return self.status == 0 and not self.killed

    def __str__(self) -> str:
        return f"{self.name} " + ("did not stop in time and was killed" if self.killed else describe_exit(self.status))


class Commands(Protocol):
    """What the processes are started with."""

    def shard(self, stage: int, layers: LayerRange, address: str) -> Sequence[str]: ...

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class StagecoachCommands:
    """The real shard server and router, of this Python installation."""

    model: Path
    device: str = "cpu"  # cpu, cuda, cuda:N; or one for each stage, separated by commas
    dtype: str = "bfloat16"
    kv_cache_memory: str | None = None  # of each shard, for example 2G; None: an even share of KV_CACHE_FRACTION
    num_shards: int = 1
    threads_per_shard: int = 1
    certificates: ClusterCertificates | None = None
    edge_tls: bool = False  # callers, too, speak TLS to the router
    insecure_listen: bool = False

    def shard(self, stage: int, layers: LayerRange, address: str) -> Sequence[str]:
        devices = self.device.split(",")
        command = [sys.executable, "-m", "stagecoach_shard", "--model", str(self.model), "--layers", str(layers)]
        command += ["--listen", address, "--device", devices[stage % len(devices)], "--dtype", self.dtype]
        command += ["--threads", str(self.threads_per_shard), "--drain-timeout-s", f"{DRAIN_TIMEOUT_S:g}"]
        if self.certificates is not None:
            command += _identity(self.certificates.shard, self.certificates.ca)
        if self.kv_cache_memory is not None:
            return [*command, "--kv-cache-memory", self.kv_cache_memory]
        return [*command, "--kv-cache-fraction", f"{KV_CACHE_FRACTION / self.num_shards:.4f}"]

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        command = [sys.executable, "-m", "stagecoach_router", "--shards", ",".join(shard_addresses)]
        command += ["--listen", address, "--drain-timeout-s", f"{DRAIN_TIMEOUT_S:g}"]
        if self.certificates is not None:
            command += _identity(self.certificates.router, self.certificates.ca)
            command += [] if self.edge_tls else ["--no-edge-tls"]
        return [*command, "--insecure-listen"] if self.insecure_listen else command


class LocalCluster:
    """Shards and a router for the checkpoint folder `model`; use it in a `with` statement.

    `stages` is how many the layers are split into, evenly, or the layer ranges themselves ("0:10,10:30").
    `threads_per_shard` defaults to an even share of the cores. With `certificates` (see throwaway_ca) the processes'
    links are encrypted, and callers speak TLS, too, where `listen` is not on loopback: `tls` is what they need for it.
    Without them such a `listen` is refused, unless `insecure_listen`. `on_line(process_name, line)` gets the processes'
    output and `on_wait(reason)` what the start waits for, the former from other threads.

    Raises CheckpointError, TopologyError, InvalidArgument and ConfigError for what cannot work, ProcessDied with its
    last output when a process ends, DeadlineExceeded when no pipeline is ready after `start_timeout_s`.
    """

    def __init__(
        self,
        model: str | Path,
        stages: int | str | Sequence[LayerRange] = 2,
        *,
        listen: str = "127.0.0.1:0",
        device: str = "cpu",
        dtype: str = "bfloat16",
        kv_cache_memory: str | None = None,
        threads_per_shard: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        on_line: Callable[[str, str], None] | None = None,
        on_wait: Callable[[str], None] | None = None,
        certificates: ClusterCertificates | None = None,
        insecure_listen: bool = False,
        commands: Commands | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layers = split_layers(stages, read_shape(Path(model)))
        threads = threads_per_shard or max(1, _num_cores() // len(self.layers))
        self._listen = check_address(listen, "listen", listening=True)
        edge_tls = certificates is not None and not is_loopback(split_address(listen, "listen")[0])
        self.tls = Tls(certificates.ca) if certificates is not None and edge_tls else None
        self._commands = commands or StagecoachCommands(
            Path(model),
            device,
            dtype,
            kv_cache_memory,
            len(self.layers),
            threads,
            certificates,
            edge_tls,
            insecure_listen,
        )
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._on_line = on_line
        self._on_wait = on_wait
        self._clock = clock
        self._children: list[ChildProcess] = []
        self._processes: list[ClusterProcess] = []
        self._exits: list[ProcessExit] = []
        self._stopped = threading.Event()

    @property
    def address(self) -> str:
        """Where the router answers, HOST:PORT. RuntimeError where it was not started."""
        for process in self._processes:
            if process.layers is None:
                return process.address
        raise RuntimeError("the cluster has not been started")

    @property
    def processes(self) -> tuple[ClusterProcess, ...]:
        """The shards in the order of their layers, then the router."""
        return tuple(self._processes)

    @property
    def exits(self) -> tuple[ProcessExit, ...]:
        """How the processes ended, in their order; empty while they run."""
        return tuple(self._exits)

    def start(self) -> None:
        """Returns when a pipeline is ready; after an error nothing runs."""
        for attempts_left in reversed(range(NUM_START_ATTEMPTS)):
            try:
                self._start_all()
                return
            except BaseException as error:
                self._end_all()
                if not (attempts_left and isinstance(error, ProcessDied) and _PORT_IS_TAKEN in error.message):
                    raise

    def check(self) -> None:
        """Raises ProcessDied if a process has ended."""
        for child in self._children:
            child.check()

    def wait(self) -> None:
        """Blocks until `stop` is called; raises ProcessDied when a process ends before."""
        while not self._stopped.wait(_POLL_INTERVAL_S):
            self.check()

    def stop(self) -> None:
        """Ends all processes: asks the router, then the shards, and kills what is left after `stop_timeout_s`.

        `exits` says how each of them took it.
        """
        self._stopped.set()
        self._end_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start_all(self) -> None:
        self._processes, self._exits = [], []
        *shard_addresses, router_address = free_addresses([*["127.0.0.1:0"] * len(self.layers), self._listen])
        for stage, (layers, address) in enumerate(zip(self.layers, shard_addresses, strict=True)):
            self._start(f"shard {layers}", self._commands.shard(stage, layers, address), address, layers)
        command = self._commands.router(shard_addresses, router_address)
        self._start("router", command, _callable(router_address), None)
        self._wait_until_ready()

    def _end_all(self) -> None:
        if not self._children:
            return
        children, self._children = self._children, []
        deadline = self._clock() + self._stop_timeout_s
        try:
            for group in (children[len(self.layers) :], children[: len(self.layers)]):
                for child in group:
                    child.terminate()
                for child in group:
                    child.wait(max(0.0, deadline - self._clock()))
        finally:  # also when a second ctrl-C ends the patience
            self._exits = [_end(child) for child in children]

    def _start(self, name: str, command: Sequence[str], address: str, layers: LayerRange | None) -> None:
        child = ChildProcess(name, command, self._on_line)
        child.start()
        self._children.append(child)
        self._processes.append(ClusterProcess(name, child.pid, address, layers))

    def _wait_until_ready(self) -> None:
        deadline = self._clock() + self._start_timeout_s
        while True:
            self.check()
            reason = _not_ready(self.address, self.tls)
            if reason is None:
                return
            if self._on_wait is not None:
                self._on_wait(reason)
            if self._clock() > deadline:
                limit = f"{self._start_timeout_s:g} s"
                raise DeadlineExceeded(f"no pipeline is ready after {limit}: {reason}", field="start", limit=limit)
            time.sleep(_POLL_INTERVAL_S)


def _identity(own: Issued, ca: Path) -> list[str]:
    return ["--tls-cert", str(own.cert), "--tls-key", str(own.key), "--tls-ca", str(ca)]


def _end(child: ChildProcess) -> ProcessExit:
    late = child.exit_status is None
    child.kill()
    status = child.exit_status
    assert status is not None
    return ProcessExit(child.name, status, killed=late)


def free_addresses(wanted: Sequence[str]) -> list[str]:
    """The `wanted` addresses, each port 0 made a free one. Somebody else may still take one before it is used.

    Raises ConfigError for an address that cannot be listened on.
    """
    addresses = []
    with contextlib.ExitStack() as held:  # all at a time, so that no two get the same port
        for address in wanted:
            host, port = split_address(address, "listen")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            try:
                listener = held.enter_context(socket.create_server((host.strip("[]"), port), family=family))
            except OSError as error:
                text = f"cannot listen on {address}: {error.strerror or error}"
                raise ConfigError(text, field="listen", value=address) from error
            addresses.append(f"{host}:{listener.getsockname()[1]}")
    return addresses


def _callable(listen: str) -> str:
    host, port = split_address(listen, "listen")
    return f"{_WILDCARD_HOSTS.get(host, host)}:{port}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _not_ready(address: str, tls: Tls | None) -> str | None:
    """Why there is no ready pipeline behind `address`, or None when there is one.

    Each time with a new client: one that failed to connect would wait before it tries again.
    """
    try:
        with Client(address, max_retries=0, connect_timeout_s=_PROBE_TIMEOUT_S, tls=tls) as client:
            status = client.status(timeout_s=_PROBE_TIMEOUT_S)
    except StagecoachError:
        return "the router is starting"
    if status.ready:
        return None
    return next((pipeline.reason for pipeline in status.pipelines if pipeline.reason), "no pipeline yet")
