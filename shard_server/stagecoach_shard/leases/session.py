"""A router's session with this shard: its lease, the queue of what goes back to it, and how long it may be silent."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.errors.status import to_status
from stagecoach.rpc.addresses import check_address
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.rpc.framing import write_frame
from stagecoach.rpc.watch_clock import LOOKS_PER_TIMEOUT, Silence
from stagecoach.v1 import shard_pb2
from stagecoach_shard.leases import wire
from stagecoach_shard.leases.lease import Lease
from stagecoach_shard.runtime.load_meter import Load
from stagecoach_shard.runtime.stage import Stage

logger = logging.getLogger(__name__)

# What a router may ask for, in seconds.
MIN_SILENCE_TIMEOUT_S = 0.1
MAX_SILENCE_TIMEOUT_S = 86_400.0
# A router may say nothing for at least this long before its first question, as its other stages, and the link into the
# first one, may take as long to open. The timeout that it asks for says nothing of that.
MIN_OPENING_SILENCE_S = 20.0


@dataclass(slots=True)
class LoadReportDue:
    """A load report that is queued. It is made when its turn comes, so that it is of then.

    `number`: of the latest question that it answers; 0 where none was asked.
    """

    number: int = 0


class LeaseSession:
    """A lease with the ways out of this shard: frames for the router, and the link to the next stage if there is one.

    `silence_timeout_s`: for how long the router may say nothing after it has first asked for a load report, as it does
    regularly once its pipeline is open. 0: for ever.
    """

    def __init__(self, lease: Lease, silence_timeout_s: float = 0.0) -> None:
        self.lease = lease
        self.load = Load()
        self.link: ForwardLink | None = None
        self.ended = False
        self.num_queued = 0  # micro-batches whose credit has not gone back
        # What goes back to the router: frames, each with what to call when gRPC has taken it, and load reports.
        # None ends the session.
        self.outbox: asyncio.Queue[tuple[bytes, Callable[[], None] | None] | LoadReportDue | None] = asyncio.Queue()
        self._report_due: LoadReportDue | None = None
        self._silence_timeout_s = silence_timeout_s
        # At first that of a router which has yet to ask.
        self._silence = Silence(max(silence_timeout_s, MIN_OPENING_SILENCE_S))
        self._has_asked = False

    def ask_for_report(self, number: int = 0) -> None:
        """Queues a load report that answers question `number` and all before it.

        At most one is queued, so that a router which asks and does not read fills no memory.
        """
        if self._report_due is None:
            self._report_due = LoadReportDue()
            self.outbox.put_nowait(self._report_due)
        self._report_due.number = max(self._report_due.number, number)

    def asked_for_report(self, number: int) -> None:
        """The router has asked question `number`, which shows that it is alive. The silence timeout begins anew."""
        if not self._has_asked and self._silence_timeout_s:
            self._silence = Silence(self._silence_timeout_s)
        self._has_asked = True
        self._silence.heard()
        self.ask_for_report(number)

    def report_is_sent(self) -> None:
        """The queued report is on its way: another one will answer the next question."""
        self._report_due = None

    def is_silent(self, monotonic_s: float) -> bool:
        """Whether the router has said nothing for too long, so that it counts as gone. To be asked regularly."""
        return self._silence_timeout_s > 0.0 and self._silence.is_over_limit(monotonic_s)

    async def wait_for_silence(self) -> None:
        """Returns when the router has said nothing for too long; never where it may be silent for ever."""
        if not self._silence_timeout_s:
            await asyncio.Event().wait()
        interval_s = self._silence_timeout_s / LOOKS_PER_TIMEOUT
        while not self.is_silent(time.monotonic()):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(interval_s)
        logger.warning("lease %x: its router has been silent for %g s", self.lease.lease_id, self._silence.timeout_s)

    def fail(self, error: errors.StagecoachError, step: int = 0) -> None:
        """Ends the lease with a fault, which is the last that the router is told. Only the first one counts.

        The session ends when the fault has left, whether its router then hangs up or not: nobody else is to wait for
        the blocks of a lease that computes nothing more.
        """
        if self.ended:
            return
        self.ended = True
        logger.warning("lease %x, epoch %d: %s", self.lease.lease_id, self.lease.epoch, error)
        fault = shard_pb2.Fault(epoch=self.lease.epoch, step=step, status=to_status(error))
        self.outbox.put_nowait((write_frame(shard_pb2.SessionResponse(fault=fault)), None))
        self.outbox.put_nowait(None)


def check_open(request: shard_pb2.OpenRequest, stage: Stage, fingerprint: str, block_size: int) -> None:
    """Raises ModelMismatch where the router expects another stage, InvalidArgument for what makes no sense."""
    check_agreement(
        protocol_version=(request.protocol_version, PROTOCOL_VERSION),
        model_fingerprint=(request.model_fingerprint, fingerprint),
        layers=((request.layers.start, request.layers.end), (stage.layers.start, stage.layers.end)),
        dtype=(request.dtype, wire.DTYPES[stage.dtype]),
        block_size=(request.block_size, block_size),
    )
    if not request.lease_id:  # it means "none" to whoever asks what is free beside the lease that it has
        raise errors.InvalidArgument("lease_id must not be 0", field="lease_id", value=0)
    timeout_s = request.silence_timeout_s
    if timeout_s and not MIN_SILENCE_TIMEOUT_S <= timeout_s <= MAX_SILENCE_TIMEOUT_S:
        limit = f"0 or [{MIN_SILENCE_TIMEOUT_S}, {MAX_SILENCE_TIMEOUT_S}]"
        raise errors.InvalidArgument(
            f"silence_timeout_s must be {limit}", field="silence_timeout_s", limit=limit, value=timeout_s
        )
    if bool(request.next_hop) == stage.is_last:
        raise errors.InvalidArgument(
            "next_hop must be given to every stage but the last", field="next_hop", value=request.next_hop
        )
    if request.next_hop:
        check_address(request.next_hop, "next_hop")


def check_agreement(**pairs: tuple[object, object]) -> None:
    """Raises ModelMismatch for a field whose two values, the router's and this shard's, differ."""
    for field, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise errors.ModelMismatch(
                f"{field}: the router expects {theirs}, this shard has {ours}", field=field, limit=ours, value=theirs
            )
