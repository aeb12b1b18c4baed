"""A router's life: takes the port, joins the shards into pipelines, serves callers until told to stop.

`Router` is where a router's parts are made and joined: those that need no shard in its constructor, and those of the
model that the shards have in `_serve_model`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc.aio
from grpc_reflection.v1alpha import reflection

from stagecoach.errors import CheckpointError, ConfigError, ModelMismatch, StagecoachError, TopologyError, Unavailable
from stagecoach.process.listener import listen, stop_server
from stagecoach.rpc.addresses import read_addresses
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES, MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.health import Health
from stagecoach.security import tls
from stagecoach.security.watched_files import read_at_start
from stagecoach.v1 import inference_pb2, inference_pb2_grpc, model_pb2
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.recovery import recover_requests
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.engine.engine import Engine
from stagecoach_router.engine.health_probe import HealthProbe
from stagecoach_router.engine.replica import Owner, Replica, ReplicaSettings
from stagecoach_router.frontend.auth_interceptor import AuthInterceptor
from stagecoach_router.frontend.call_limits import CallLimits
from stagecoach_router.frontend.grpc_service import InferenceService, Serving
from stagecoach_router.pipelines.model_choice import NOT_HAD_S, UNUSABLE_S, ModelChoice
from stagecoach_router.pipelines.pipeline import PipelineContext
from stagecoach_router.pipelines.pipeline_manager import PipelineManager, PipelineSettings
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_files import ShardFiles
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.pipelines.watchdog import FaultLimits
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.settings import RouterSettings
from stagecoach_router.tenants.key_file import KeyFile
from stagecoach_router.tenants.tenants import Tenants
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.model_text import ModelText
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.tokenizer import Tokenizer

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
# Shards that refuse us at once are not asked again sooner. Those that do not answer are waited for by events.
RETRY_PAUSE_S = 0.2
# What waiting for shards does not cure.
FOR_GOOD = (ConfigError, TopologyError, ModelMismatch)
# Beside the requests that run or wait: status, tokenize, and those that are only to be refused.
SPARE_CALLS = 256

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Takes the port, opens a pipeline as soon as its shards are there, serves until `stop`."""
    await Router(settings, await _load_operators_files(settings)).run(stop)


@dataclass(frozen=True, slots=True)
class OperatorsFiles:
    """What is read at the start, and watched from then on.

    `keys`: who may call, where not everybody may. `identity`: who we are to shards; `edge_identity`: to callers.
    """

    keys: KeyFile | None
    identity: tls.Identity | None
    edge_identity: tls.Identity | None

    def watches(self) -> list[Coroutine[Any, Any, NoReturn]]:
        """What is to run as long as the router does."""
        watched = (self.keys, self.identity, self.edge_identity)
        return [each.watch() for each in watched if each is not None]


class Router:
    """A router with the parts that need no shard."""

    def __init__(self, settings: RouterSettings, files: OperatorsFiles) -> None:
        addresses = read_addresses(settings.shards, "shards")
        self._settings = settings
        self._files = files
        self._tenants = Tenants(None, time.monotonic()) if files.keys is None else files.keys.tenants
        self._journal = None if settings.journal is None else Journal(settings.journal)
        self._service = InferenceService()
        self._server, self._port = self._listen()
        self._health = Health(self._server, SERVICE_NAME)
        dial = tls.shard_dial(files.identity, settings.tls_shard_name)
        context = PipelineContext(
            lease_id=secrets.randbits(64),
            dial=dial,
            faults=FaultLimits(settings.fault_timeout_s, settings.step_timeout_s),
        )
        self._registry = ShardRegistry(
            addresses,
            dial,
            lease_id=context.lease_id,
            timeout_s=settings.fault_timeout_s,
            choice=ModelChoice(fetches_files=settings.model is None),
        )
        self._shard_files = ShardFiles(dial)
        self._text: ModelText | None = None  # of the model that is served, or is to be
        pipeline_settings = PipelineSettings(
            num_stages=settings.stages,
            num_replicas=settings.replicas,
            kv_blocks=settings.kv_blocks,
            lanes=settings.lanes,
            max_slots=settings.max_running + 1,  # the last one is the probe's
        )
        self._pipelines = PipelineManager(self._registry, pipeline_settings, context)

    def _listen(self) -> tuple[grpc.aio.Server, int]:
        """The public server, not started yet, and its port."""
        settings, service = self._settings, self._service
        limits = CallLimits(
            SPARE_CALLS,
            lambda: service.retry_after_s,
            num_places=lambda: max(service.num_places, settings.max_running + settings.max_waiting),
            max_stall_s=settings.max_stall_s,
        )
        server, port = listen(
            MAX_PUBLIC_MESSAGE_BYTES,
            settings.listen,
            public=True,
            identity=self._files.edge_identity,
            insecure=settings.insecure_listen,
            interceptors=[AuthInterceptor(self._tenants), limits],
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server, port

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop`, then drains. Raises what ends the router's work before."""
        await self._server.start()
        logger.info("listening on port %d", self._port)
        stopped = asyncio.create_task(stop.wait())
        working = [asyncio.create_task(each) for each in (self._work(), *self._files.watches())]
        try:
            await asyncio.wait([stopped, *working], return_when=asyncio.FIRST_COMPLETED)
            _raise_errors(working)
            await self._drain(working[0])
            _raise_errors(working[:1])
        finally:
            logger.info("stopping")
            await self._close([stopped, *working])

    async def _drain(self, working: asyncio.Task[None]) -> None:
        """Takes no new requests, and returns when those that run have ended, or their time or `working` has."""
        self._health.drain()
        self._service.draining = True
        if self._service.serving is None:
            return
        timeout_s, requests = self._settings.drain_timeout_s, self._service.serving.requests
        if num_left := requests.num_running + self._service.num_reading:
            logger.info("draining: %d requests have %g s to end; a second signal stops at once", num_left, timeout_s)

        async def all_ended() -> None:
            await self._service.all_read()  # what is read now may run yet
            await requests.all_ended()

        ended = asyncio.create_task(all_ended())
        try:
            await asyncio.wait([ended, working], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if num_left := requests.num_running + self._service.num_reading:
            logger.warning("%d requests have not ended in time", num_left)

    async def _close(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        self._health.set_ready(False)
        serving, self._service.serving = self._service.serving, None
        self._service.reason = "the router is stopping"
        await _cancel(tasks)
        if self._journal is not None:
            await self._journal.close()
        if serving is not None:
            serving.requests.close()
            await serving.engine.close()
            await serving.encoder.close()
        await stop_server(self._server, STOP_GRACE_S)

    async def _work(self) -> None:
        """Watches the shards and serves the model that they have. Only an error ends it."""
        if self._journal is not None:
            self._service.reason = "the journal is being opened"
            await self._journal.open()
            self._registry.choice.expect(self._journal.former_fingerprint)
        tasks = [asyncio.create_task(self._registry.run()), asyncio.create_task(self._serve_model())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            _raise_errors(tasks)
        finally:
            await _cancel(tasks)

    async def _serve_model(self) -> None:
        """Opens a pipeline as soon as its shards are there, and then serves."""
        settings = self._settings
        folder = settings.model
        if folder is not None:
            files = await read_at_start(lambda: ModelFiles.from_folder(folder), "model", folder)
            self._text = await ModelText.read(files)
        model, engine = await self._when_possible(self._open_engine)
        assert self._text is not None, "what the engine was made with"
        tokenizer = self._text.tokenizer
        encoder = PromptEncoder(tokenizer, self._text.chat_template, max_tokens=model.context_length)
        requests = RequestRegistry(engine, max_linger_s=settings.max_linger_s, log=self._journal)
        if self._journal is not None:
            try:
                await recover_requests(self._journal, requests, self._tenants, model, settings.max_linger_s)
            except BaseException:
                await engine.close()
                raise
        self._service.serving = Serving(model, tokenizer, encoder, engine, requests, self._pipelines)
        logger.info("%s ready: sequences of up to %d tokens", model.name, engine.capacity_tokens)
        await engine.run(self._pipelines)

    async def _when_possible(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Waits for shards that are not up yet, do not let us in, or whose blocks a former router still holds.

        Our own settings, and shards none of which fit together, are an error at once. Nothing else is: what one shard
        says or does is no reason to leave the others alone.
        """
        while True:
            try:
                return await attempt()
            except FOR_GOOD:
                raise
            except Exception as error:
                unforeseen = not isinstance(error, StagecoachError)
                reason = repr(error) if unforeseen else str(error)
                if self._service.reason != reason:
                    logger.info("waiting for shards: %s", reason, exc_info=unforeseen)
                self._service.reason = reason
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _open_engine(self) -> tuple[model_pb2.ModelDescription, Engine]:
        """The model that most shards have, and an engine with a pipeline of it."""
        shard = await self._pipelines.choose_model()
        text = await self._text_of(shard)
        model = model_pb2.ModelDescription()
        model.CopyFrom(shard.facts.model)
        model.name = self._settings.model_name or model.name
        engine = self._make_engine(text.tokenizer, model, shard.facts.block_size)
        await engine.open_replica()
        return model, engine

    async def _text_of(self, shard: ShardDescription) -> ModelText:
        """Made of our own files or, where there are none, of those of any shard of that model.

        Raises Unavailable where they do not come, or cannot be used: then the model is no choice for a while.
        """
        digest = shard.facts.files_digest
        if self._text is not None and (self._settings.model is not None or self._text.digest == digest):
            return self._text
        try:
            files = await self._shard_files.fetch(self._registry.of_model(shard))
        except Unavailable as error:
            self._registry.choice.reject_files(digest, error, NOT_HAD_S)
            raise
        try:
            self._text = await ModelText.read(ModelFiles(files), digest)
        except CheckpointError as error:
            refusal = Unavailable(f"{shard.address}: {error}", addresses=[shard.address])
            self._registry.choice.reject_files(digest, refusal, UNUSABLE_S)
            raise refusal from error
        return self._text

    def _make_engine(self, tokenizer: Tokenizer, model: model_pb2.ModelDescription, block_size: int) -> Engine:
        settings = self._settings
        replica_settings = ReplicaSettings(
            max_batch_tokens=settings.max_batch_tokens,
            recovery_timeout_s=settings.recovery_timeout_s,
            straggler_window_s=settings.fault_timeout_s / 2,
            lanes=settings.lanes,
        )

        def make_replica(owner: Owner) -> Replica:
            scheduler = Scheduler(
                BlockManager(1, block_size),  # the replica tells it how many when its pipeline is open
                max_batch_tokens=settings.max_batch_tokens,
                max_running=settings.max_running,
                max_waiting=settings.max_waiting,
                max_logit_rows=max(1, MAX_SHARD_MESSAGE_BYTES // 2 // (4 * model.vocab_size)),
                context_length=model.context_length,
            )
            probe = HealthProbe(settings.probe_interval_s, slot=settings.max_running, vocab_size=model.vocab_size)
            return Replica(scheduler, replica_settings, connect=self._pipelines.connector(), probe=probe, owner=owner)

        return Engine(
            tokenizer, vocab_size=model.vocab_size, make_replica=make_replica, on_ready=self._health.set_ready
        )


def _raise_errors(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises the error that has ended one of these, if one has ended: nothing else does."""
    for task in tasks:
        if task.done():
            task.result()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _load_operators_files(settings: RouterSettings) -> OperatorsFiles:
    """Raises ConfigError."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    identity = await tls.load_identity(cert, key, settings.tls_ca)
    edge_identity = None
    if cert is not None and key is not None and settings.edge_tls:
        # The same as to shards, but callers need no certificate unless there is a CA for theirs.
        edge_identity = await read_at_start(
            lambda: tls.Identity(cert, key, client_ca), "tls_cert", cert, key, client_ca
        )
    elif client_ca is not None:
        raise ConfigError("tls_client_ca: callers show no certificates without TLS", field="tls_client_ca")
    keys = None if settings.api_keys is None else await KeyFile.load(settings.api_keys)
    return OperatorsFiles(keys, identity, edge_identity)
