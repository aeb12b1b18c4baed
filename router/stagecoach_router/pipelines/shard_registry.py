"""The shards that a router was given, and what it knows of each: those in no pipeline are asked regularly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence

from stagecoach import errors
from stagecoach.process.together import together
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.model_choice import ModelChoice, has_whole_chain
from stagecoach_router.pipelines.placement import Candidate
from stagecoach_router.pipelines.shard import ProcessRecord, Shard
from stagecoach_router.pipelines.shard_client import assign, describe
from stagecoach_router.pipelines.shard_description import ShardDescription

logger = logging.getLogger(__name__)

# How often one that answers is asked, and one that does not: at first, and when it has not answered for a while. A
# process that is started again at once is back within a few seconds.
FREE_INTERVAL_S = 1.0
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 0.5
EAGER_S = 5.0


class ShardRegistry:
    """The shards at `addresses`, of one model. `run` keeps it true.

    `timeout_s` is how long a shard may take to say who it is. `choice`: which model it is.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        dial: Dial = dial_plainly,
        *,
        lease_id: int,
        timeout_s: float,
        choice: ModelChoice | None = None,
    ) -> None:
        self.shards = {address: Shard(address) for address in addresses}
        self._dial = dial
        self._lease_id = lease_id
        self._timeout_s = timeout_s
        self.choice = choice or ModelChoice()
        self._changed = asyncio.Event()
        self._loads: dict[Shard, asyncio.Task[None]] = {}

    @property
    def free(self) -> list[Shard]:
        """The shards that are in no pipeline."""
        return [shard for shard in self.shards.values() if shard.epoch is None]

    @property
    def all_answered(self) -> bool:
        """Whether it is known of all shards who they are."""
        return all(shard.epoch is not None or shard.description is not None for shard in self.shards.values())

    @property
    def nobody_is_missing(self) -> bool:
        """Whether all have answered with anything: who says what no shard can say, or refuses us, is there, too."""
        return all(
            shard.epoch is not None
            or shard.description is not None
            or (shard.error is not None and not isinstance(shard.error, errors.Unavailable))
            for shard in self.shards.values()
        )

    @property
    def candidates(self) -> list[Candidate]:
        """The shards that a pipeline can be made of, now or when they have loaded what they were told to."""
        candidates = [shard.candidate for shard in self.shards.values()]
        return [candidate for candidate in candidates if candidate is not None]

    @property
    def own_candidates(self) -> list[Candidate]:
        """Those of them that were started with layers of their own."""
        return [candidate for candidate in self.candidates if self.shards[candidate.address].has_own_layers]

    @property
    def layers_in_use(self) -> list[LayerRange]:
        """The layer ranges of all shards that are in a pipeline."""
        serving = [shard.layers for shard in self.shards.values() if shard.epoch is not None]
        return [layers for layers in serving if layers is not None]

    def choose_model(self) -> ShardDescription | None:
        """A shard of the router's model, decided anew unless that is settled. Who has another is left out from now on.

        None: no shard has answered.
        """
        self.choice.choose(self._described)
        for shard in self.shards.values():
            self._judge(shard)
        return self.choice.reference

    def of_model(self, model: ShardDescription) -> list[ShardDescription]:
        """The shards that are of that model, as they have said."""
        return [shard for shard in self._described if self.choice.fits(shard, model)]

    def is_majority(self, model: ShardDescription) -> bool:
        """Whether most of the shards that the router was given are of that model, as they have said."""
        return 2 * len(self.of_model(model)) > len(self.shards)

    @property
    def _described(self) -> list[ShardDescription]:
        return [shard.description for shard in self.shards.values() if shard.description is not None]

    def never_fits(self) -> bool:
        """Whether no pipeline was open before, and the shards, which have all said who they are, make none."""
        is_changing = any(shard.error or shard.loading or shard.process.load_error for shard in self.free)
        best = None if self.choice.settled or is_changing else self.choice.best_of(self._described)
        return best is not None and not has_whole_chain(self.of_model(best))

    def _judge(self, shard: Shard) -> None:
        shard.left_out = None if shard.description is None else self.choice.why_not(shard.description)

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
                shard.epoch = shard.description = shard.error = shard.left_out = None
                shard.wake.set()
        self._tell()

    def learn(self, description: ShardDescription) -> None:
        """What a shard has said of itself to somebody else than this registry."""
        shard = self.shards[description.address]
        shard.learn(description)
        self._judge(shard)

    def quarantine(self, addresses: Iterable[str]) -> None:
        """A pipeline was lost, or not opened, and one of these may be the cause."""
        for address in addresses:
            shard = self.shards[address]
            if shard.description is not None:
                shard.quarantine()

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
        process = shard.begin_load(layers)
        task = asyncio.create_task(self._load(shard, process, layers, shard.description.facts.model.fingerprint))
        self._loads[shard] = task
        task.add_done_callback(lambda done: self._loads.pop(shard) if self._loads.get(shard) is done else None)

    async def run(self) -> None:
        """Asks the shards. Runs until cancelled."""
        try:
            await together(self._watch(shard) for shard in self.shards.values())
        finally:
            for task in self._loads.values():
                task.cancel()

    async def _watch(self, shard: Shard) -> None:
        eager_until_s = 0.0
        while True:
            if shard.epoch is None:
                await self._ask(shard)
            now_s = time.monotonic()
            if shard.description is not None:
                interval_s, eager_until_s = FREE_INTERVAL_S, now_s + EAGER_S
            else:
                interval_s = FIRST_RETRY_S if now_s < eager_until_s else MAX_RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await shard.wake.wait()
                    eager_until_s = time.monotonic() + EAGER_S
            shard.wake.clear()

    async def _ask(self, shard: Shard) -> None:
        description: ShardDescription | None = None
        error: errors.StagecoachError | None = None
        try:
            description = await describe(shard.address, self._dial, lease_id=self._lease_id, timeout_s=self._timeout_s)
            self._check_only_once(description)
        except errors.StagecoachError as caught:
            error = caught.with_traceback(None)  # kept, and its frames know the call and its connection
            error.__cause__ = error.__context__ = None
        except Exception as unforeseen:  # costs this shard, and none of the others
            logger.exception("asking %s who it is", shard.address)
            error = errors.InternalError(f"{shard.address}: {unforeseen!r}", addresses=[shard.address])
        if shard.epoch is not None or shard.wake.is_set():  # what came is of a time before
            return
        former_description, former_reason = shard.description, shard.reason
        shard.learn(description, error)
        self._judge(shard)
        if shard.loading is None and shard in self._loads:  # the process that was told to load is gone
            self._loads[shard].cancel()
        if (error or shard.left_out) and shard.reason != former_reason:
            logger.info("%s", shard.reason)
        if description != former_description or shard.reason != former_reason:
            self._tell()

    def _check_only_once(self, description: ShardDescription) -> None:
        """Raises ConfigError for a shard that is listed under another address, too.

        What one says that cannot be in a pipeline, or may have broken one, keeps no other from being who it says it is.
        """
        for shard in self.shards.values():
            known = shard.description if shard.left_out is None and not shard.is_quarantined else None
            if known is not None and known.address != description.address and known.is_same_process(description):
                text = f"shards: {description.address} is the shard at {known.address}"
                raise errors.ConfigError(text, field="shards", value=description.address)

    async def _load(self, shard: Shard, process: ProcessRecord, layers: LayerRange, fingerprint: str) -> None:
        try:
            await assign(shard.address, layers, self._dial, fingerprint=fingerprint)
            process.loaded = layers
        except Exception as error:
            known = isinstance(error, errors.StagecoachError)
            logger.warning("layers %s could not be loaded: %s", layers, error, exc_info=not known)
            told = error if isinstance(error, errors.StagecoachError) else errors.InternalError(repr(error))
            process.could_not_load(told.with_traceback(None))
        finally:
            if shard.process is process:  # else another one answers at the address by now, and was told nothing
                shard.loading = shard.description = None  # what it has now, it has to say
                shard.wake.set()

    def pipeline_opened(self, shard: ShardDescription) -> None:
        """A pipeline is open, of which this is a shard. Those that are left may have to stand by for it."""
        self.choice.settle(shard)
        self._tell()

    def _tell(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
