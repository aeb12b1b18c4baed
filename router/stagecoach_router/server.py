"""A router's life: takes the port, joins the shards into a pipeline, serves callers until told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from grpc_reflection.v1alpha import reflection

from stagecoach import lifecycle, tls
from stagecoach.channel import MAX_PUBLIC_MESSAGE_BYTES, MAX_SHARD_MESSAGE_BYTES, Dial, check_address
from stagecoach.errors import ConfigError, KVCacheFull, StagecoachError, Unavailable
from stagecoach.health import Health
from stagecoach.v1 import inference_pb2, inference_pb2_grpc
from stagecoach_router.authentication import KeyRequired
from stagecoach_router.callers import Callers
from stagecoach_router.canary import Canary
from stagecoach_router.discovery import Stage, check_same_pipeline, discover, fetch_files
from stagecoach_router.door import Door
from stagecoach_router.engine import Engine
from stagecoach_router.grpc_service import InferenceService, Serving
from stagecoach_router.idempotency import AcceptedRequests
from stagecoach_router.journal import Journal
from stagecoach_router.key_file import KeyFile
from stagecoach_router.kv_blocks import BlockManager
from stagecoach_router.model_files import ModelFiles
from stagecoach_router.pacing import Pacing
from stagecoach_router.pipeline import LostHandler, Pipeline, ResultHandler
from stagecoach_router.pipeline_totals import PipelineTotals
from stagecoach_router.scheduler import Scheduler
from stagecoach_router.settings import RouterSettings
from stagecoach_router.slowness import Slowness
from stagecoach_router.tokenizer import Tokenizer
from stagecoach_router.watchdog import FaultLimits

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
CONNECT_RETRY_DELAY_S = 0.2
# Beside the requests that run or wait: status, tokenize, and those that are only to be refused.
SPARE_CALLS = 256
# gRPC's own limit, beyond those: health checks, strangers, and those that the door refuses.
UNCOUNTED_CALLS = 1024

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Takes the port, opens the pipeline as soon as its shards are there, serves until `stop`."""
    addresses = _shard_addresses(settings)
    max_calls = settings.max_running + settings.max_waiting + SPARE_CALLS
    identity = tls.read_identity(settings.tls_cert, settings.tls_key, settings.tls_ca)
    keys = None if settings.api_keys is None else await asyncio.to_thread(KeyFile, settings.api_keys)
    callers = Callers(None, time.monotonic()) if keys is None else keys.callers
    journal = None if settings.journal is None else Journal(settings.journal)
    service = InferenceService(callers, max_stall_s=settings.max_stall_s)
    door = Door(max_calls, lambda: service.retry_after_s)
    server, port = lifecycle.listen(
        MAX_PUBLIC_MESSAGE_BYTES,
        settings.listen,
        max_calls + UNCOUNTED_CALLS,
        identity=_edge_identity(settings),
        insecure=settings.insecure_listen,
        interceptors=[door] if keys is None else [KeyRequired(callers), door],
    )
    dial = tls.shard_dial(identity, settings.tls_shard_name)
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health = Health(server, SERVICE_NAME)
    reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    logger.info("listening on port %d", port)
    stopped = asyncio.create_task(stop.wait())
    working = asyncio.create_task(_work(settings, addresses, service, health, dial, journal))
    watching = [] if keys is None else [asyncio.create_task(keys.watch())]
    try:
        await asyncio.wait([stopped, working, *watching], return_when=asyncio.FIRST_COMPLETED)
        for task in (working, *watching):
            if task.done():
                task.result()  # only an error ends it
        await _drain(settings.drain_timeout_s, service, health, working)
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
        await server.stop(STOP_GRACE_S)


def _shard_addresses(settings: RouterSettings) -> list[str]:
    addresses = [check_address(part.strip(), "shards") for part in settings.shards.split(",")]
    if len(set(addresses)) != len(addresses):
        raise ConfigError("shards: an address is named twice", field="shards", value=settings.shards)
    if 0 < settings.lanes < len(addresses):
        raise ConfigError(
            f"lanes: {settings.lanes} would leave some of {len(addresses)} stages idle",
            field="lanes",
            limit=len(addresses),
            value=settings.lanes,
        )
    return addresses


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
) -> None:
    if journal is not None:
        await journal.open()
    serving = await _join_when_possible(settings, addresses, service, health, dial, journal)
    pipeline = serving.engine.pipeline
    assert pipeline is not None, "joined"
    for stage in pipeline.stages:
        logger.info("layers %s at %s (%s)", stage.layers, stage.address, stage.description.device)
    blocks = serving.engine.scheduler.blocks
    logger.info("%s ready: %d K/V blocks of %d", serving.model.name, blocks.num_blocks, blocks.block_size)
    if journal is not None:
        await _take_over(journal, serving, settings.max_linger_s)
    service.serving = serving
    await serving.engine.run()


async def _take_over(journal: Journal, serving: Serving, linger_s: float) -> None:
    """Goes on with what a former router left, for as long as its callers may take to come back."""
    try:
        left = await journal.load(serving.model.fingerprint)
    except BaseException:
        await serving.engine.close()
        raise
    for entry in left:
        await asyncio.sleep(0)  # long answers are spelt out anew, and shards wait for a word meanwhile
        try:
            accepted = serving.accepted.accept(entry.key, entry.digest, entry.request, entry.past)
        except StagecoachError as error:
            logger.warning("request %s of the journal cannot go on: %s", entry.request.request_id, error)
            journal.forget(entry.key)
        else:
            serving.accepted.linger(accepted, linger_s)
    if left:
        logger.info("%d requests of the journal, %d of them go on", len(left), serving.accepted.num_running)


async def _join_when_possible(
    settings: RouterSettings,
    addresses: list[str],
    service: InferenceService,
    health: Health,
    dial: Dial,
    journal: Journal | None,
) -> Serving:
    """Waits for shards that are not up yet, or whose blocks a former router still holds.

    Shards that do not fit together are an error at once.
    """
    while True:
        try:
            return await _join(settings, addresses, health, dial, journal)
        except (Unavailable, KVCacheFull) as error:
            if service.reason != str(error):
                logger.info("waiting for shards: %s", error)
            service.reason = str(error)
            await asyncio.sleep(CONNECT_RETRY_DELAY_S)


async def _join(
    settings: RouterSettings, addresses: list[str], health: Health, dial: Dial, journal: Journal | None
) -> Serving:
    stages = await discover(addresses, dial)
    model = stages[0].description.model
    if settings.model_name:
        model.name = settings.model_name
    if settings.model is not None:
        files = await asyncio.to_thread(ModelFiles.from_folder, settings.model)
    else:
        files = ModelFiles(await fetch_files(stages[0].address, dial))
    tokenizer = await asyncio.to_thread(Tokenizer, files)
    engine = build_engine(settings, addresses, stages[0], tokenizer, health.set_ready, dial)
    await engine.open()
    return Serving(model, tokenizer, engine, AcceptedRequests(engine, max_linger_s=settings.max_linger_s, log=journal))


def build_engine(
    settings: RouterSettings,
    addresses: list[str],
    first: Stage,
    tokenizer: Tokenizer,
    on_ready: Callable[[bool], None],
    dial: Dial,
) -> Engine:
    """The engine for the pipeline of which `first` is a stage."""
    model = first.description.model
    lease_id = secrets.randbits(64)
    totals = PipelineTotals()

    async def connect(epoch: int, on_result: ResultHandler, on_lost: LostHandler) -> Pipeline:
        stages = await discover(addresses, dial, lease_id=lease_id)
        check_same_pipeline(first, stages[0])
        pipeline = Pipeline(
            stages,
            lease_id=lease_id,
            epoch=epoch,
            on_result=on_result,
            on_lost=on_lost,
            totals=totals,
            dial=dial,
            faults=FaultLimits(settings.fault_timeout_s, settings.step_timeout_s),
        )
        num_blocks = num_blocks_to_lease(settings.kv_blocks, stages)
        await pipeline.open(num_blocks=num_blocks, max_slots=settings.max_running + 1)  # the last one is the canary's
        return pipeline

    pacing = Pacing(len(addresses), settings.lanes)
    return Engine(
        Scheduler(
            BlockManager(1, first.description.block_size),  # the engine tells it how many when the pipeline is open
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_logit_rows=max(1, MAX_SHARD_MESSAGE_BYTES // 2 // (4 * model.vocab_size)),
            pacing=pacing,
            context_length=model.context_length,
        ),
        tokenizer,
        vocab_size=model.vocab_size,
        connect=connect,
        on_ready=on_ready,
        canary=Canary(settings.canary_interval_s, slot=settings.max_running, vocab_size=model.vocab_size),
        slowness=Slowness(pacing, settings.fault_timeout_s / 2),
        max_batch_tokens=settings.max_batch_tokens,
        recovery_timeout_s=settings.recovery_timeout_s,
    )


def _edge_identity(settings: RouterSettings) -> tls.Identity | None:
    """Who we are to callers: the same as to shards, but they need no certificate unless there is a CA for theirs."""
    if settings.tls_cert is None or settings.tls_key is None or not settings.edge_tls:
        if settings.tls_client_ca is not None:
            raise ConfigError("tls_client_ca: callers show no certificates without TLS", field="tls_client_ca")
        return None
    return tls.Identity(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def num_blocks_to_lease(wanted: int, stages: list[Stage]) -> int:
    """What is free on every stage, or `wanted` of it and one for the canary.

    Raises KVCacheFull, ConfigError for more than there ever are.
    """
    needed = max(wanted, 1) + 1
    free_blocks = min(stage.description.num_free_blocks for stage in stages)
    all_blocks = min(stage.description.num_blocks for stage in stages)
    if needed > all_blocks:
        text = f"kv_blocks: {needed - 1} wanted and one for the canary, a stage has {all_blocks}"
        raise ConfigError(text, field="kv_blocks", limit=all_blocks - 1, value=wanted)
    if free_blocks < needed:
        raise KVCacheFull(needed_blocks=needed, free_blocks=free_blocks)
    return needed if wanted else free_blocks
