"""What shards without layers load ahead, so that whatever stage is lost, another shard has its layers already. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.placement import Candidate, PlannedStage


def plan_standbys(candidates: Sequence[Candidate], in_use: Iterable[LayerRange]) -> list[PlannedStage]:
    """Which of the free shards `candidates` are to load what, while nothing is lost.

    in_use: the layer ranges of all stages that serve now, as often as they do. Only those are loaded, so that what
    stands by fits what is there. A shard that has layers keeps them: another router may have given it these, and two
    that want different ones would take turns without end.

    Each takes the range that has the fewest shards to stand by for one that serves it; of several, that of the most
    layers, as it takes the longest to load; then the first.
    """
    num_serving = Counter(in_use)
    num_standing_by = Counter(
        shard.layers for shard in candidates if shard.layers in num_serving and not shard.is_quarantined
    )
    loads = []
    for shard in sorted(candidates, key=lambda shard: shard.address):
        if shard.layers is not None or not shard.assignable or shard.is_quarantined or not num_serving:
            continue
        layers = min(
            num_serving,
            key=lambda each: (num_standing_by[each] / num_serving[each], each.start - each.end, each.start),
        )
        num_standing_by[layers] += 1
        loads.append(PlannedStage(shard.address, layers, must_load=True))
    return loads
