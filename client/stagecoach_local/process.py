"""One of a cluster's processes through all its restarts, and whether those that are left can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from stagecoach.topology import LayerRange
from stagecoach_client.status import ClusterStatus
from stagecoach_local.child_process import ChildProcess
from stagecoach_local.restarts import Restarts

Role = Literal["shard", "spare", "router"]


class Process:
    """What a process is started with, the child that runs or ran last, and how its starts have gone."""

    def __init__(
        self,
        name: str,
        role: Role,
        command: Sequence[str],
        address: str,
        layers: LayerRange | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.address = address
        self.layers = layers  # None: the router, or a spare
        self._command = command
        self._on_line = on_line
        self.child = ChildProcess(name, command, on_line)
        self.restarts = Restarts()
        self.came_up = False
        self.started_at = 0.0  # by the supervisor's clock
        self.again_at: float | None = None  # when it is started again; None unless it has ended and waits for that
        self.given_up = False  # it has ended, and is not started again

    def start_again(self, now: float) -> None:
        """Starts a new child with the same command. Raises ConfigError if it cannot be started."""
        child = ChildProcess(self.name, self._command, self._on_line)
        child.start()
        self.child = child
        self.came_up = False
        self.started_at = now
        self.again_at = None

    def does_its_job(self, status: ClusterStatus) -> bool:
        """Whether the cluster, by its `status`, knows the child that runs now as one that does its job."""
        if self.role == "router":
            return status.ready
        if any(self.child.pid == stage.pid for pipeline in status.pipelines for stage in pipeline.stages):
            return True
        return any(self.child.pid == spare.pid and not spare.reason for spare in status.spares)


def can_serve(processes: Sequence[Process]) -> bool:
    """Whether those that were not given up suffice: a router, and for each layer range a shard or else a spare."""
    left = [process for process in processes if not process.given_up]
    missing = {each.layers for each in processes if each.role == "shard"} - {each.layers for each in left}
    return any(each.role == "router" for each in left) and len(missing) <= sum(each.role == "spare" for each in left)
