"""A router's life: takes the port, joins the shards into a pipeline, serves callers until told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from grpc_reflection.v1alpha import reflection

from stagecoach import lifecycle
from stagecoach.channel import MAX_PUBLIC_MESSAGE_BYTES, MAX_SHARD_MESSAGE_BYTES, check_address
from stagecoach.errors import ConfigError, KVCacheFull, Unavailable
from stagecoach.health import Health
from stagecoach.v1 import inference_pb2, inference_pb2_grpc
from stagecoach_router.discovery import Stage, check_same_pipeline, discover, fetch_files
from stagecoach_router.engine import Engine
from stagecoach_router.grpc_service import InferenceService, Serving
from stagecoach_router.kv_blocks import BlockManager
from stagecoach_router.model_files import ModelFiles
from stagecoach_router.pacing import Pacing
from stagecoach_router.pipeline import LostHandler, Pipeline, ResultHandler
from stagecoach_router.pipeline_totals import PipelineTotals
from stagecoach_router.scheduler import Scheduler
from stagecoach_router.settings import RouterSettings
from stagecoach_router.tokenizer import Tokenizer

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
CONNECT_RETRY_DELAY_S = 0.2
# Beside the requests that run or wait: status, tokenize, health, and those that are only to be refused.
SPARE_CALLS = 256

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Takes the port, opens the pipeline as soon as its shards are there, serves until `stop`."""
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
    max_calls = settings.max_running + settings.max_waiting + SPARE_CALLS
    server, port = lifecycle.listen(MAX_PUBLIC_MESSAGE_BYTES, settings.listen, max_calls)
    service = InferenceService()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health = Health(server, SERVICE_NAME)
    reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    logger.info("listening on port %d", port)
    stopped = asyncio.create_task(stop.wait())
    working = asyncio.create_task(_work(settings, addresses, service, health))
    try:
        await asyncio.wait([stopped, working], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()  # only an error ends it
    finally:
        logger.info("stopping")
        health.set_ready(False)
        serving, service.serving, service.reason = service.serving, None, "the router is stopping"
        stopped.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if serving is not None:
            await serving.engine.close()
        await server.stop(STOP_GRACE_S)


async def _work(settings: RouterSettings, addresses: list[str], service: InferenceService, health: Health) -> None:
    serving = await _join_when_possible(settings, addresses, service, health)
    pipeline = serving.engine.pipeline
    assert pipeline is not None, "joined"
    for stage in pipeline.stages:
        logger.info("layers %s at %s (%s)", stage.layers, stage.address, stage.description.device)
    blocks = serving.engine.scheduler.blocks
    logger.info("%s ready: %d K/V blocks of %d", serving.model.name, blocks.num_blocks, blocks.block_size)
    service.serving = serving
    await serving.engine.run()


async def _join_when_possible(
    settings: RouterSettings, addresses: list[str], service: InferenceService, health: Health
) -> Serving:
    """Waits for shards that are not up yet, or whose blocks a former router still holds.

    Shards that do not fit together are an error at once.
    """
    while True:
        try:
            return await _join(settings, addresses, health)
        except (Unavailable, KVCacheFull) as error:
            if service.reason != str(error):
                logger.info("waiting for shards: %s", error)
            service.reason = str(error)
            await asyncio.sleep(CONNECT_RETRY_DELAY_S)


async def _join(settings: RouterSettings, addresses: list[str], health: Health) -> Serving:
    stages = await discover(addresses)
    model = stages[0].description.model
    if settings.model_name:
        model.name = settings.model_name
    if settings.model is not None:
        files = await asyncio.to_thread(ModelFiles.from_folder, settings.model)
    else:
        files = ModelFiles(await fetch_files(stages[0].address))
    tokenizer = await asyncio.to_thread(Tokenizer, files)
    engine = build_engine(settings, addresses, stages[0], tokenizer, health.set_ready)
    await engine.open()
    return Serving(model, tokenizer, engine)


def build_engine(
    settings: RouterSettings, addresses: list[str], first: Stage, tokenizer: Tokenizer, on_ready: Callable[[bool], None]
) -> Engine:
    """The engine for the pipeline of which `first` is a stage."""
    model = first.description.model
    lease_id = secrets.randbits(64)
    totals = PipelineTotals()

    async def connect(epoch: int, on_result: ResultHandler, on_lost: LostHandler) -> Pipeline:
        stages = await discover(addresses)
        check_same_pipeline(first, stages[0])
        pipeline = Pipeline(stages, lease_id=lease_id, epoch=epoch, on_result=on_result, on_lost=on_lost, totals=totals)
        await pipeline.open(num_blocks=num_blocks_to_lease(settings.kv_blocks, stages), max_slots=settings.max_running)
        return pipeline

    return Engine(
        Scheduler(
            BlockManager(1, first.description.block_size),  # the engine tells it how many when the pipeline is open
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_logit_rows=max(1, MAX_SHARD_MESSAGE_BYTES // 2 // (4 * model.vocab_size)),
            pacing=Pacing(len(addresses), settings.lanes),
            context_length=model.context_length,
        ),
        tokenizer,
        vocab_size=model.vocab_size,
        connect=connect,
        on_ready=on_ready,
        max_batch_tokens=settings.max_batch_tokens,
        recovery_timeout_s=settings.recovery_timeout_s,
    )


def num_blocks_to_lease(wanted: int, stages: list[Stage]) -> int:
    """What is free on every stage, or `wanted` of it. Raises KVCacheFull, ConfigError for more than there ever are."""
    free_blocks = min(stage.description.num_free_blocks for stage in stages)
    all_blocks = min(stage.description.num_blocks for stage in stages)
    if wanted > all_blocks:
        raise ConfigError(
            f"kv_blocks: {wanted} wanted, a stage has {all_blocks}", field="kv_blocks", limit=all_blocks, value=wanted
        )
    if free_blocks < max(wanted, 1):
        raise KVCacheFull(needed_blocks=max(wanted, 1), free_blocks=free_blocks)
    return wanted or free_blocks
