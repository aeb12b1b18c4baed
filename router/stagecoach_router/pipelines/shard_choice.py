"""What to do for a pipeline that is to be: which shards to open it over now, and which to have load layers. Pure.

Shards that may have broken a pipeline lately are in quarantine: they are taken only where there are no others, and then
a spare is had load their layers, so that there soon are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from stagecoach.errors import StagecoachError, TopologyError, Unavailable
from stagecoach_router.pipelines.placement import Candidate, PlannedStage, find_chain


@dataclass(frozen=True, slots=True)
class Wish:
    """The pipeline that is wanted.

    min_blocks: free K/V blocks that each of its shards should have. former: the shards that it had before. num_stages:
    of a pipeline that had none before (0: as many as there are shards without layers). may_load: whether shards may be
    had load layers for it.
    """

    num_layers: int
    min_blocks: int
    former: Sequence[str] = ()
    num_stages: int = 0
    may_load: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do now.

    stages: the pipeline can be opened over these, none of which has to load; empty where it cannot, for the reason
    `error`. loads: shards that are to be told to load layers. is_second_choice: some of `stages` are in quarantine, and
    fewer will be when those that load have loaded.
    """

    stages: Sequence[PlannedStage] = ()
    loads: Sequence[PlannedStage] = ()
    is_second_choice: bool = False
    error: StagecoachError | None = None

    @property
    def addresses(self) -> list[str]:
        """The shards to open the pipeline over, in order."""
        return [stage.address for stage in self.stages]


def choose_shards(candidates: Sequence[Candidate], wish: Wish) -> Choice:
    """What to do to get the pipeline that is wished for."""
    answering = [shard for shard in candidates if not shard.is_loading]
    roomy = [shard for shard in answering if shard.layers is None or shard.num_blocks >= wish.min_blocks]
    loading = [shard for shard in candidates if shard.is_loading]
    stages = _find(roomy, wish)
    if isinstance(stages, TopologyError):
        loads = _plan_loads([*roomy, *loading], wish, without=()) if wish.may_load else None
        if loads is not None:
            return Choice(loads=loads, error=Unavailable("layers are being loaded"))
        # Those without room may have some by the time they are asked; else they say how much they lack.
        stages = _find(answering, wish)
        return Choice(error=stages) if isinstance(stages, TopologyError) else Choice(stages)
    quarantined = _quarantined(stages, candidates)
    if not quarantined:
        return Choice(stages)
    chosen = {stage.address for stage in stages}  # these are left alone
    others = [replace(shard, assignable=shard.assignable and shard.address not in chosen) for shard in roomy]
    loads = _replace_quarantined(quarantined, [*others, *loading], wish) if wish.may_load else ()
    better = _find([*_as_loading(roomy, loads), *loading], wish)
    is_second_choice = not isinstance(better, TopologyError) and len(_quarantined(better, candidates)) < len(
        quarantined
    )
    return Choice(stages, loads, is_second_choice)


def _find(candidates: Sequence[Candidate], wish: Wish) -> list[PlannedStage] | TopologyError:
    """A chain in which nobody has to load, or why there is none."""
    try:
        return find_chain(candidates, wish.num_layers, prefer=wish.former, may_load=False)
    except TopologyError as error:
        return error.with_traceback(None)


def _plan_loads(
    candidates: Sequence[Candidate], wish: Wish, *, without: Collection[str]
) -> Sequence[PlannedStage] | None:
    """Who has to load what for a chain without the shards `without`; None where there is none."""
    try:
        chain = find_chain(
            [shard for shard in candidates if shard.address not in without],
            wish.num_layers,
            prefer=wish.former,
            # One that was split over several shards is not to become a single shard's.
            num_stages=len(wish.former) or wish.num_stages,
        )
    except TopologyError:
        return None
    return [stage for stage in chain if stage.must_load]


def _replace_quarantined(
    quarantined: Sequence[str], candidates: Sequence[Candidate], wish: Wish
) -> Sequence[PlannedStage]:
    """Who has to load what to do without all that are in quarantine, or without one: a broken link is on both ends."""
    for without in [quarantined, *([address] for address in reversed(quarantined))]:
        loads = _plan_loads(candidates, wish, without=without)
        if loads is not None:
            return loads
    return ()


def _as_loading(candidates: Sequence[Candidate], loads: Sequence[PlannedStage]) -> list[Candidate]:
    """The candidates as they will be when `loads` have loaded."""
    layers = {stage.address: stage.layers for stage in loads}
    return [
        replace(shard, layers=layers[shard.address], assignable=False) if shard.address in layers else shard
        for shard in candidates
    ]


def _quarantined(stages: Sequence[PlannedStage], candidates: Sequence[Candidate]) -> list[str]:
    quarantined = {shard.address for shard in candidates if shard.is_quarantined}
    return [stage.address for stage in stages if stage.address in quarantined]
