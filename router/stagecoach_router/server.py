"""A router's life: takes the port, joins the shards into a pipeline, serves callers until told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from stagecoach import lifecycle
from stagecoach.channel import MAX_PUBLIC_MESSAGE_BYTES, check_address
from stagecoach.errors import ConfigError, KVCacheFull, Unavailable
from stagecoach.v1 import inference_pb2, inference_pb2_grpc, model_pb2
from stagecoach_router.engine import Connect, Engine
from stagecoach_router.grpc_service import InferenceService, Serving
from stagecoach_router.kv_blocks import BlockManager
from stagecoach_router.model_files import ModelFiles
from stagecoach_router.pipeline import LostHandler, Pipeline, ResultHandler, Stage, discover, fetch_files
from stagecoach_router.scheduler import Scheduler
from stagecoach_router.settings import RouterSettings
from stagecoach_router.tokenizer import Tokenizer

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 2.0
CONNECT_RETRY_DELAY_S = 0.2

logger = logging.getLogger(__name__)


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Takes the port, opens the pipeline as soon as its shards are there, serves until `stop`."""
    addresses = [check_address(part.strip(), "shards") for part in settings.shards.split(",")]
    if len(set(addresses)) != len(addresses):
        raise ConfigError("shards: an address is named twice", field="shards", value=settings.shards)
    server, port = lifecycle.listen(MAX_PUBLIC_MESSAGE_BYTES, settings.listen)
    service = InferenceService()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
    await health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
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
        if service.serving is not None:
            await service.serving.engine.close()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await server.stop(STOP_GRACE_S)


async def _work(
    settings: RouterSettings, addresses: list[str], service: InferenceService, health: HealthServicer
) -> None:
    stages = await _wait_for_shards(addresses, service)
    model = stages[0].description.model
    if settings.model_name:
        model.name = settings.model_name
    if settings.model is not None:
        files = await asyncio.to_thread(ModelFiles.from_folder, settings.model)
    else:
        files = ModelFiles(await fetch_files(stages[0].address))
    tokenizer = await asyncio.to_thread(Tokenizer, files)
    engine = build_engine(settings, addresses, stages, model, tokenizer)
    await engine.open()
    service.serving = Serving(model, tokenizer, engine)
    await health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    for stage in stages:
        logger.info("layers %s at %s (%s)", stage.layers, stage.address, stage.description.device)
    logger.info(
        "%s ready: %d K/V blocks of %d",
        model.name,
        engine.scheduler.blocks.num_blocks,
        engine.scheduler.blocks.block_size,
    )
    await engine.run()


async def _wait_for_shards(addresses: list[str], service: InferenceService) -> list[Stage]:
    """The stages, as soon as every shard answers. Shards that do not fit together are an error at once."""
    while True:
        try:
            return await discover(addresses)
        except Unavailable as error:
            if service.reason != str(error):
                logger.info("waiting for shards: %s", error)
            service.reason = str(error)
            await asyncio.sleep(CONNECT_RETRY_DELAY_S)


def build_engine(
    settings: RouterSettings,
    addresses: list[str],
    stages: list[Stage],
    model: model_pb2.ModelDescription,
    tokenizer: Tokenizer,
) -> Engine:
    """The engine for these stages; its capacity is the smallest stage's.

    Raises KVCacheFull where the shards have fewer blocks than asked for.
    """
    free_blocks = min(stage.description.num_free_blocks for stage in stages)
    num_blocks = settings.kv_blocks or free_blocks
    if not 1 <= num_blocks <= free_blocks:
        raise KVCacheFull(needed_blocks=max(num_blocks, 1), free_blocks=free_blocks)
    lease_id = secrets.randbits(64)
    fingerprint = model.fingerprint

    async def connect(epoch: int, on_result: ResultHandler, on_lost: LostHandler) -> Pipeline:
        found = await discover(addresses)
        if found[0].description.model.fingerprint != fingerprint:
            raise Unavailable("the shards came back with another model")
        pipeline = Pipeline(found, lease_id=lease_id, epoch=epoch, on_result=on_result, on_lost=on_lost)
        await pipeline.open(num_blocks=num_blocks, max_slots=settings.max_running)
        return pipeline

    typed_connect: Connect = connect
    return Engine(
        Scheduler(
            BlockManager(num_blocks, stages[0].description.block_size),
            max_batch_tokens=min(settings.max_batch_tokens, *(stage.description.max_batch_tokens for stage in stages)),
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            num_lanes=settings.lanes or len(stages),
            context_length=model.context_length,
        ),
        tokenizer,
        vocab_size=model.vocab_size,
        connect=typed_connect,
        recovery_timeout_s=settings.recovery_timeout_s,
    )
