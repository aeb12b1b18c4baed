"""A router's session with this shard: the lease it opened, what it expects of us, and the way back to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.forward_link import ForwardLink
from stagecoach.framing import write_frame
from stagecoach.v1 import shard_pb2
from stagecoach_shard import wire
from stagecoach_shard.lease import Lease
from stagecoach_shard.stage import Stage

logger = logging.getLogger(__name__)


class LeaseSession:
    """A lease with its way out: frames for the router, and the link to the next stage where there is one."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.link: ForwardLink | None = None
        self.ended = False
        self.num_queued = 0  # micro-batches whose credit has not gone back
        # Frames with what to call when gRPC has taken them; None ends the session.
        self.outbox: asyncio.Queue[tuple[bytes, Callable[[], None] | None] | None] = asyncio.Queue()

    def fail(self, error: errors.StagecoachError, step: int = 0) -> None:
        """Tells the router; the lease runs nothing more."""
        if self.ended:
            return
        self.ended = True
        logger.warning("lease %x, epoch %d: %s", self.lease.lease_id, self.lease.epoch, error)
        fault = shard_pb2.Fault(epoch=self.lease.epoch, step=step, error=errors.to_detail(error))
        self.outbox.put_nowait((write_frame(shard_pb2.SessionResponse(fault=fault)), None))


def check_open(request: shard_pb2.OpenRequest, stage: Stage, fingerprint: str, block_size: int) -> None:
    """Raises ModelMismatch where the router expects another stage than this, InvalidArgument for a wrong next hop."""
    pairs = {
        "protocol_version": (request.protocol_version, PROTOCOL_VERSION),
        "model_fingerprint": (request.model_fingerprint, fingerprint),
        "layers": ((request.layers.start, request.layers.end), (stage.layers.start, stage.layers.end)),
        "dtype": (request.dtype, wire.DTYPES[stage.dtype]),
        "block_size": (request.block_size, block_size),
    }
    for field, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise errors.ModelMismatch(
                f"{field}: the router expects {theirs}, this shard has {ours}",
                field=field,
                limit=ours,
                value=theirs,
            )
    if bool(request.next_hop) == stage.is_last:
        raise errors.InvalidArgument(
            "next_hop must be given to every stage but the last", field="next_hop", value=request.next_hop
        )
