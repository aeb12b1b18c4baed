"""Pipelines out of the shards that are there: the first, those that take a lost one's place, and further ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from stagecoach import errors
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.pipelines.pipeline import Connect, LostHandler, Pipeline, ResultHandler
from stagecoach_router.pipelines.placement import Link, find_chain
from stagecoach_router.pipelines.shard_client import Stage, check_same_model, describe
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.pipelines.watchdog import FaultLimits

logger = logging.getLogger(__name__)

# Who waits for shards is told why after so long, and asks again.
FIND_TIMEOUT_S = 2.0
# A shard that has just lost its pipeline has so long to say that it is still there, before a spare loads its layers.
ASK_PATIENCE_S = 1.0
# A spare that loads layers is waited for so long, before a shard in quarantine is taken again in its place.
QUARANTINE_PATIENCE_S = 5.0
# At the start, shards that have not answered yet are waited for so long before others load what is missing.
START_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """How pipelines are made; `kv_blocks` and `lanes` as in the router's settings.

    num_stages: of a pipeline of shards without layers; 0: all of them. num_replicas: for so many pipelines shards load
    layers, and for one. max_slots: of each lease.
    """

    num_stages: int
    num_replicas: int
    kv_blocks: int
    lanes: int
    max_slots: int
    faults: FaultLimits


class PipelineManager:
    """Opens pipelines over the shards of `registry`, under one lease and rising epochs.

    So whatever a shard still sends for a pipeline that was lost is of an epoch that nobody takes any more, whichever
    pipeline it is in now.
    """

    def __init__(
        self,
        registry: ShardRegistry,
        settings: PipelineSettings,
        *,
        lease_id: int,
        totals: PipelineTotals,
        dial: Dial = dial_plainly,
    ) -> None:
        self.registry = registry
        self._settings = settings
        self._lease_id = lease_id
        self.totals = totals
        self._dial = dial
        self._epoch = 0
        self._num_formed = 0  # connectors that have opened a pipeline
        self._started_s = time.monotonic()

    def connector(self) -> Connect:
        """What opens the pipelines of one replica, each time preferring the shards of the one before."""
        former: list[str] = []

        async def connect(on_result: ResultHandler, on_lost: LostHandler) -> Pipeline:
            may_load = bool(former) or self._num_formed < max(1, self._settings.num_replicas)
            chain = await self._find(former, may_load=may_load)
            pipeline = await self._open([link.address for link in chain], on_result, on_lost)
            self._num_formed += not former
            former[:] = [link.address for link in chain]
            return pipeline

        return connect

    async def first_shard(self) -> Stage:
        """One that has answered. Raises Unavailable where none does for a while, ModelMismatch where they differ."""
        began = time.monotonic()
        while (model := self.registry.model()) is None:
            if time.monotonic() - began >= FIND_TIMEOUT_S:
                raise self._explained(errors.Unavailable("no shard has answered yet"))
            await self.registry.changed(FIND_TIMEOUT_S)
        return model

    async def another(self, num_replicas: int, all_open: Callable[[], bool]) -> None:
        """Returns when there are shards for one more pipeline than `num_replicas`.

        Others load layers for that only while all pipelines are open: a lost one comes first.
        """
        while True:
            may_load = num_replicas < self._settings.num_replicas and all_open()
            try:
                if self._look([], may_load=may_load) is not None:
                    return
            except errors.TopologyError:
                pass
            await self.registry.changed(FIND_TIMEOUT_S)

    async def _find(self, former: list[str], *, may_load: bool) -> list[Link]:
        """The next pipeline's shards.

        Raises Unavailable where there are none for a while, TopologyError where all have answered and cannot be one.
        """
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            asked = all(self.registry.members[address].asked for address in former)
            error: errors.StagecoachError
            try:
                chain = self._look(former, may_load=may_load and (asked or waited_s >= ASK_PATIENCE_S))
            except errors.TopologyError as missing:
                error = missing
            else:
                is_quarantined = chain is not None and self._waits_for_better(former, chain)
                if chain is not None and not (is_quarantined and waited_s < QUARANTINE_PATIENCE_S):
                    return chain
                error = errors.Unavailable("layers are being loaded")
                if is_quarantined:
                    await self.registry.changed(QUARANTINE_PATIENCE_S - waited_s)
                    continue
            if waited_s >= FIND_TIMEOUT_S:
                raise self._explained(error)
            await self.registry.changed(FIND_TIMEOUT_S - waited_s)

    def _look(self, former: list[str], *, may_load: bool) -> list[Link] | None:
        """A chain of shards that need not load anything. None: some have to, and are told to.

        Raises TopologyError where there is neither.
        """
        model = self.registry.model()
        if model is None:
            raise errors.TopologyError("no shard has answered yet", field="shards")
        num_layers = model.description.model.num_layers
        candidates = self.registry.candidates(self._min_blocks)
        started = bool(former) or self.registry.all_answered or self._has_waited_enough()
        try:
            chain = find_chain(candidates, num_layers, prefer=former, may_load=False)
        except errors.TopologyError:
            if may_load and started and self._load_missing(former, num_layers, without=()):
                return None
            # Those without room may have some by the time they are asked; else they say how much they lack.
            return find_chain(self.registry.candidates(0), num_layers, prefer=former, may_load=False)
        quarantined = self._quarantined(chain)
        if may_load and quarantined:
            # All of them, or else one: a broken link is quarantined on both of its ends.
            any(
                self._load_missing(former, num_layers, without=each)
                for each in [quarantined, *zip(reversed(quarantined))]
            )
        return chain

    def _quarantined(self, chain: list[Link]) -> list[str]:
        return [link.address for link in chain if self.registry.members[link.address].is_quarantined]

    def _waits_for_better(self, former: list[str], chain: list[Link]) -> bool:
        """Whether a shard is loading what makes a chain with fewer that are quarantined."""
        if not self._quarantined(chain):
            return False
        candidates = self.registry.candidates(self._min_blocks, with_loading=True)
        try:
            better = find_chain(candidates, chain[-1].layers.end, prefer=former, may_load=False)
        except errors.TopologyError:  # this one's shards lack room
            return False
        return len(self._quarantined(better)) < len(self._quarantined(chain))

    def _load_missing(self, former: list[str], num_layers: int, *, without: Collection[str]) -> bool:
        """Has shards load what is missing, or finds that they do. Returns whether that makes a pipeline."""
        candidates = self.registry.candidates(self._min_blocks, with_loading=True)
        try:
            chain = find_chain(
                [shard for shard in candidates if shard.address not in without],
                num_layers,
                prefer=former,
                # One that was split over several shards is not to become a single shard's.
                num_stages=len(former) or self._settings.num_stages,
            )
        except errors.TopologyError:
            return False
        for link in chain:
            if link.must_load:
                self.registry.load(link.address, link.layers)
        return True

    @property
    def _min_blocks(self) -> int:
        return max(self._settings.kv_blocks, 1) + 1  # one is the probe's

    def _has_waited_enough(self) -> bool:
        return time.monotonic() - self._started_s >= START_PATIENCE_S

    def _explained(self, error: errors.StagecoachError) -> errors.StagecoachError:
        """With what is wrong with the shards that could help; as an error for good where nothing is."""
        reasons = [member.reason for member in self.registry.free if member.reason]
        if reasons:
            return errors.Unavailable("; ".join(dict.fromkeys([*reasons, str(error)])))
        if isinstance(error, errors.TopologyError) and self.registry.all_answered:
            return error
        return errors.Unavailable(str(error))

    async def _open(self, addresses: list[str], on_result: ResultHandler, on_lost: LostHandler) -> Pipeline:
        settings = self._settings
        self._epoch += 1
        epoch = self._epoch
        self.registry.take(addresses, epoch)

        def lost(error: errors.StagecoachError) -> None:
            self._let_go(addresses, epoch, error)
            on_lost(error)

        try:
            stages = await self._describe(addresses)
            _check_lanes(settings.lanes, len(stages))
            pipeline = Pipeline(
                stages,
                lease_id=self._lease_id,
                epoch=epoch,
                on_result=on_result,
                on_lost=lost,
                totals=self.totals,
                dial=self._dial,
                faults=settings.faults,
            )
            num_blocks = num_blocks_to_lease(settings.kv_blocks, stages)
            await _open_as_described(pipeline, num_blocks, settings.max_slots)
        except BaseException as error:
            self._let_go(addresses, epoch, error)
            raise
        self.registry.settle(stages[0])
        places = ", ".join(f"layers {stage.layers} at {stage.address}" for stage in stages)
        logger.info("pipeline open in epoch %d: %s; %d K/V blocks", epoch, places, num_blocks)
        return pipeline

    def _let_go(self, addresses: list[str], epoch: int, error: BaseException) -> None:
        """Gives up a pipeline's shards, and quarantines those that the error names; all, where it names none."""
        if isinstance(error, (errors.Unavailable, errors.ShardFault)):
            named = [address for address in addresses if address in error.addresses]
            self.registry.quarantine(named or addresses)
        self.registry.release(addresses, epoch)

    async def _describe(self, addresses: list[str]) -> list[Stage]:
        """As they are now: since they were last asked, others may have taken their blocks."""
        timeout_s = self._settings.faults.fault_timeout_s
        asked = [describe(address, self._dial, lease_id=self._lease_id, timeout_s=timeout_s) for address in addresses]
        stages = await asyncio.gather(*asked)
        model = self.registry.model() or stages[0]
        end = 0
        for stage in stages:
            check_same_model(stage, model)
            if stage.description.layers.start != end:
                text = f"{stage.address} has other layers now: {stage.description.layers}"
                raise errors.Unavailable(text, addresses=[stage.address])
            end = stage.description.layers.end
        return stages


async def _open_as_described(pipeline: Pipeline, num_blocks: int, max_slots: int) -> None:
    """Opens a pipeline whose shards have just said who they are.

    Raises Unavailable where one of them is another by now: another router may have changed it, and asking helps.
    """
    try:
        await pipeline.open(num_blocks=num_blocks, max_slots=max_slots)
    except (errors.ModelMismatch, errors.FailedPrecondition, errors.ShardFault) as error:
        raise errors.Unavailable(str(error), addresses=error.addresses) from error


def _check_lanes(lanes: int, num_stages: int) -> None:
    if 0 < lanes < num_stages:
        raise errors.ConfigError(
            f"lanes: {lanes} would leave some of {num_stages} stages idle", field="lanes", limit=num_stages, value=lanes
        )


def num_blocks_to_lease(wanted: int, stages: list[Stage]) -> int:
    """What is free on every stage, or `wanted` of it and one for the probe.

    Raises KVCacheFull, ConfigError for more than there ever are.
    """
    needed = max(wanted, 1) + 1
    free_blocks = min(stage.description.num_free_blocks for stage in stages)
    all_blocks = min(stage.description.num_blocks for stage in stages)
    if needed > all_blocks:
        text = f"kv_blocks: {needed - 1} wanted and one for the probe, a stage has {all_blocks}"
        raise errors.ConfigError(text, field="kv_blocks", limit=all_blocks - 1, value=wanted)
    if free_blocks < needed:
        raise errors.KVCacheFull.of_blocks(needed=needed, free=free_blocks)
    return needed if wanted else free_blocks
