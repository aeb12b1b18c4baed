"""The stage that this process serves now, with the leases on it.

It belongs to the event loop. What computes is the runner, on a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass

from stagecoach import errors
from stagecoach.rpc.framing import FrameCounter
from stagecoach.topology import LayerRange
from stagecoach.v1 import shard_pb2
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.leases import wire
from stagecoach_shard.leases.block_ranges import BlockRanges
from stagecoach_shard.leases.lease import Lease
from stagecoach_shard.leases.session import LeaseSession, check_open
from stagecoach_shard.runtime.stage_runner import StageRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The limits of a micro-batch that this shard computes, whichever layers it has."""

    block_size: int  # positions in a K/V block
    max_batch_tokens: int  # in one micro-batch
    max_queued_steps: int  # micro-batches of one lease that may wait here, which is its credit


class ServedStage:
    """One range of layers that has been loaded, and the sessions that have a lease on it."""

    def __init__(self, checkpoint: Checkpoint, runner: StageRunner, limits: StepLimits) -> None:
        self.runner = runner
        self.limits = limits
        self.shard_id = secrets.token_hex(8)
        self.frames = FrameCounter()
        self._checkpoint = checkpoint
        self._blocks = BlockRanges(runner.cache.num_blocks)
        self._sessions: dict[int, LeaseSession] = {}
        self._lease_ended = asyncio.Event()

    @property
    def layers(self) -> LayerRange:
        """The layers that are computed here."""
        return self.runner.stage.layers

    @property
    def num_leases(self) -> int:
        """How many leases are open."""
        return len(self._sessions)

    def num_free_blocks(self, lease_id: int) -> int:
        """The most blocks that a lease can have now; if `lease_id` is open, that it can have when it is reopened."""
        session = self._sessions.get(lease_id)
        return self._blocks.num_free_without(None if session is None else session.lease.first_block)

    def open(self, request: shard_pb2.OpenRequest) -> LeaseSession:
        """A session with the lease that `request` asks for.

        Raises ModelMismatch where it expects another stage than this, StaleEpoch, KVCacheFull and InvalidArgument.
        """
        check_open(request, self.runner.stage, self._checkpoint.fingerprint, self.limits.block_size)
        former = self._sessions.get(request.lease_id)
        if former is not None:
            if request.epoch <= former.lease.epoch:
                raise errors.StaleEpoch(
                    f"epoch {request.epoch}: this lease is already in epoch {former.lease.epoch}",
                    field="epoch",
                    limit=former.lease.epoch,
                    value=request.epoch,
                )
            self.release(former)
        first_block = self._blocks.allocate(request.num_blocks)
        try:
            lease = Lease(
                request.lease_id,
                request.epoch,
                first_block=first_block,
                num_blocks=request.num_blocks,
                block_size=self.limits.block_size,
                max_slots=request.max_slots,
                context_length=self._checkpoint.config.context_length,
                max_batch_tokens=self.limits.max_batch_tokens,
            )
        except BaseException:  # there may be no memory for its tables
            self._blocks.free(first_block)
            raise
        session = LeaseSession(lease, request.silence_timeout_s)
        self._sessions[lease.lease_id] = session
        logger.info("lease %x opened: epoch %d, %d blocks", lease.lease_id, lease.epoch, lease.num_blocks)
        return session

    def release(self, session: LeaseSession) -> None:
        """Takes the lease's blocks back and ends its session. A second call does nothing."""
        session.ended = True
        if self._sessions.get(session.lease.lease_id) is session:
            del self._sessions[session.lease.lease_id]
            self._lease_ended.set()
            self._blocks.free(session.lease.first_block)
        session.outbox.put_nowait(None)

    def session_of(self, header: shard_pb2.MicroBatchHeader) -> LeaseSession:
        """The session that a micro-batch belongs to. Raises StaleEpoch where there is none in that epoch."""
        session = self._sessions.get(header.lease_id)
        if session is None:
            raise errors.StaleEpoch(
                f"lease {header.lease_id:x} is not open here", field="lease_id", value=f"{header.lease_id:x}"
            )
        if header.epoch != session.lease.epoch:  # a late one of an earlier epoch: no fault of the present one
            raise errors.StaleEpoch(
                f"epoch {header.epoch}: this lease is in epoch {session.lease.epoch}",
                field="epoch",
                limit=session.lease.epoch,
                value=header.epoch,
            )
        return session

    def load_report(self, session: LeaseSession, number: int) -> bytes:
        """The frame of a load report for the router of `session`, as of now."""
        return wire.write_load_report(*self.runner.meter.read(session.load), self.frames, number)

    async def leases_ended(self) -> None:
        """Returns when no lease is open."""
        while self._sessions:
            self._lease_ended.clear()
            await self._lease_ended.wait()

    def end_sessions(self) -> None:
        """Tells every router that this shard stops."""
        for session in list(self._sessions.values()):
            session.fail(errors.ShardStopping("the shard is stopping"))
