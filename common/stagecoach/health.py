"""grpc.health.v1: "" and the service's own name tell readiness, "liveness" that the event loop turns."""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

LIVENESS = "liveness"


class Health:
    """The health service of one process: not ready until told so."""

    def __init__(self, server: grpc.aio.Server, service_name: str) -> None:
        self._names = ("", service_name)
        self._servicer = HealthServicer()
        self._changes: set[asyncio.Task[None]] = set()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self._set((LIVENESS,), health_pb2.HealthCheckResponse.SERVING)
        self.set_ready(False)

    def set_ready(self, ready: bool) -> None:
        """From now on, to who asks and to who watches."""
        status = health_pb2.HealthCheckResponse
        self._set(self._names, status.SERVING if ready else status.NOT_SERVING)

    def _set(self, names: tuple[str, ...], status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in names:
            change = asyncio.ensure_future(self._servicer.set(name, status))
            self._changes.add(change)
            change.add_done_callback(self._changes.discard)
