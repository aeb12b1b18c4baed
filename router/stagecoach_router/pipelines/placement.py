"""The best chain of shards for a pipeline, and which of them have to load other layers for it. Pure.

It is found by dynamic programming along the layers at which the shards' ranges begin and end, so that it takes time
that grows with their number and not with the number of chains. What is known of a chain's beginning is one tuple,
`_Beginning`, whose order is the order of preference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from stagecoach.errors import TopologyError
from stagecoach.topology import LayerRange, split_evenly


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shard that a pipeline could be made of."""

    address: str
    layers: LayerRange | None  # that it serves, or is loading; None: it has none yet
    assignable: bool  # may be given other layers
    num_blocks: int  # K/V blocks free, 0 where it has no layers
    is_quarantined: bool = False  # a pipeline was lost lately that it may have broken
    is_loading: bool = False


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of the pipeline to be: the shard, and the layers it has to have (loaded first where not its own now)."""

    address: str
    layers: LayerRange
    must_load: bool


class _Beginning(NamedTuple):
    """The stages from layer 0 up to some layer; the smaller is the better one."""

    num_loads: int = 0  # layers to load
    num_quarantined: int = 0  # shards
    preference: int = 0  # minus the number of shards to prefer that serve their own layers
    num_stages: int = 0
    narrowness: float = -math.inf  # minus the K/V blocks of the smallest stage that is served now
    addresses: tuple[str, ...] = ()  # in order of layers; _GAP where a shard has to load

    def with_shard(self, shard: Candidate, is_preferred: bool) -> _Beginning:
        """Goes on with a shard that serves its own layers."""
        return _Beginning(
            self.num_loads,
            self.num_quarantined + shard.is_quarantined,
            self.preference - is_preferred,
            self.num_stages + 1,
            max(self.narrowness, -shard.num_blocks),
            (*self.addresses, shard.address),
        )

    def with_gap(self, num_layers: int, *, is_new: bool) -> _Beginning:
        """Goes on with layers that have to be loaded: those of a new gap, or more of the one that it ends with."""
        return self._replace(
            num_loads=self.num_loads + num_layers,
            num_stages=self.num_stages + is_new,
            addresses=(*self.addresses, _GAP) if is_new else self.addresses,
        )


_GAP = ""


def find_chain(
    candidates: Sequence[Candidate],
    num_layers: int,
    *,
    prefer: Sequence[str] = (),
    num_stages: int = 0,
    may_load: bool = True,
) -> list[PlannedStage]:
    """The best chain of shards that covers [0, num_layers) exactly once, in order. Addresses differ from one another.

    Best is one in which nothing has to be loaded; then the least layers to load; then the fewest shards in
    quarantine for the loss of a pipeline; then the most shards of `prefer` (the addresses that the pipeline had
    before) that serve their layers now; then the fewest stages; then the most K/V blocks at the smallest stage;
    then the first in the order of addresses.

    Layers that no fitting shard serves are loaded, where `may_load`, by assignable shards: first by those without
    layers, then by those whose layers are not needed. Each gap is one shard's, or is cut for several without layers, as
    long as the chain has fewer stages than `num_stages` (0: than addresses in `prefer`). Where no shard's layers help,
    `num_stages` of the assignable shards (0: all that have no layers, or all, where each has some) split the model
    evenly.

    Raises TopologyError (field "shards"), naming the first layers that are missing, where there is no chain.
    """
    usable = [shard if may_load else replace(shard, assignable=False) for shard in candidates]
    serving = [shard for shard in usable if shard.layers is not None and shard.layers.end <= num_layers]
    spare = _spare(usable, prefer)
    best = _best(serving, num_layers, prefer, len(spare))
    if best is not None:
        # Which chain is first by address depends on how narrow a chain ends up, which its beginning does not tell: so
        # the search is made again among those shards that are wide enough, as if they were all the same.
        wide = [replace(shard, num_blocks=0) for shard in serving if shard.num_blocks >= -best.narrowness]
        best = _best(wide, num_layers, prefer, len(spare))
        assert best is not None, "the best chain is made of shards that are wide enough for it"
        by_address = {shard.address: shard for shard in serving}
        served = [by_address[address] for address in best.addresses if address != _GAP]
        return _fill_gaps(served, spare, num_layers, num_stages or len(prefer))
    pool = spare if num_stages else [shard for shard in spare if shard.layers is None] or spare
    count = num_stages or min(len(pool), num_layers)
    if 0 < count <= min(len(pool), num_layers):
        return [
            PlannedStage(shard.address, layers, shard.layers != layers)
            for shard, layers in zip(pool[:count], split_evenly(num_layers, count), strict=True)
        ]
    raise _missing(serving, num_layers)


def _spare(candidates: Sequence[Candidate], prefer: Sequence[str]) -> list[Candidate]:
    """The shards that may be given other layers, the one to take first in front."""
    places = {address: place for place, address in enumerate(prefer)}
    return sorted(
        (shard for shard in candidates if shard.assignable),
        key=lambda shard: (shard.layers is not None, places.get(shard.address, len(places)), shard.address),
    )


def _best(serving: Sequence[Candidate], num_layers: int, prefer: Sequence[str], num_spare: int) -> _Beginning | None:
    """The best chain in which at least one shard serves what it has. None: there is none.

    A state is a layer, whether the chain's last stage is a gap, which then goes on, and how many assignable shards are
    left: a gap takes one, and so does such a shard where it serves its own layers.
    """
    starting: dict[int, list[tuple[int, Candidate]]] = {}
    boundaries = {0, num_layers}
    for shard in serving:
        assert shard.layers is not None, "a shard that serves has layers"
        starting.setdefault(shard.layers.start, []).append((shard.layers.end, shard))
        boundaries |= {shard.layers.start, shard.layers.end}
    best: dict[tuple[int, bool], dict[int, _Beginning]] = {(0, False): {num_spare: _Beginning()}}

    def offer(layer: int, gap: bool, left: int, chain: _Beginning) -> None:
        states = best.setdefault((layer, gap), {})
        if left >= 0 and (left not in states or chain < states[left]):
            states[left] = chain

    for layer, following in pairwise(sorted(boundaries)):
        for gap in (False, True):
            for left, chain in _undominated(best.get((layer, gap), {})):
                for end, shard in starting.get(layer, ()):
                    offer(end, False, left - shard.assignable, chain.with_shard(shard, shard.address in prefer))
                longer = chain.with_gap(following - layer, is_new=not gap)
                offer(following, True, left if gap else left - 1, longer)
    ends = [chain for gap in (False, True) for chain in best.get((num_layers, gap), {}).values()]
    return min((chain for chain in ends if chain.num_loads < num_layers), default=None)


def _undominated(states: dict[int, _Beginning]) -> list[tuple[int, _Beginning]]:
    """Without those that are no better than another state with as many assignable shards left, or more."""
    kept: list[tuple[int, _Beginning]] = []
    for left, chain in sorted(states.items(), reverse=True):
        if not kept or chain < kept[-1][1]:
            kept.append((left, chain))
    return kept


def _fill_gaps(
    served: Sequence[Candidate], spare: Sequence[Candidate], num_layers: int, num_stages: int
) -> list[PlannedStage]:
    """The stages `served`, and the gaps between them cut so that there are `num_stages`, if so many shards are free."""
    stages = [PlannedStage(shard.address, shard.layers, False) for shard in served if shard.layers is not None]
    starts, ends = [stage.layers.start for stage in stages], [stage.layers.end for stage in stages]
    gaps = [(end, start) for end, start in zip([0, *ends], [*starts, num_layers], strict=True) if end < start]
    fillers = [shard for shard in spare if shard not in served]
    num_free = sum(shard.layers is None for shard in fillers)
    counts = [1] * len(gaps)
    for _ in range(min(num_free, num_stages - len(stages)) - len(gaps)):
        sizes = [(end - start) // count for (start, end), count in zip(gaps, counts, strict=True)]
        if max(sizes, default=0) > 1:
            counts[sizes.index(max(sizes))] += 1
    ranges = [
        LayerRange(start + part.start, start + part.end)
        for (start, end), count in zip(gaps, counts, strict=True)
        for part in split_evenly(end - start, count)
    ]
    stages += [PlannedStage(shard.address, layers, True) for shard, layers in zip(fillers, ranges, strict=False)]
    return sorted(stages, key=lambda stage: stage.layers)


def _missing(serving: Sequence[Candidate], num_layers: int) -> TopologyError:
    """Which layers nobody serves; or, where each is served, where no shard goes on."""
    ranges = sorted({shard.layers for shard in serving if shard.layers is not None})
    covered, reached = 0, {0}
    for layers in ranges:
        if layers.start > covered:
            break
        covered = max(covered, layers.end)
        if layers.start in reached:
            reached.add(layers.end)
    if covered < num_layers:
        following = min((layers.start for layers in ranges if layers.start > covered), default=num_layers)
        text = f"no shard serves layers {covered}:{following}"
    else:
        furthest = max(reached)
        overlap = max(layers.start for layers in ranges if layers.start < furthest < layers.end)
        text = f"layers {overlap}:{furthest} are served by more than one shard, and none begins at layer {furthest}"
    return TopologyError(text, field="shards", limit=f"0:{num_layers}")
