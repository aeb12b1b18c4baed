"""The shards that a router was given, and what it knows of each: those in no pipeline are asked regularly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stagecoach import errors
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.placement import Candidate
from stagecoach_router.pipelines.shard_client import assign, describe
from stagecoach_router.pipelines.shard_description import ShardDescription

logger = logging.getLogger(__name__)

# How often one that answers is asked, and one that does not: at first, and after a while.
FREE_INTERVAL_S = 1.0
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 0.5
# After a load that failed, the shard is not told to load again for so long.
LOAD_RETRY_S = 30.0
# A shard that may have broken a pipeline is second choice for so long, unless it has been started again.
QUARANTINE_S = 60.0


@dataclass(eq=False, slots=True)
class Shard:
    """What the router knows of one shard. While it is in a pipeline, that pipeline knows how it is.

    Times are time.monotonic()'s.
    """

    address: str
    epoch: int | None = None  # of the pipeline that it is in; None: in none
    description: ShardDescription | None = None  # its last answer; None: none, or none since it was in a pipeline
    error: errors.StagecoachError | None = None  # why it did not answer, or does not fit
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # to ask it at once
    loading: LayerRange | None = None  # what it was told to load, and has not loaded yet
    load_error: errors.StagecoachError | None = None  # why it could not
    no_load_before_s: float = 0.0
    quarantined_until_s: float = 0.0
    quarantined: ShardDescription | None = None  # the process that was put into quarantine

    @property
    def reason(self) -> str:
        """Why it cannot take part, beginning with its address; "" where it can."""
        if self.loading is not None:
            return f"{self.address}: loading layers {self.loading}"
        if self.error is not None:
            return str(self.error)
        if self.load_error is not None:
            return f"{self.load_error}; it could not load layers"
        return "" if self.description is not None else f"{self.address}: it has not answered yet"

    @property
    def was_asked(self) -> bool:
        """Whether it has been asked who it is since it was last in a pipeline, though it need not have answered."""
        return self.description is not None or self.error is not None

    @property
    def layers(self) -> LayerRange | None:
        """The layers that it has now; None: it has none, or they are not known."""
        return None if self.description is None else self.description.layers

    @property
    def assignable(self) -> bool:
        """Whether it is known that it may be given other layers."""
        return self.description is not None and self.description.facts.assignable

    @property
    def is_quarantined(self) -> bool:
        """Whether a pipeline was lost lately that this very process was in, and may have broken."""
        if self.description is None or self.quarantined is None:
            return False
        return self.description.is_same_process(self.quarantined) and time.monotonic() < self.quarantined_until_s

    @property
    def candidate(self) -> Candidate | None:
        """What a pipeline could make of it; None while it is in one, does not answer or does not fit."""
        if self.epoch is not None:
            return None
        if self.loading is not None:
            # One that loads says so when asked. One that does not answer at all is not waited for.
            is_silent = self.error is not None and self.error.field != "layers"
            return None if is_silent else Candidate(self.address, self.loading, False, 0, is_loading=True)
        if self.description is None or self.error is not None:
            return None
        may_load = self.assignable and time.monotonic() >= self.no_load_before_s
        num_blocks = self.description.facts.num_free_blocks
        return Candidate(self.address, self.layers, may_load, num_blocks, self.is_quarantined)


class ShardRegistry:
    """The shards at `addresses`, of one model. `run` keeps it true.

    `timeout_s` is how long a shard may take to say who it is.
    """

    def __init__(self, addresses: Sequence[str], dial: Dial = dial_plainly, *, lease_id: int, timeout_s: float) -> None:
        self.shards = {address: Shard(address) for address in addresses}
        self._dial = dial
        self._lease_id = lease_id
        self._timeout_s = timeout_s
        self._reference: ShardDescription | None = None  # has the model that all others have to have
        self._changed = asyncio.Event()
        self._loads: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> list[Shard]:
        """The shards that are in no pipeline."""
        return [shard for shard in self.shards.values() if shard.epoch is None]

    @property
    def all_answered(self) -> bool:
        """Whether it is known of all shards who they are."""
        return all(shard.epoch is not None or shard.description is not None for shard in self.shards.values())

    @property
    def candidates(self) -> list[Candidate]:
        """The shards that a pipeline can be made of, now or when they have loaded what they were told to."""
        candidates = [shard.candidate for shard in self.shards.values()]
        return [candidate for candidate in candidates if candidate is not None]

    def model(self) -> ShardDescription | None:
        """The shard whose model is this router's: the first one that has answered. None: none has.

        As long as none of them was `settle`d on, raises ModelMismatch where they do not fit together, and what else one
        of them refuses us with that waiting does not cure.
        """
        if self._reference is not None:
            return self._reference
        answered = [shard.description for shard in self.shards.values() if shard.description is not None]
        for description in answered:
            description.check_same_model(answered[0])
        for shard in self.shards.values():
            if shard.error is not None and not isinstance(shard.error, errors.Unavailable):
                raise shard.error
        return answered[0] if answered else None

    def settle(self, description: ShardDescription) -> None:
        """From now on the model is this one's, and who has another is left out."""
        self._reference = description

    def take(self, addresses: Iterable[str], epoch: int) -> None:
        """They are in the pipeline of this epoch from now on."""
        for address in addresses:
            shard = self.shards[address]
            assert shard.epoch is None, f"{address} is in a pipeline"
            shard.epoch = epoch

    def release(self, addresses: Iterable[str], epoch: int) -> None:
        """That pipeline is no more: nothing is known of them until they have been asked.

        Harmless for those that are in another one by now.
        """
        for address in addresses:
            shard = self.shards[address]
            if shard.epoch == epoch:
                shard.epoch = shard.description = shard.error = None
                shard.wake.set()
        self._tell()

    def quarantine(self, addresses: Iterable[str]) -> None:
        """A pipeline was lost, or not opened, and one of these may be the cause."""
        for address in addresses:
            shard = self.shards[address]
            if shard.description is not None:
                shard.quarantined_until_s = time.monotonic() + QUARANTINE_S
                shard.quarantined = shard.description

    async def changed(self, timeout_s: float) -> None:
        """Returns when something was learnt about a shard, or after `timeout_s`."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    def load(self, address: str, layers: LayerRange) -> None:
        """Tells a shard to load other layers; it is a candidate again when it has."""
        shard = self.shards[address]
        assert shard.description is not None, "a candidate"
        logger.info("%s is told to load layers %s", address, layers)
        shard.loading, shard.load_error = layers, None
        task = asyncio.create_task(self._load(shard, layers, shard.description.facts.model.fingerprint))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def run(self) -> None:
        """Asks the shards. Runs until cancelled."""
        try:
            await asyncio.gather(*(self._watch(shard) for shard in self.shards.values()))
        finally:
            for task in self._loads:
                task.cancel()

    async def _watch(self, shard: Shard) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            if shard.epoch is None:
                await self._ask(shard)
            retry_s = FIRST_RETRY_S if shard.description is not None else min(2 * retry_s, MAX_RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry_s if shard.description is None else FREE_INTERVAL_S):
                    await shard.wake.wait()
                    retry_s = FIRST_RETRY_S
            shard.wake.clear()

    async def _ask(self, shard: Shard) -> None:
        description: ShardDescription | None = None
        error: errors.StagecoachError | None = None
        try:
            description = await describe(shard.address, self._dial, lease_id=self._lease_id, timeout_s=self._timeout_s)
            self._check_only_once(description)
            if self._reference is not None:
                description.check_same_model(self._reference)
        except errors.StagecoachError as caught:
            error = caught.with_traceback(None)  # kept, and its frames know the call and its connection
            error.__cause__ = error.__context__ = None
        except Exception as unforeseen:  # costs this shard, and none of the others
            logger.exception("asking %s who it is", shard.address)
            error = errors.InternalError(f"{shard.address}: {unforeseen!r}", addresses=[shard.address])
        if shard.epoch is not None or shard.wake.is_set():  # what came is of a time before
            return
        former_description, former_reason = shard.description, shard.reason
        shard.description, shard.error = description, error
        if error is not None and shard.reason != former_reason:
            logger.info("%s", shard.reason)
        if description != former_description or shard.reason != former_reason:
            self._tell()

    def _check_only_once(self, description: ShardDescription) -> None:
        """Raises ConfigError for a shard that is listed under another address, too."""
        for shard in self.shards.values():
            known = shard.description
            if known is not None and known.address != description.address and known.is_same_process(description):
                text = f"shards: {description.address} is the shard at {known.address}"
                raise errors.ConfigError(text, field="shards", value=description.address)

    async def _load(self, shard: Shard, layers: LayerRange, fingerprint: str) -> None:
        try:
            await assign(shard.address, layers, self._dial, fingerprint=fingerprint)
        except Exception as error:
            known = isinstance(error, errors.StagecoachError)
            logger.warning("layers %s could not be loaded: %s", layers, error, exc_info=not known)
            shard.no_load_before_s = time.monotonic() + LOAD_RETRY_S
            told = error if isinstance(error, errors.StagecoachError) else errors.InternalError(repr(error))
            shard.load_error = told.with_traceback(None)
        finally:
            shard.loading = shard.description = None  # what it has now, it has to say
            shard.wake.set()

    def _tell(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
