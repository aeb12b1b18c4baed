"""The health service, grpc.health.v1: asked for "" or the service's own name it says whether the process is ready.

Asked for "liveness" it always says yes, from the same event loop that does the work: where that loop stands still,
nobody answers. A watcher that does not read delays nobody's answer but its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"

Context = grpc.aio.ServicerContext[Any, Any]
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """The health service of one process: not ready until told so."""

    def __init__(self, server: grpc.aio.Server, service_name: str) -> None:
        self._names = ("", service_name)
        self._statuses: dict[str, int] = {LIVENESS: _Status.SERVING}
        self._watchers: set[asyncio.Event] = set()
        self._draining = False
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        self.set_ready(False)

    def set_ready(self, ready: bool) -> None:
        """Sets what is answered from now on, and tells those who watch."""
        ready = ready and not self._draining
        for name in self._names:
            self._statuses[name] = _Status.SERVING if ready else _Status.NOT_SERVING
        for changed in self._watchers:
            changed.set()

    def drain(self) -> None:
        """Makes the process not ready for good: it is about to stop."""
        self._draining = True
        self.set_ready(False)

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answers with a service's status, or NOT_FOUND for an unknown one."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no such service: {request.service[:100]!r}")
        return _Status(status=status)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """Sends a service's status now and whenever it changes. A slow reader may miss one that did not last."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
                if status != last:
                    await context.write(_Status(status=status))
                    last = status
                await changed.wait()
        finally:
            self._watchers.discard(changed)
