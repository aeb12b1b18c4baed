"""A shard server's life: takes the port, loads its layers or waits for some, serves them until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from typing import NoReturn

import torch

from stagecoach.errors import InternalError
from stagecoach.process.listener import listen, stop_server
from stagecoach.process.settings import parse_size
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES, Dial
from stagecoach.rpc.health import Health
from stagecoach.rpc.message_limits import max_tokens_per_message
from stagecoach.rpc.shard_rpc import SERVICE_NAME, shard_handlers
from stagecoach.security import tls
from stagecoach.topology import LayerRange
from stagecoach_shard.leases.assignment import STOP_COMPUTING_TIMEOUT_S, Assignment
from stagecoach_shard.leases.served_stage import ServedStage, StepLimits
from stagecoach_shard.leases.wire import DTYPES
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.rpc.access import AccessControl, AllowedNames
from stagecoach_shard.rpc.service import ShardService
from stagecoach_shard.runtime.stage_loader import Loader, check_threads, find_device
from stagecoach_shard.settings import ShardSettings

STOP_GRACE_S = 1.0
# Loading ends at the next tensor; where that takes longer, it is not waited for.
ABANDON_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


async def serve(settings: ShardSettings, stop: asyncio.Event) -> None:
    """Takes the port, loads its layers if it has a range of its own, and serves until `stop` is set."""
    layers = settings.layer_range()
    identity = await tls.load_identity(settings.tls_cert, settings.tls_key, settings.tls_ca)
    allowed = None if identity is None else AllowedNames.read(settings.allow_peer, settings.allow_assign)
    server, port = listen(
        MAX_SHARD_MESSAGE_BYTES, settings.listen, identity=identity, insecure=settings.insecure_listen
    )
    dial = tls.shard_dial(identity, settings.tls_shard_name)
    access = AccessControl(allowed)
    handlers = shard_handlers(
        describe=access.describe,
        assign=access.assign,
        fetch_files=access.fetch_files,
        session=access.session,
        forward=access.forward,
    )
    server.add_generic_rpc_handlers((handlers,))
    health = Health(server, SERVICE_NAME)
    await server.start()
    abandoned = threading.Event()
    opening = asyncio.create_task(asyncio.to_thread(_open_loader, settings, abandoned))
    stopped = asyncio.create_task(stop.wait())
    watching = None if identity is None else asyncio.create_task(identity.watch())
    assignment: Assignment | None = None
    try:
        await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            assignment, access.service = _service(opening.result(), settings, dial, health)
            await _live(assignment, layers, port, health, settings.drain_timeout_s, stopped)
    finally:
        logger.info("stopping")
        health.drain()
        stopped.cancel()
        if watching is not None:
            watching.cancel()
        abandoned.set()
        await _end_loading(opening, assignment)
        if assignment is not None:
            assignment.end_sessions()
        await stop_server(server, STOP_GRACE_S)
    if assignment is not None and not await assignment.stop_computing():
        logger.error("a step has not ended in %g s", STOP_COMPUTING_TIMEOUT_S)
        _exit_at_once(1)  # a thread that hangs in a kernel cannot be ended


def _open_loader(settings: ShardSettings, abandoned: threading.Event) -> Loader:
    """Opens the checkpoint, which takes a while on a slow disk, and finds what cannot work with any layers.

    Raises CheckpointError, ConfigError, and InvalidArgument for a size that is none.
    """
    if settings.kv_cache_memory is not None:
        parse_size(settings.kv_cache_memory, "kv-cache-memory")
    device = find_device(settings.device)
    check_threads(settings.threads, device)
    loader = Loader(
        device=device,
        dtype=getattr(torch, settings.dtype),
        checkpoint=open_checkpoint(settings.model),
        kernels=settings.kernels,
        num_threads=settings.threads,
        block_size=settings.block_size,
        kv_cache_memory=settings.kv_cache_memory,
        kv_cache_fraction=settings.kv_cache_fraction,
        abandoned=abandoned,
    )
    if settings.layer_range() is None:  # now, as a router that assigns layers waits for them
        loader.check_kernels()
    return loader


def _service(loader: Loader, settings: ShardSettings, dial: Dial, health: Health) -> tuple[Assignment, ShardService]:
    fit = max_tokens_per_message(loader.checkpoint.config.hidden_size, DTYPES[loader.dtype])
    if settings.max_batch_tokens > fit:
        text = "max-batch-tokens: %d; %d are taken at most, whose hidden states fit a message of %d MiB"
        logger.warning(text, settings.max_batch_tokens, fit, MAX_SHARD_MESSAGE_BYTES >> 20)
    limits = StepLimits(settings.block_size, min(settings.max_batch_tokens, fit), settings.max_queued_steps)
    assignment = Assignment(
        loader.load,
        lambda runner: ServedStage(loader.checkpoint, runner, limits),
        assignable=settings.layer_range() is None,
        on_ready=health.set_ready,
    )
    service = ShardService(
        loader.checkpoint,
        assignment,
        device=loader.device,
        dtype=loader.dtype,
        limits=limits,
        process_id=secrets.token_hex(8),
        dial=dial,
    )
    return assignment, service


async def _live(
    assignment: Assignment,
    layers: LayerRange | None,
    port: int,
    health: Health,
    drain_timeout_s: float,
    stopped: asyncio.Task[bool],
) -> None:
    """Loads `layers`, if any, then serves until `stopped` is done or the compute thread has ended.

    Raises what loading raises, and InternalError where the compute thread ended by itself.
    """
    if layers is None:
        health.set_ready(True)
        logger.info("no layers yet; ready on port %d for those that a router assigns", port)
    else:
        loading = assignment.begin(layers)
        await asyncio.wait([loading, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return
        loading.result()
        logger.info("layers %s ready on port %d", layers, port)
    ended = asyncio.create_task(assignment.computing_ended())
    try:
        await asyncio.wait([stopped, ended], return_when=asyncio.FIRST_COMPLETED)
        health.drain()
        if not ended.done():
            await _drain(drain_timeout_s, assignment, ended)
        if ended.done() and not assignment.is_stuck:
            raise InternalError("the compute thread has ended")
    finally:
        ended.cancel()


async def _drain(timeout_s: float, assignment: Assignment, compute_ended: asyncio.Task[None]) -> None:
    """Opens no new lease. Returns when the open ones have ended, after `timeout_s`, or when the compute thread has."""
    if num_leases := assignment.drain():
        logger.info("draining: %d leases have %g s to end; a second signal stops at once", num_leases, timeout_s)
    drained = asyncio.create_task(assignment.leases_ended())
    try:
        await asyncio.wait([drained, compute_ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        drained.cancel()


async def _end_loading(opening: asyncio.Task[Loader], assignment: Assignment | None) -> None:
    """Waits for a load that was abandoned, but not for long: what it has read so far is lost with the process."""
    try:
        async with asyncio.timeout(ABANDON_TIMEOUT_S):
            await asyncio.wait([opening])
            if assignment is not None:
                await assignment.loaded()
    except TimeoutError:
        logger.info("stopped while loading")
        _exit_at_once(0)  # a thread that reads a tensor cannot be interrupted


def _exit_at_once(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)
