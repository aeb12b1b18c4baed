"""Ends lingering requests whose stream nobody closed.

A request with `linger_s` runs on when its connection breaks: that is what it is for. But a program that has dropped its
stream, or leaves without closing it, does not come back for it, and says so here. One that is killed cannot, and then
the request lingers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import grpc

from stagecoach.errors import StagecoachError
from stagecoach.v1.inference_pb2 import CancelRequest, GenerateRequest
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client.settings import CANCEL_TIMEOUT_S, Settings

# For all requests together, when the program ends.
EXIT_TIMEOUT_S = 1.0


class Farewell:
    """One lingering request, from when it has been sent until it has ended, or the router has been told to end it.

    `cancel` is the client's stub of Cancel: it returns the call at once. `settings` say how to reach the router when
    the client's own connection, or its event loop, is gone; a `channel` that was passed in is used as it is.
    """

    def __init__(self, request: GenerateRequest, cancel: Callable[..., Any], settings: Settings, channel: Any) -> None:
        self._request = request
        self._cancel = cancel
        self._settings = settings
        self._channel = channel
        self._pid = os.getpid()
        self._telling: Any = None  # gRPC ends a call that nobody keeps

    def begin(self) -> None:
        """The request has been sent."""
        _open.add(self)

    def done(self) -> None:
        """The request has ended: there is nothing to say."""
        _open.discard(self)

    def tell(self) -> Any:
        """Tells the router, unless that was done before. Returns gRPC's call object; None where nobody can be told."""
        if self._telling is None and self in _open and self._is_ours:
            # When the channel or its event loop is closed already, it is done when the program ends.
            with contextlib.suppress(ValueError, RuntimeError, grpc.aio.UsageError):
                options = self._settings.call_options(CANCEL_TIMEOUT_S)
                self._telling = self._cancel(CancelRequest(request_id=self._request.request_id), **options)
                self._telling.add_done_callback(self._told)
        return self._telling

    @property
    def _is_ours(self) -> bool:
        """Whether this is the process that has sent the request. A child that was forked leaves its parent's alone."""
        return self._pid == os.getpid()

    def _told(self, call: Any) -> None:
        if not call.cancelled():  # as by the end of the event loop
            _open.discard(self)

    def tell_at_exit(self, timeout_s: float) -> None:
        """Tells the router, and waits for the answer. Needs no thread and no event loop. Raises grpc.RpcError."""
        if not self._is_ours or isinstance(self._channel, grpc.aio.Channel):
            return  # or there is nothing to call with
        own_channel = self._settings.channel() if self._channel is None else None
        try:
            stub = InferenceStub(self._channel or own_channel)  # type: ignore[no-untyped-call]
            request = CancelRequest(request_id=self._request.request_id)
            stub.Cancel(request, **self._settings.call_options(timeout_s))
        finally:
            if own_channel is not None:
                own_channel.close()


def farewell_to(
    request: GenerateRequest, cancel: Callable[..., Any], settings: Settings, channel: Any
) -> Farewell | None:
    """None for a request that ends with its connection. The arguments are those of Farewell."""
    return Farewell(request, cancel, settings, channel) if request.linger_s else None


_open: set[Farewell] = set()


def _end_all() -> None:
    end_s = time.monotonic() + EXIT_TIMEOUT_S
    while _open and (left_s := end_s - time.monotonic()) > 0:
        with contextlib.suppress(grpc.RpcError, StagecoachError, ValueError, OSError):
            _open.pop().tell_at_exit(left_s)
    _open.clear()


atexit.register(_end_all)
