"""A shard server's life: takes the port, loads its layers, serves them until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import torch
from tqdm import tqdm

from stagecoach import lifecycle, tls
from stagecoach.channel import MAX_SHARD_MESSAGE_BYTES, Dial
from stagecoach.errors import ConfigError, InternalError
from stagecoach.health import Health
from stagecoach.shard_rpc import SERVICE_NAME, shard_handlers
from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoint import Checkpoint
from stagecoach_shard.gate import LoadingGate
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.memory import free_bytes, num_kv_blocks
from stagecoach_shard.service import ShardService
from stagecoach_shard.settings import ShardSettings
from stagecoach_shard.stage import Stage
from stagecoach_shard.stage_runner import StageRunner

STOP_GRACE_S = 1.0
ALIVE_CHECK_INTERVAL_S = 1.0
STOP_COMPUTING_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


async def serve(settings: ShardSettings, stop: asyncio.Event) -> None:
    """Takes the port, loads, serves until `stop`."""
    layers = LayerRange.parse(settings.layers)
    identity = tls.read_identity(settings.tls_cert, settings.tls_key, settings.tls_ca)
    allowed = None if identity is None else tls.read_names(settings.allow_peer, "allow_peer")
    server, port = lifecycle.listen(
        MAX_SHARD_MESSAGE_BYTES, settings.listen, identity=identity, insecure=settings.insecure_listen
    )
    dial = tls.shard_dial(identity, settings.tls_shard_name)
    gate = LoadingGate(allowed)
    handlers = shard_handlers(
        describe=gate.describe, fetch_files=gate.fetch_files, session=gate.session, forward=gate.forward
    )
    server.add_generic_rpc_handlers((handlers,))
    health = Health(server, SERVICE_NAME)
    await server.start()
    loading = asyncio.create_task(asyncio.to_thread(load, settings, layers, dial))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([loading, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            logger.info("stopped while loading")
            logging.shutdown()
            os._exit(0)  # the loading thread cannot be interrupted, and there is nothing to clean up
        gate.service, runner = loading.result()
        health.set_ready(True)
        logger.info("layers %s ready on port %d", layers, port)
        ended = asyncio.create_task(_end_of(runner))
        await asyncio.wait([stopped, ended], return_when=asyncio.FIRST_COMPLETED)
        health.drain()
        if not ended.done():
            await _drain(settings.drain_timeout_s, gate.service, ended)
        if ended.done():
            raise InternalError("the compute thread has ended")
        ended.cancel()
    finally:
        logger.info("stopping")
        health.set_ready(False)
        if gate.service is not None:
            gate.service.end_sessions()
        stopped.cancel()
        await server.stop(STOP_GRACE_S)
    try:
        async with asyncio.timeout(STOP_COMPUTING_TIMEOUT_S):
            await asyncio.to_thread(runner.stop)
    except TimeoutError:
        logger.error("a step has not ended in %g s", STOP_COMPUTING_TIMEOUT_S)
        logging.shutdown()
        os._exit(1)  # a thread that hangs in a kernel cannot be ended


async def _drain(timeout_s: float, service: ShardService, compute_ended: asyncio.Task[None]) -> None:
    """Opens no new leases, and returns when those that are open have ended, or their time or the computing has."""
    if num_leases := service.drain():
        logger.info("draining: %d leases have %g s to end; a second signal stops at once", num_leases, timeout_s)
    drained = asyncio.create_task(service.leases_ended())
    try:
        await asyncio.wait([drained, compute_ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        drained.cancel()


async def _end_of(runner: StageRunner) -> None:
    """Returns when the compute thread has ended, which only a bug makes it do."""
    while runner.alive:  # noqa: ASYNC110  # a thread has no event to wait for
        await asyncio.sleep(ALIVE_CHECK_INTERVAL_S)


def load(settings: ShardSettings, layers: LayerRange, dial: Dial) -> tuple[ShardService, StageRunner]:
    """Everything between the settings and a service that is ready; the compute thread runs."""
    device = _device(settings.device)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    checkpoint = Checkpoint.open(Path(settings.model))
    with tqdm(desc=f"layers {layers}", unit="tensor", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        stage = Stage.load(checkpoint, layers, dtype=dtype, device=device, progress=progress, kernels=settings.kernels)
    bytes_per_block = KVCache.bytes_per_block(checkpoint.config, layers, block_size=settings.block_size, dtype=dtype)
    num_blocks = num_kv_blocks(
        settings.kv_cache_memory, settings.kv_cache_fraction, bytes_per_block=bytes_per_block, free=free_bytes(device)
    )
    cache = KVCache.allocate(
        checkpoint.config, layers, num_blocks=num_blocks, block_size=settings.block_size, dtype=dtype, device=device
    )
    logger.info(
        "%s layers %s on %s (%s kernels): weights %.0f MiB, K/V %.0f MiB in %d blocks of %d",
        checkpoint.name,
        layers,
        device,
        "native" if stage.is_native else "torch",
        stage.weights_bytes / 2**20,
        num_blocks * bytes_per_block / 2**20,
        num_blocks,
        settings.block_size,
    )
    runner = StageRunner(stage, cache, block_size=settings.block_size, num_threads=settings.threads)
    runner.start()
    service = ShardService(
        checkpoint,
        runner,
        block_size=settings.block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * bytes_per_block,
        max_batch_tokens=settings.max_batch_tokens,
        max_queued_steps=settings.max_queued_steps,
        dial=dial,
    )
    return service, runner


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"device: {name}: this machine has {count} CUDA devices", field="device", limit=count, value=name
        )
    return device
