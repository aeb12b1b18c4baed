"""The client for ordinary code, whose calls block."""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from stagecoach.errors import Cancelled, from_rpc_error
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1.inference_pb2 import GetClusterStatusRequest, ListModelsRequest
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client.farewell import farewell_to
from stagecoach_client.requests import GenerateOptions, Messages, generate_call, tokenize_request
from stagecoach_client.results import Generation, Tokenization, read_tokenization
from stagecoach_client.settings import (
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
    """Calls a router. It may be shared between threads. Close it, or use it in a `with` statement.

    `target` is the router's address, HOST:PORT.

    `timeout_s` is the deadline of a generation, its retries included. Calls that only read take at most 30 s. An
    address where nobody answers is reported as Unavailable, after `connect_timeout_s` and the waits between the
    attempts (1.5 s with the default).

    `max_retries` is how often a call is tried again if the server was not there or had no room, and nothing has come
    back yet. Each attempt has the same request id, so nothing is computed twice. With the default, a cluster that is
    starting gets about 15 s. A stream that breaks later goes on where it was, without a gap or a repeat, as long as the
    router still knows the request or has it in its journal, and is back within 45 s. A stream whose connection ends
    before its first token waits for the router as long. With 0, a failure is always the answer.

    `api_key` is sent with every call, for a router that wants one; None takes it from STAGECOACH_API_KEY, if that is
    set. `tls` says how to recognise a router that speaks TLS; without it nothing is encrypted.

    A `channel` that is passed in (to add interceptors, or to test) is used as it is, and it is the caller who closes
    it. Unless a `target` is given beside it, errors name no address.
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
        self._given_channel = channel
        self._own_channel = self._settings.channel() if channel is None else None
        self._stub = InferenceStub(channel or self._own_channel)  # type: ignore[no-untyped-call]
        self._peer = peer_name(target, channel)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[GenerationStream] = weakref.WeakSet()  # so that they can be closed with it

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

        Returns the whole Generation or, with `stream`, an iterator of Chunks. Raises InvalidArgument before anything is
        sent, and the errors of the server; with `stream`, those are raised where the chunks are read.

        The sampling options are temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, logit_bias, seed, max_tokens, stop (a string or several), stop_token_ids, ignore_eos,
        logprobs and n. Their meaning, limits and defaults are those of stagecoach.sampling_params.SamplingParams.

        The others are, where None is the same as leaving an option out:

        - model: its name; not needed where the router has only one.
        - request_id: a random one by default. The id of an earlier request attaches to that request.
        - priority: requests with a larger one run first.
        - cache_salt: requests with different salts share no K/V, so that their times say nothing about each other.
        - linger_s: how long the request runs on after its connection broke, so that the stream can go on. Closing or
          dropping the stream, and the end of the program, end the request all the same.
        - timeout_s: instead of the client's.
        """
        self._check_open()
        call = generate_call(prompt, options)
        chunks = GenerationStream(
            lambda timeout_s: self._stub.Generate(call.request, **self._settings.call_options(timeout_s)),
            call,
            self._settings.generate_attempts(call.timeout_s),
            self._peer,
            farewell_to(call.request, self._stub.Cancel.future, self._settings, self._given_channel),
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
        """The models that the router serves."""
        return read_models(self._read(self._stub.ListModels, ListModelsRequest(), timeout_s))

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """How the router and its pipelines are, and what they have done since they started."""
        return read_status(self._read(self._stub.GetClusterStatus, GetClusterStatusRequest(), timeout_s))

    def close(self) -> None:
        """Ends all calls, also those that wait for their next attempt, and the connection."""
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
        attempts = self._settings.read_attempts(timeout_s)
        while True:
            try:
                return method(request, **self._settings.call_options(attempts.remaining_s()))
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
