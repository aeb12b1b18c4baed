"""The shards a router knows, and how it is with those that are in no pipeline: asked again and again who they are."""

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
from stagecoach_router.pipelines.shard_client import Stage, assign, check_same_model, describe, is_same_shard

logger = logging.getLogger(__name__)

# How often one that answers is asked, and one that does not: at first, and after a while.
FREE_INTERVAL_S = 1.0
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 0.5
# After a load that failed, the shard is not told to load again for so long.
LOAD_RETRY_S = 30.0
# A shard that a lost pipeline may have been lost by is second choice for so long, unless it has been started again.
QUARANTINE_S = 60.0


@dataclass(eq=False, slots=True)
class Shard:
    """One shard. While it is in a pipeline, that pipeline knows how it is. Times are time.monotonic()'s."""

    address: str
    epoch: int | None = None  # of the pipeline that it is in; None: in none
    stage: Stage | None = None  # what it said last; None: it did not answer, or was not asked since its pipeline
    error: errors.StagecoachError | None = None  # why it did not answer, or does not fit
    asked: bool = False  # since it was last in a pipeline
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    loading: LayerRange | None = None  # what it was told to load
    load_error: errors.StagecoachError | None = None  # why it could not
    no_load_before_s: float = 0.0
    quarantined_until_s: float = 0.0
    quarantined_shard_id: str = ""

    @property
    def reason(self) -> str:
        """Why it cannot take part, with its address; "" where it can."""
        if self.loading is not None:
            return f"{self.address}: loading layers {self.loading}"
        if self.error is not None:
            text = str(self.error)
            return text if self.address in text else f"{self.address}: {text}"
        if self.load_error is not None:
            return f"{self.address} could not load layers: {self.load_error}"
        return "" if self.stage is not None else f"{self.address}: it has not answered yet"

    @property
    def layers(self) -> LayerRange | None:
        """That it has now; None: none, or it is not known."""
        return self.stage.layers if self.stage is not None and self.stage.description.layers.end else None

    @property
    def assignable(self) -> bool:
        return self.stage is not None and self.stage.description.assignable

    @property
    def is_quarantined(self) -> bool:
        """Whether a pipeline was lost lately that it was in, and may have been the cause of."""
        same = self.stage is not None and self.stage.description.shard_id == self.quarantined_shard_id
        return same and time.monotonic() < self.quarantined_until_s

    @property
    def is_said_to_load(self) -> bool:
        """Whether it was told to load layers and has not fallen silent since: one that loads says so when asked."""
        return self.loading is not None and (self.error is None or self.error.field == "layers")


class ShardRegistry:
    """The shards at `addresses`, of one model. `run` keeps it true.

    `timeout_s` is how long a shard may take to say who it is.
    """

    def __init__(self, addresses: Sequence[str], dial: Dial = dial_plainly, *, lease_id: int, timeout_s: float) -> None:
        self.members = {address: Shard(address) for address in addresses}
        self._dial = dial
        self._lease_id = lease_id
        self._timeout_s = timeout_s
        self._reference: Stage | None = None
        self._changed = asyncio.Event()
        self._loads: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> list[Shard]:
        """Those that are in no pipeline."""
        return [member for member in self.members.values() if member.epoch is None]

    @property
    def all_answered(self) -> bool:
        """Whether it is known of all shards who they are."""
        return all(member.epoch is not None or member.stage is not None for member in self.members.values())

    def model(self) -> Stage | None:
        """The shard whose model is this router's: the first one that has answered. None: none has.

        As long as none of them was `settle`d on, raises ModelMismatch where they do not fit together, and what else one
        of them refuses us with that waiting does not cure.
        """
        if self._reference is not None:
            return self._reference
        answered = [member.stage for member in self.members.values() if member.stage is not None]
        for stage in answered:
            check_same_model(stage, answered[0])
        for member in self.members.values():
            if member.error is not None and not isinstance(member.error, errors.Unavailable):
                raise member.error
        return answered[0] if answered else None

    def settle(self, stage: Stage) -> None:
        """From now on the model is this one's, and who has another is left out."""
        self._reference = stage

    def candidates(self, min_blocks: int, *, with_loading: bool = False) -> list[Candidate]:
        """Those that a pipeline can be made of now; `with_loading`: or when they have loaded what they were told to.

        Of those with layers, the ones that have `min_blocks` free.
        """
        now_s = time.monotonic()
        found = []
        for member in self.free:
            if member.loading is not None:
                if with_loading and member.is_said_to_load:
                    found.append(Candidate(member.address, member.loading, assignable=False, num_blocks=min_blocks))
            elif member.stage is not None and member.error is None:
                may_load = member.assignable and now_s >= member.no_load_before_s
                num_blocks = member.stage.description.num_free_blocks
                if member.layers is None or num_blocks >= min_blocks:
                    found.append(Candidate(member.address, member.layers, may_load, num_blocks, member.is_quarantined))
        return found

    def take(self, addresses: Iterable[str], epoch: int) -> None:
        """They are in the pipeline of this epoch from now on."""
        for address in addresses:
            assert self.members[address].epoch is None, f"{address} is in a pipeline"
            self.members[address].epoch = epoch

    def release(self, addresses: Iterable[str], epoch: int) -> None:
        """That pipeline is no more: nothing is known of them until they have been asked.

        Harmless for those that are in another one by now.
        """
        for address in addresses:
            member = self.members[address]
            if member.epoch == epoch:
                member.epoch = member.stage = member.error = None
                member.asked = False
                member.wake.set()
        self._tell()

    def quarantine(self, addresses: Iterable[str]) -> None:
        """A pipeline was lost, or not opened, and one of these may be the cause."""
        for address in addresses:
            member = self.members[address]
            if member.stage is not None:
                member.quarantined_until_s = time.monotonic() + QUARANTINE_S
                member.quarantined_shard_id = member.stage.description.shard_id

    async def changed(self, timeout_s: float) -> None:
        """Returns when something was learnt about a shard, or after `timeout_s`."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    def load(self, address: str, layers: LayerRange) -> None:
        """Tells a shard to load other layers; it is a candidate again when it has."""
        member = self.members[address]
        assert member.stage is not None, "a candidate"
        logger.info("%s is told to load layers %s", address, layers)
        member.loading, member.load_error = layers, None
        task = asyncio.create_task(self._load(member, layers, member.stage.description.model.fingerprint))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def run(self) -> None:
        """Asks the shards. Runs until cancelled."""
        try:
            await asyncio.gather(*(self._watch(member) for member in self.members.values()))
        finally:
            for task in self._loads:
                task.cancel()

    async def _watch(self, member: Shard) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            if member.epoch is None:
                await self._ask(member)
            retry_s = FIRST_RETRY_S if member.stage is not None else min(2 * retry_s, MAX_RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry_s if member.stage is None else FREE_INTERVAL_S):
                    await member.wake.wait()
                    retry_s = FIRST_RETRY_S
            member.wake.clear()

    async def _ask(self, member: Shard) -> None:
        stage: Stage | None = None
        error: errors.StagecoachError | None = None
        try:
            stage = await describe(member.address, self._dial, lease_id=self._lease_id, timeout_s=self._timeout_s)
            self._check_only_once(stage)
            if self._reference is not None:
                check_same_model(stage, self._reference)
        except errors.StagecoachError as caught:
            error = caught.with_traceback(None)  # kept, and its frames know the call and its connection
            error.__cause__ = error.__context__ = None
        if member.epoch is not None or member.wake.is_set():  # what came is of a time before
            return
        before = member.stage, member.reason, member.asked
        member.stage, member.error, member.asked = stage, error, True
        if member.error is not None and member.reason != before[1]:
            logger.info("%s", member.reason)
        if (stage, member.reason, True) != before:
            self._tell()

    def _check_only_once(self, stage: Stage) -> None:
        """Raises ConfigError for a shard that is listed under another address, too."""
        for member in self.members.values():
            known = member.stage
            if known is not None and known.address != stage.address and is_same_shard(known, stage):
                text = f"shards: {stage.address} is the shard at {known.address}"
                raise errors.ConfigError(text, field="shards", value=stage.address)

    async def _load(self, member: Shard, layers: LayerRange, fingerprint: str) -> None:
        try:
            await assign(member.address, layers, self._dial, fingerprint=fingerprint)
        except errors.StagecoachError as error:
            logger.warning("%s cannot load layers %s: %s", member.address, layers, error)
            member.no_load_before_s = time.monotonic() + LOAD_RETRY_S
            member.load_error = error.with_traceback(None)
        finally:
            member.loading = member.stage = None  # what it has now, it has to say
            member.wake.set()

    def _tell(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
