"""A router's life: takes the port, joins the shards into a pipeline, serves callers until told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from grpc_reflection.v1alpha import reflection

from stagecoach.errors import ConfigError, KVCacheFull, Unavailable
from stagecoach.process.listener import listen
from stagecoach.rpc.addresses import read_addresses
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES, MAX_SHARD_MESSAGE_BYTES, Dial
from stagecoach.rpc.health import Health
from stagecoach.security import tls
from stagecoach.v1 import inference_pb2, inference_pb2_grpc, model_pb2
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.recovery import recover_requests
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.engine.engine import Engine
from stagecoach_router.engine.health_probe import HealthProbe
from stagecoach_router.engine.replica import Owner, Replica, ReplicaSettings
from stagecoach_router.engine.step_loop import Counters
from stagecoach_router.frontend.auth_interceptor import AuthInterceptor
from stagecoach_router.frontend.call_limits import CallLimits
from stagecoach_router.frontend.grpc_service import InferenceService, Serving
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.pipelines.pipeline_manager import PipelineManager, PipelineSettings
from stagecoach_router.pipelines.shard_client import Stage, fetch_files
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.pipelines.watchdog import FaultLimits
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.settings import RouterSettings
from stagecoach_router.tenants.key_file import KeyFile
from stagecoach_router.tenants.tenants import Tenants
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import Tokenizer

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
CONNECT_RETRY_DELAY_S = 0.2
# Beside the requests that run or wait: status, tokenize, and those that are only to be refused.
SPARE_CALLS = 256
# gRPC's own limit, beyond those: health checks, strangers, and those that the door refuses.
UNCOUNTED_CALLS = 1024

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Takes the port, opens the pipeline as soon as its shards are there, serves until `stop`."""
    addresses = read_addresses(settings.shards, "shards")
    max_calls = settings.max_running + settings.max_waiting + SPARE_CALLS
    identity = tls.read_identity(settings.tls_cert, settings.tls_key, settings.tls_ca)
    keys = None if settings.api_keys is None else await asyncio.to_thread(KeyFile, settings.api_keys)
    callers = Tenants(None, time.monotonic()) if keys is None else keys.callers
    journal = None if settings.journal is None else Journal(settings.journal)
    service = InferenceService(max_stall_s=settings.max_stall_s)
    door = CallLimits(max_calls, lambda: service.retry_after_s)
    server, port = listen(
        MAX_PUBLIC_MESSAGE_BYTES,
        settings.listen,
        max_calls + UNCOUNTED_CALLS,
        identity=_edge_identity(settings),
        insecure=settings.insecure_listen,
        interceptors=[AuthInterceptor(callers), door],
    )
    dial = tls.shard_dial(identity, settings.tls_shard_name)
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health = Health(server, SERVICE_NAME)
    reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    logger.info("listening on port %d", port)
    stopped = asyncio.create_task(stop.wait())
    working = asyncio.create_task(_work(settings, addresses, service, health, dial, journal, callers))
    watching = [] if keys is None else [asyncio.create_task(keys.watch())]
    try:
        await asyncio.wait([stopped, working, *watching], return_when=asyncio.FIRST_COMPLETED)
        for task in (working, *watching):
            if task.done():
                task.result()  # only an error ends it
        await _drain(settings.drain_timeout_s, service, health, working)
        if working.done():
            working.result()
    finally:
        logger.info("stopping")
        health.set_ready(False)
        serving, service.serving, service.reason = service.serving, None, "the router is stopping"
        stopped.cancel()
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)
        if journal is not None:
            await journal.close()
        if serving is not None:
            serving.accepted.close()
            await serving.engine.close()
            await serving.encoder.close()
        await server.stop(STOP_GRACE_S)


async def _drain(timeout_s: float, service: InferenceService, health: Health, working: asyncio.Task[None]) -> None:
    """Takes no new requests, and returns when those that run have ended, or their time or the pipeline's work has."""
    health.drain()
    service.draining = True
    if service.serving is None:
        return
    accepted = service.serving.accepted
    if accepted.num_running:
        logger.info(
            "draining: %d requests have %g s to end; a second signal stops at once", accepted.num_running, timeout_s
        )
    ended = asyncio.create_task(accepted.all_ended())
    try:
        await asyncio.wait([ended, working], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
    if accepted.num_running:
        logger.warning("%d requests have not ended in time", accepted.num_running)


async def _work(
    settings: RouterSettings,
    addresses: list[str],
    service: InferenceService,
    health: Health,
    dial: Dial,
    journal: Journal | None,
    callers: Tenants,
) -> None:
    if journal is not None:
        await journal.open()
    pipeline_manager = make_pipeline_manager(settings, addresses, dial)
    tasks = [
        asyncio.create_task(pipeline_manager.registry.run()),
        asyncio.create_task(_serve_pipelines(settings, pipeline_manager, service, health, dial, journal, callers)),
    ]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()  # only an error ends it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_pipelines(
    settings: RouterSettings,
    pipeline_manager: PipelineManager,
    service: InferenceService,
    health: Health,
    dial: Dial,
    journal: Journal | None,
    callers: Tenants,
) -> None:
    shard = await _when_possible(pipeline_manager.first_shard, service)
    model = model_pb2.ModelDescription()
    model.CopyFrom(shard.description.model)
    if settings.model_name:
        model.name = settings.model_name
    files = await _when_possible(lambda: _model_files(settings, shard.address, dial), service)
    tokenizer = await asyncio.to_thread(Tokenizer, files)
    encoder = PromptEncoder(tokenizer, ChatTemplate.from_files(files, TemplateProcess()))
    engine = build_engine(settings, pipeline_manager, shard, tokenizer, health.set_ready)
    await _when_possible(engine.open_replica, service)
    accepted = RequestRegistry(engine, max_linger_s=settings.max_linger_s, log=journal)
    if journal is not None:
        try:
            await recover_requests(journal, accepted, callers, model, settings.max_linger_s)
        except BaseException:
            await engine.close()
            raise
    registry, totals = pipeline_manager.registry, pipeline_manager.totals
    service.serving = Serving(model, tokenizer, encoder, engine, accepted, registry, totals)
    logger.info("%s ready: sequences of up to %d tokens", model.name, engine.capacity_tokens)
    await engine.run(pipeline_manager.another)


async def _when_possible(attempt: Callable[[], Awaitable[Result]], service: InferenceService) -> Result:
    """Waits for shards that are not up yet, or whose blocks a former router still holds.

    Shards that do not fit together are an error at once.
    """
    while True:
        try:
            return await attempt()
        except (Unavailable, KVCacheFull) as error:
            if service.reason != str(error):
                logger.info("waiting for shards: %s", error)
            service.reason = str(error)
            await asyncio.sleep(CONNECT_RETRY_DELAY_S)


async def _model_files(settings: RouterSettings, address: str, dial: Dial) -> ModelFiles:
    if settings.model is not None:
        return await asyncio.to_thread(ModelFiles.from_folder, settings.model)
    return ModelFiles(await fetch_files(address, dial))


def make_pipeline_manager(settings: RouterSettings, addresses: list[str], dial: Dial) -> PipelineManager:
    """The shards, and what makes pipelines of them."""
    lease_id = secrets.randbits(64)
    faults = FaultLimits(settings.fault_timeout_s, settings.step_timeout_s)
    return PipelineManager(
        ShardRegistry(addresses, dial, lease_id=lease_id, timeout_s=settings.fault_timeout_s),
        PipelineSettings(
            num_stages=settings.stages,
            num_replicas=settings.replicas,
            kv_blocks=settings.kv_blocks,
            lanes=settings.lanes,
            max_slots=settings.max_running + 1,  # the last one is the probe's
            faults=faults,
        ),
        lease_id=lease_id,
        totals=PipelineTotals(),
        dial=dial,
    )


def build_engine(
    settings: RouterSettings,
    pipeline_manager: PipelineManager,
    shard: Stage,
    tokenizer: Tokenizer,
    on_ready: Callable[[bool], None],
) -> Engine:
    """The engine for the model that `shard` has a part of."""
    model = shard.description.model
    replica_settings = ReplicaSettings(
        vocab_size=model.vocab_size,
        max_batch_tokens=settings.max_batch_tokens,
        recovery_timeout_s=settings.recovery_timeout_s,
        straggler_window_s=settings.fault_timeout_s / 2,
        lanes=settings.lanes,
    )

    def make_replica(counters: Counters, owner: Owner) -> Replica:
        scheduler = Scheduler(
            BlockManager(1, shard.description.block_size),  # the replica tells it how many when its pipeline is open
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_logit_rows=max(1, MAX_SHARD_MESSAGE_BYTES // 2 // (4 * model.vocab_size)),
            context_length=model.context_length,
        )
        return Replica(
            scheduler,
            replica_settings,
            connect=pipeline_manager.connector(),
            probe=HealthProbe(settings.probe_interval_s, slot=settings.max_running, vocab_size=model.vocab_size),
            counters=counters,
            owner=owner,
        )

    return Engine(tokenizer, vocab_size=model.vocab_size, make_replica=make_replica, on_ready=on_ready)


def _edge_identity(settings: RouterSettings) -> tls.Identity | None:
    """Who we are to callers: the same as to shards, but they need no certificate unless there is a CA for theirs."""
    if settings.tls_cert is None or settings.tls_key is None or not settings.edge_tls:
        if settings.tls_client_ca is not None:
            raise ConfigError("tls_client_ca: callers show no certificates without TLS", field="tls_client_ca")
        return None
    return tls.Identity(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
