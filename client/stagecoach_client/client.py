"""The client for ordinary, blocking code."""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from stagecoach.errors import Cancelled, from_rpc_error
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1.inference_pb2 import CancelRequest, GetClusterStatusRequest, ListModelsRequest
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client.requests import GenerateOptions, Messages, generate_call, tokenize_request
from stagecoach_client.results import Generation, Tokenization, read_tokenization
from stagecoach_client.retry import Attempts
from stagecoach_client.settings import (
    CANCEL_TIMEOUT_S,
    DEFAULT_MAX_RETRIES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Settings,
    choose_api_key,
    peer_name,
)
from stagecoach_client.status import ClusterStatus, Model, read_models, read_status
from stagecoach_client.streams import GenerationStream
from stagecoach_client.tls import Tls


class Client:
    """Calls a router. May be shared between threads; close it, or use it in a `with` statement.

    `target` is HOST:PORT. `timeout_s` is the deadline of a generation, its retries included; calls that only read take
    at most 30 s. An address where nobody answers is Unavailable after `connect_timeout_s`, and the waits between the
    attempts, 1.5 s with the default. A call is retried, at most `max_retries` times, if nothing has come back and the
    server was not there or had no room; it has the same request id, so that nothing is computed twice. With the
    default, a cluster that is starting gets some 15 s. A stream that breaks later goes on where it was, without a gap
    or a repeat, where the router still knows the request or has it in its journal, and is back within 30 s; one whose
    connection ends before its first token waits as long for the router. With `max_retries` 0 neither is tried.

    `tls` says what a router is that speaks TLS; without it nothing is encrypted.

    `api_key` is sent with every call, to a router that wants one; None: what is in STAGECOACH_API_KEY, if anything.

    A `channel` that is passed in (to add interceptors, or to test) is used as it is, and stays the caller's to
    close; without a `target`, errors name no address.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        api_key: str | None = None,
        tls: Tls | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._settings = Settings(
            target, timeout_s, connect_timeout_s, max_retries, tls=tls, api_key=choose_api_key(api_key)
        )
        self._own_channel = self._settings.channel() if channel is None else None
        self._stub = InferenceStub(channel or self._own_channel)  # type: ignore[no-untyped-call]
        self._peer = peer_name(target, channel)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[GenerationStream] = weakref.WeakSet()  # to end them with us

    @overload
    def generate(
        self, prompt: str | None = None, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: str | None = None, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> GenerationStream: ...
    @overload
    def generate(
        self, prompt: str | None = None, *, stream: bool, **options: Unpack[GenerateOptions]
    ) -> Generation | GenerationStream: ...
    def generate(
        self, prompt: str | None = None, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Generation | GenerationStream:
        """Generates from exactly one of `prompt`, `token_ids` and `messages` (a conversation of roles and contents).

        Sampling: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
        seed, max_tokens, stop (a string or several), stop_token_ids, ignore_eos, logprobs, n; their meaning, limits and
        defaults are SamplingParams'. Besides them: model ("" for the only one), request_id (a random one where empty;
        one that was sent before attaches to that request), priority (larger runs first), cache_salt (requests of
        different salts share no K/V, so that their times say nothing about each other), linger_s (how long the request
        runs on when its connection breaks, so that the stream can go on; closing it ends it all the same) and timeout_s
        (the client's where None). None is as good as not given.

        Returns the whole Generation, or, when `stream`, an iterator of Chunks. Raises InvalidArgument before anything
        is sent, and the errors of the server: when `stream`, where the chunks are read.
        """
        self._check_open()
        call = generate_call(prompt, options)
        attempts = self._settings.generate_attempts(call.timeout_s)
        chunks = GenerationStream(
            lambda timeout_s: self._stub.Generate(
                call.request, timeout=timeout_s, wait_for_ready=False, metadata=self._settings.metadata
            ),
            lambda: self._stub.Cancel.future(
                CancelRequest(request_id=call.request.request_id),
                timeout=CANCEL_TIMEOUT_S,
                metadata=self._settings.metadata,
            ),
            call,
            attempts,
            self._peer,
        )
        with self._lock:
            self._streams.add(chunks)
        if stream:
            return chunks
        with chunks:
            return chunks.collect()

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> Tokenization:
        """The token ids of exactly one of `prompt` and `messages` (through the checkpoint's chat template)."""
        request = tokenize_request(prompt, messages, model)
        return read_tokenization(self._read(self._stub.Tokenize, request, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """What is served."""
        return read_models(self._read(self._stub.ListModels, ListModelsRequest(), timeout_s))

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """How the router and its pipelines are."""
        return read_status(self._read(self._stub.GetClusterStatus, GetClusterStatusRequest(), timeout_s))

    def close(self) -> None:
        """Ends the calls that run or wait for their next attempt, and the connection."""
        self._closed.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        if self._own_channel is not None:
            self._own_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        self._check_open()
        attempts: Attempts = self._settings.read_attempts(timeout_s)
        while True:
            try:
                return method(
                    request, timeout=attempts.remaining_s(), wait_for_ready=False, metadata=self._settings.metadata
                )
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, self._peer)
                delay_s = attempts.delay_s(error)
                if delay_s is None:
                    raise error from failure
            if self._closed.wait(delay_s):
                raise Cancelled("the client was closed during the call")

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("this client has been closed")
