"""Opens pipelines over the shards that there are: the first, those that take a lost one's place, and further ones."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagecoach import errors
from stagecoach.process.together import together
from stagecoach.v1 import shard_pb2
from stagecoach_router.pipelines.pipeline import Pipeline, PipelineContext, PipelineListener
from stagecoach_router.pipelines.shard_choice import Choice, Wish, choose_shards
from stagecoach_router.pipelines.shard_client import describe
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.pipelines.standby import plan_standbys

logger = logging.getLogger(__name__)

# Who waits for shards is told why after so long, and asks again.
FIND_TIMEOUT_S = 2.0
# A shard that has just lost its pipeline has so long to say that it is still there, before a spare loads its layers.
ASK_PATIENCE_S = 1.0
# What says nothing against the shards: others hold their blocks, or our own settings do not fit.
NO_FAULT_OF_SHARDS = (errors.KVCacheFull, errors.ConfigError, errors.TopologyError)
# Shards that have not been heard of yet have so long to say which model they have, before most of them choose it.
MODEL_PATIENCE_S = 1.0
# A spare that loads layers is waited for so long, before a shard in quarantine is taken again in its place.
QUARANTINE_PATIENCE_S = 5.0
# At the start, shards that have not answered yet are waited for so long before others load what is missing, and before
# fewer than most of them decide which model it is.
START_PATIENCE_S = 30.0
# So many shards say in one error why they cannot take part. All of them stand in a status.
MAX_REASONS = 4
# Of one lease: with blocks of 16 positions the K/V of 33 million. Each that is used costs this process some 300 bytes,
# all of them 0.6 GB, and how many a shard has is what it says.
MAX_LEASED_BLOCKS = 1 << 21


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """How pipelines are made; `kv_blocks` and `lanes` as in the router's settings.

    num_stages: of a pipeline of shards without layers; 0: all of them. num_replicas: for so many pipelines shards load
    layers, and for one. max_slots: of each lease.
    """

    num_stages: int = 0
    num_replicas: int = 0
    kv_blocks: int = 0
    lanes: int = 0
    max_slots: int = 1


class PipelineManager:
    """Opens pipelines over the shards of `registry`, under one lease and rising epochs.

    So whatever a shard still sends for a pipeline that was lost is of an epoch that nobody takes any more, whichever
    pipeline it is in now.
    """

    def __init__(self, registry: ShardRegistry, settings: PipelineSettings, context: PipelineContext) -> None:
        self.registry = registry
        self.totals = context.totals
        self._settings = settings
        self._context = context
        self._epoch = 0
        self._num_replicas = 0  # that have had a pipeline
        self._started_s = time.monotonic()

    def connector(self) -> Connector:
        """What opens the pipelines of one more replica."""
        return Connector(self)

    async def choose_model(self) -> ShardDescription:
        """A shard that has the model which pipelines are opened of from now on, until one is open for good.

        Raises Unavailable where no shard answers for a while, or too few to decide by.
        """
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            model = None
            everybody_was_asked = all(shard.was_asked for shard in self.registry.free)
            if everybody_was_asked or waited_s >= MODEL_PATIENCE_S:
                model = self.registry.choose_model()
                if model is not None and self._is_decided(model):
                    return model
            if waited_s >= FIND_TIMEOUT_S:
                raise self._explained(errors.Unavailable(self._why_undecided(model)))
            await self.registry.changed(MODEL_PATIENCE_S)

    def _is_decided(self, model: ShardDescription) -> bool:
        """Whether the first pipeline may be of this model, which then is the router's as long as that lives.

        After a loss of power the shards come one after another, and the first may lie or be a forgotten one: it alone
        decides nothing, as long as the others can be expected to come.
        """
        registry = self.registry
        if registry.choice.settled or registry.is_majority(model) or registry.nobody_is_missing:
            return True
        return self._has_waited_enough() and registry.choice.is_expected(model)

    def _why_undecided(self, model: ShardDescription | None) -> str:
        registry = self.registry
        if model is None:
            return "no shard has answered yet"
        told = f"{len(registry.of_model(model))} of {len(registry.shards)} shards have said that they have this model"
        if not registry.choice.is_expected(model):
            return f"{told}, and the journal is of another one"
        return f"{told}, which is not decided by so few until {START_PATIENCE_S:g} s have passed"

    def is_ready_for(self, num_replicas: int) -> bool:
        """Whether there are shards for so many pipelines, all but the last of which are open.

        Where shards are to load layers for so many, and have to for this one, they are told to. More pipelines than
        that are made of shards with layers of their own only: the others stand by.
        """
        is_wanted = num_replicas <= self._settings.num_replicas
        return bool(self._choose([], may_load=is_wanted, is_extra=not is_wanted).stages)

    def stand_by(self) -> None:
        """While all pipelines are open: has shards without layers load what the loss of a stage would need."""
        for stage in plan_standbys(self.registry.candidates, self.registry.layers_in_use):
            self.registry.load(stage.address, stage.layers)

    async def changed(self) -> None:
        """Returns when something was learnt about a shard, or after a while: quarantines end by themselves."""
        await self.registry.changed(FIND_TIMEOUT_S)

    async def connect(self, former: Sequence[str], listener: PipelineListener) -> Pipeline:
        """Opens a replica's pipeline, preferably over the shards `former` that it had before (none: it had none).

        Raises Unavailable or KVCacheFull where that cannot be done yet, and TopologyError, ConfigError or ModelMismatch
        where it never can.
        """
        is_wanted = bool(former) or self._num_replicas < max(1, self._settings.num_replicas)
        pipeline = await self._open(await self._find(former, is_wanted=is_wanted), listener)
        self._num_replicas += not former
        return pipeline

    async def _find(self, former: Sequence[str], *, is_wanted: bool) -> list[str]:
        """The next pipeline's shards; `is_wanted`: not one more than was asked for.

        Raises Unavailable where there are none for a while, TopologyError where all have answered and cannot be one.
        """
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            were_asked = all(self.registry.shards[address].was_asked for address in former)
            may_load = is_wanted and (were_asked or waited_s >= ASK_PATIENCE_S)
            choice = self._choose(former, may_load=may_load, is_extra=not is_wanted)
            patience_s = QUARANTINE_PATIENCE_S if choice.is_second_choice else FIND_TIMEOUT_S
            if choice.stages and not (choice.is_second_choice and waited_s < patience_s):
                return choice.addresses
            if choice.error is not None and waited_s >= patience_s:
                raise self._explained(choice.error)
            await self.registry.changed(patience_s - waited_s)

    def _choose(self, former: Sequence[str], *, may_load: bool, is_extra: bool = False) -> Choice:
        """The shards for a pipeline. Those that have to load layers for it are told to.

        is_extra: it is one more than was asked for, and takes no shard that was started without layers.
        """
        model = self.registry.choice.reference or self.registry.choose_model()
        if model is None:
            return Choice(error=errors.TopologyError("no shard has answered yet", field="shards"))
        started = bool(former) or self.registry.all_answered or self._has_waited_enough()
        wish = Wish(
            num_layers=model.facts.model.num_layers,
            min_blocks=num_needed_blocks(self._settings.kv_blocks),
            former=former,
            num_stages=self._settings.num_stages,
            may_load=may_load and started,
        )
        candidates = self.registry.own_candidates if is_extra else self.registry.candidates
        choice = choose_shards(candidates, wish)
        for stage in choice.loads:
            self.registry.load(stage.address, stage.layers)
        return choice

    def _has_waited_enough(self) -> bool:
        return time.monotonic() - self._started_s >= START_PATIENCE_S

    def _explained(self, error: errors.StagecoachError) -> errors.StagecoachError:
        """With what is wrong with the shards that could help; as an error for good where nothing can change by itself.

        That is before a pipeline was ever open, if all shards have said who they are, and those of no model make one.
        """
        reasons = list(dict.fromkeys(shard.reason for shard in self.registry.free if shard.reason))
        is_for_good = isinstance(error, errors.TopologyError) and self.registry.all_answered
        if is_for_good and self.registry.never_fits():
            mismatches = [shard.left_out for shard in self.registry.free if shard.left_out is not None]
            return mismatches[0] if mismatches else error
        if is_for_good and not reasons:
            return error
        more = [f"{len(reasons) - MAX_REASONS} more shards cannot take part"] if len(reasons) > MAX_REASONS else []
        return errors.Unavailable("; ".join(dict.fromkeys([*reasons[:MAX_REASONS], *more, str(error)])))

    async def _open(self, addresses: list[str], listener: PipelineListener) -> Pipeline:
        settings = self._settings
        self._epoch += 1
        taken = _TakenShards(self.registry, addresses, self._epoch, listener)
        try:
            with _a_matter_of_time():
                shards = await self._describe(addresses)
            _check_lanes(settings.lanes, len(shards))
            pipeline = Pipeline(shards, taken.epoch, taken, self._context)
            num_blocks = num_blocks_to_lease(settings.kv_blocks, shards)
            await _open_as_described(pipeline, num_blocks, settings.max_slots)
        except BaseException as error:
            taken.release(error)
            raise
        self.registry.pipeline_opened(shards[0])
        places = ", ".join(f"layers {stage.layers} at {stage.address}" for stage in pipeline.stages)
        logger.info("pipeline open in epoch %d: %s; %d K/V blocks", pipeline.epoch, places, num_blocks)
        return pipeline

    async def _describe(self, addresses: Sequence[str]) -> list[ShardDescription]:
        """As they are now: since they were last asked, others may have taken their blocks."""
        context = self._context
        asked = [
            describe(address, context.dial, lease_id=context.lease_id, timeout_s=context.faults.fault_timeout_s)
            for address in addresses
        ]
        shards = await together(asked)
        end = 0
        for shard in shards:
            self.registry.learn(shard)
            if (reason := self.registry.choice.why_not(shard)) is not None:
                raise reason
            if shard.layers is None or shard.layers.start != end:
                text = f"{shard.address} has other layers now: {shard.layers or 'none'}"
                raise errors.Unavailable(text, addresses=[shard.address])
            end = shard.layers.end
        return shards


class Connector:
    """Opens the pipelines of one replica, each time preferring the shards of the one before."""

    def __init__(self, manager: PipelineManager) -> None:
        self._manager = manager
        self._former: list[str] = []

    async def __call__(self, listener: PipelineListener) -> Pipeline:
        """Opens the next one. Raises as PipelineManager.connect."""
        pipeline = await self._manager.connect(self._former, listener)
        self._former = [stage.address for stage in pipeline.stages]
        return pipeline


class _TakenShards:
    """The shards of one pipeline: nobody else's until they are released, which they are when it is lost."""

    def __init__(
        self, registry: ShardRegistry, addresses: Sequence[str], epoch: int, listener: PipelineListener
    ) -> None:
        self.epoch = epoch
        self._registry = registry
        self._addresses = addresses
        self._listener = listener
        registry.take(addresses, epoch)

    def release(self, error: BaseException) -> None:
        """Gives them up, and quarantines those that the error names; all, where it names none.

        A shard may end its session with any error there is. What is none of ours ends it because we wanted that.
        """
        if isinstance(error, errors.StagecoachError) and not isinstance(error, NO_FAULT_OF_SHARDS):
            named = [address for address in self._addresses if address in error.addresses]
            self._registry.quarantine(named or self._addresses)
        self._registry.release(self._addresses, self.epoch)

    def result_came(self, result: shard_pb2.StepResult, payload: memoryview) -> None:
        self._listener.result_came(result, payload)

    def pipeline_lost(self, error: errors.StagecoachError) -> None:
        self.release(error)
        self._listener.pipeline_lost(error)


async def _open_as_described(pipeline: Pipeline, num_blocks: int, max_slots: int) -> None:
    """Opens a pipeline whose shards have just said who they are.

    Raises Unavailable where one of them is another by now: another router may have changed it, and asking helps.
    """
    with _a_matter_of_time():
        await pipeline.open(num_blocks=num_blocks, max_slots=max_slots)


@contextlib.contextmanager
def _a_matter_of_time() -> Iterator[None]:
    """Raises Unavailable for whatever a shard refuses us with: it may say anything, and be another one the next time.

    Of what is no shard's, our own settings and what there is of shards, only the manager speaks.
    """
    try:
        yield
    except errors.Unavailable:
        raise
    except errors.StagecoachError as error:
        raise errors.Unavailable(str(error), addresses=error.addresses) from error


def _check_lanes(lanes: int, num_stages: int) -> None:
    if 0 < lanes < num_stages:
        raise errors.ConfigError(
            f"lanes: {lanes} would leave some of {num_stages} stages idle", field="lanes", limit=num_stages, value=lanes
        )


def num_needed_blocks(wanted: int) -> int:
    """The K/V blocks without which no pipeline can be opened: those that are wanted, and one for the probe."""
    return max(wanted, 1) + 1


def num_blocks_to_lease(wanted: int, shards: Sequence[ShardDescription]) -> int:
    """What is free on every shard; of it, where so many are `wanted`, these and one for the probe.

    Raises KVCacheFull, also for more than there ever are: a shard that was started with more may come.
    """
    needed = num_needed_blocks(wanted)
    free_blocks = min(shard.facts.num_free_blocks for shard in shards)
    if free_blocks < needed:
        raise errors.KVCacheFull.of_blocks(needed=needed, free=free_blocks)
    return needed if wanted else min(free_blocks, MAX_LEASED_BLOCKS)
