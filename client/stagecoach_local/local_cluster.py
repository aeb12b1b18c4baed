"""A whole cluster on this machine, in child processes: to try a model, to develop, to test and to measure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stagecoach.errors import Cancelled, DeadlineExceeded, InvalidArgument, StagecoachError
from stagecoach.rpc.addresses import check_address, is_loopback, split_address
from stagecoach.topology import LayerRange
from stagecoach_client.client import Client
from stagecoach_client.status import ClusterStatus
from stagecoach_client.tls import Tls
from stagecoach_local.addresses import free_addresses
from stagecoach_local.child_process import ChildProcess
from stagecoach_local.cluster_plan import plan_processes
from stagecoach_local.commands import Commands, StagecoachCommands, even_threads
from stagecoach_local.layer_split import read_shape, split_layers
from stagecoach_local.process import Process, Role
from stagecoach_local.process_exit import ProcessDied, ProcessExit
from stagecoach_local.supervisor import Supervisor

if TYPE_CHECKING:
    from stagecoach_local.certificates import ClusterCertificates

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
# Between the choice of a free port and its use somebody else may take it. Then all ports are chosen anew.
NUM_START_ATTEMPTS = 3
_POLL_INTERVAL_S = 0.1
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    """One of the cluster's processes as it is now. A process that was started again has another pid."""

    name: str
    pid: int
    address: str
    layers: LayerRange | None  # None for the router, and for a spare
    role: Role


class LocalCluster:
    """Shards and a router for the checkpoint folder `model`. Use it in a `with` statement.

    `stages` says into how many stages the layers are split, evenly, or gives the layer ranges themselves
    ("0:10,10:30"). `replicas` is how many such pipelines there are, and `spares` how many shards stand by that have no
    layers of their own, and load a stage's. `threads_per_shard` is an even share of the cores by default; spares are
    not counted for it.

    With `certificates` (see throwaway_certificates) the links between the processes are encrypted. If `listen` is not
    on loopback, callers speak TLS as well, and `tls` is what they need for it. Without certificates such a `listen` is
    refused, unless `insecure_listen` allows it.

    With `restart`, a process that ends by itself once the cluster is up is started again (restarts.py says when it is
    not), and `on_event(text)` is told so. `on_line(process_name, line)` is called with each line of the processes'
    output, and `on_wait(reason)` with what the start waits for. The first two are called from other threads.

    Raises CheckpointError, TopologyError, InvalidArgument and ConfigError for settings that cannot work. Raises
    ProcessDied, with its last output, when a process ends that is not started again, and DeadlineExceeded when not all
    pipelines are ready after `start_timeout_s`.
    """

    def __init__(
        self,
        model: str | Path,
        stages: int | str | Sequence[LayerRange] = 2,
        *,
        replicas: int = 1,
        spares: int = 0,
        listen: str = "127.0.0.1:0",
        device: str = "cpu",
        dtype: str = "bfloat16",
        kv_cache_memory: str | None = None,
        threads_per_shard: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        restart: bool = False,
        on_line: Callable[[str, str], None] | None = None,
        on_wait: Callable[[str], None] | None = None,
        on_event: Callable[[str], None] | None = None,
        certificates: ClusterCertificates | None = None,
        insecure_listen: bool = False,
        commands: Commands | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layers = split_layers(stages, read_shape(Path(model)))
        self.replicas = _at_least(1, "replicas", replicas)
        self.spares = _at_least(0, "spares", spares)
        num_computing = replicas * len(self.layers)
        self._listen = check_address(listen, "listen", listening=True)
        edge_tls = certificates is not None and not is_loopback(split_address(listen, "listen")[0])
        self.tls = Tls(certificates.ca) if certificates is not None and edge_tls else None
        self._commands = commands or StagecoachCommands(
            Path(model),
            device,
            dtype,
            kv_cache_memory,
            num_computing + spares,
            threads_per_shard or even_threads(num_computing),
            certificates,
            edge_tls,
            insecure_listen,
        )
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._restart = restart
        self._on_line = on_line
        self._on_wait = on_wait
        self._on_event = on_event
        self._clock = clock
        self._processes: list[Process] = []  # all that have been started
        self._exits: list[ProcessExit] = []
        self._supervisor: Supervisor | None = None
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # held while the processes are ended

    @property
    def address(self) -> str:
        """Where the router answers, HOST:PORT. Raises RuntimeError before the start."""
        for process in self._processes:
            if process.role == "router":
                return process.address
        raise RuntimeError("the cluster has not been started")

    @property
    def processes(self) -> tuple[ClusterProcess, ...]:
        """The shards, pipeline by pipeline and in the order of their layers, then the spares, then the router."""
        return tuple(
            ClusterProcess(process.name, process.child.pid, process.address, process.layers, process.role)
            for process in self._processes
        )

    @property
    def exits(self) -> tuple[ProcessExit, ...]:
        """How the processes ended, in the order of `processes`; empty while they run."""
        return tuple(self._exits)

    def start(self) -> None:
        """Returns when all pipelines are ready. After an error no process is left."""
        self._stopped.clear()
        for attempts_left in reversed(range(NUM_START_ATTEMPTS)):
            try:
                self._start_all()
                return
            except BaseException as error:
                self._end_all()
                if not (attempts_left and _port_was_taken(error)):
                    raise

    def check(self) -> None:
        """Raises ProcessDied if a process has ended; with `restart`, only if it is not started again."""
        if self._supervisor is None:
            for process in self._processes:
                process.child.check()
        elif self._supervisor.failure is not None:
            raise self._supervisor.failure

    def wait(self) -> None:
        """Blocks until `stop` is called. Raises what `check` raises, as soon as it would."""
        while not self._stopped.wait(_POLL_INTERVAL_S):
            self.check()

    def stop(self) -> None:
        """Ends all processes: asks the router, then the shards, and kills those that are left after `stop_timeout_s`.

        `exits` says how each of them ended. It may be called more than once and from any thread, but not by `on_event`.
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
        self._processes, self._exits, self._supervisor = [], [], None
        for process in self._plan():
            if self._stopped.is_set():
                raise Cancelled("the cluster was stopped while it started")
            process.child.start()
            self._processes.append(process)
        self._wait_until_ready()
        with self._ending:  # so that a `stop` either prevents the supervisor, or finds it and stops it
            if self._restart and not self._stopped.is_set():
                self._supervisor = Supervisor(self._processes, self._look, self._on_event, self._clock)
                self._supervisor.start()

    def _plan(self) -> list[Process]:
        """The processes to start, with addresses that are free now."""
        num_shards = len(self.layers) * self.replicas + self.spares
        *shard_addresses, listen = free_addresses([*["127.0.0.1:0"] * num_shards, self._listen])
        return plan_processes(
            self.layers, self.replicas, self.spares, self._commands, shard_addresses, listen, self._on_line
        )

    def _end_all(self) -> None:
        with self._ending:
            processes = self._processes[len(self._exits) :]  # all of them or, if they have been ended, none
            deadline = self._clock() + self._stop_timeout_s
            try:
                if self._supervisor is not None:
                    self._supervisor.stop()
                for is_router in (True, False):
                    group = [process.child for process in processes if (process.role == "router") == is_router]
                    for child in group:
                        child.terminate()
                    for child in group:
                        child.wait(max(0.0, deadline - self._clock()))
            finally:  # even if a second ctrl-C ends the wait
                self._exits += [_end(process.child) for process in processes]

    def _wait_until_ready(self) -> None:
        deadline = self._clock() + self._start_timeout_s
        while True:
            self.check()
            reason = self._not_ready()
            if reason is None:
                return
            if self._on_wait is not None:
                self._on_wait(reason)
            if self._clock() > deadline:
                limit = f"{self._start_timeout_s:g} s"
                what = "no pipeline is ready" if self.replicas == 1 else "not all pipelines are ready"
                raise DeadlineExceeded(f"{what} after {limit}: {reason}", field="start", limit=limit)
            if self._stopped.wait(_POLL_INTERVAL_S):
                raise Cancelled("the cluster was stopped while it started")

    def _not_ready(self) -> str | None:
        """What the start still has to wait for; None when all pipelines are ready."""
        status = self._look()
        if status is None:
            return "the router is starting"
        if status.num_ready >= self.replicas:
            return None
        reason = next((pipeline.reason for pipeline in status.pipelines if pipeline.reason), "no pipeline yet")
        return reason if self.replicas == 1 else f"{status.num_ready} of {self.replicas} pipelines are ready: {reason}"

    def _look(self) -> ClusterStatus | None:
        """How the router says that the cluster is; None if it does not answer.

        It asks with a new client each time, since one that failed to connect would wait before it tries again.
        """
        try:
            with Client(self.address, max_retries=0, connect_timeout_s=_PROBE_TIMEOUT_S, tls=self.tls) as client:
                return client.status(timeout_s=_PROBE_TIMEOUT_S)
        except StagecoachError:
            return None


def _at_least(limit: int, name: str, value: int) -> int:
    if value < limit:
        raise InvalidArgument(f"{name} must be {limit} or more; got {value}", field=name, limit=limit, value=value)
    return value


def _port_was_taken(error: BaseException) -> bool:
    return isinstance(error, ProcessDied) and error.ended is not None and error.ended.port_was_taken


def _end(child: ChildProcess) -> ProcessExit:
    late = child.exit_status is None
    child.kill()
    status = child.exit_status
    assert status is not None
    return ProcessExit(child.name, status, killed=late)
