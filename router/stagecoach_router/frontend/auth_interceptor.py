"""Finds out whose each call is, once; a call without a known API key gets no further than the health check."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.security.refusals import RefusalLog
from stagecoach_router.tenants.tenants import Tenant, Tenants

# What probes ask. Not Watch: it keeps a call open, and strangers are not to use up those that there may be.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# Finds a method's handler; None: there is no such method.
Find = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


# gRPC runs interceptors and method of a call in one task, so what is set here is read there.
_calling_tenant: ContextVar[Tenant] = ContextVar("calling_tenant")


def calling_tenant() -> Tenant:
    """Whose call this is. To be asked within a call that the interceptor has let in."""
    return _calling_tenant.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """In front of every service of the router, also of those that are added later.

    It refuses every call but a health check that brings no known key; nobody counts those that it refuses. Where there
    are no keys, everyone is the same tenant.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._refusals = RefusalLog()

    async def intercept_service(
        self, continuation: Find, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, or one that refuses."""
        if handler_call_details.method != HEALTH_CHECK:
            try:
                _calling_tenant.set(self._tenants.identify(handler_call_details.invocation_metadata))
            except errors.Unauthenticated as error:
                return self._refusal(error)
        return await continuation(handler_call_details)

    def _refusal(self, error: errors.Unauthenticated) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._refusals.refused(context.peer(), error)
            await abort(context, error)

        # A handler of streams, whatever the method is: it reads nothing until asked to, so a stranger's message is
        # neither received nor parsed.
        return grpc.stream_stream_rpc_method_handler(refuse)
