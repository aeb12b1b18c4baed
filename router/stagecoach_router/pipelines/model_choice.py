"""Which model is a router's, where its shards have several: a shard may be of another one, or lie.

A pipeline needs all of its shards to agree. So it is the model of which there is a whole chain; of several such, the
one that the router's journal is of; then the one that most shards have; and of these the one of the shard that is
listed first. Pure, but for a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stagecoach.errors import StagecoachError, TopologyError
from stagecoach_router.pipelines.placement import Candidate, find_chain
from stagecoach_router.pipelines.shard_description import ShardDescription

# Small files that could not be used are not fetched again for so long, and those that could not be had.
UNUSABLE_S = 60.0
NOT_HAD_S = 5.0


class ModelChoice:
    """The router's model, from the first choice on. It may be chosen anew until it is `settled`.

    `reference` is a shard that has it; None: none was chosen yet. `fetches_files`: whether the router wants the small
    files of a shard, so that these have to agree. Once it has them, they may change on the shards.
    """

    def __init__(self, *, fetches_files: bool = True) -> None:
        self.reference: ShardDescription | None = None
        self._fetches_files = fetches_files
        self.settled = False
        self._expected_fingerprint = ""  # "": any
        self._rejected: dict[str, tuple[float, StagecoachError]] = {}  # small files by digest: until when, and why

    def expect(self, fingerprint: str) -> None:
        """The router has requests of the model with this fingerprint, left by a former one. "": it has none."""
        self._expected_fingerprint = fingerprint

    def is_expected(self, shard: ShardDescription) -> bool:
        """Whether this may be the model that the router had before."""
        return self._expected_fingerprint in ("", shard.facts.model.fingerprint)

    def choose(self, shards: Sequence[ShardDescription]) -> None:
        """Decides among what the shards say they have."""
        if not self.settled:
            self.reference = self.best_of(shards)

    def best_of(self, shards: Sequence[ShardDescription]) -> ShardDescription | None:
        """What the choice would be."""
        return choose_model(
            shards,
            files_matter=self._fetches_files,
            is_rejected=lambda shard: self._rejection(shard) is not None,
            is_expected=self.is_expected,
        )

    def fits(self, shard: ShardDescription, model: ShardDescription) -> bool:
        """Whether this shard is of that model."""
        return shard.mismatch(model, files_matter=self._fetches_files and not self.settled) is None

    def settle(self, shard: ShardDescription) -> None:
        """A pipeline is open, of which this is a shard: what its sequences come to is of this model, and no other."""
        self.reference = self.reference or shard
        self.settled = True

    def reject_files(self, digest: str, error: StagecoachError, for_s: float) -> None:
        """Its small files cannot be had, or used. Until they are tried again, it is no choice."""
        self._rejected[digest] = time.monotonic() + for_s, error.with_traceback(None)

    def why_not(self, shard: ShardDescription) -> StagecoachError | None:
        """Why this shard can be in no pipeline of ours. None: it can, as far as is known."""
        if self.reference is None:
            return self._rejection(shard)
        mismatch = shard.mismatch(self.reference, files_matter=self._fetches_files and not self.settled)
        return None if mismatch is None else self._rejection(shard) or mismatch

    def _rejection(self, shard: ShardDescription) -> StagecoachError | None:
        until_s, error = self._rejected.get(shard.facts.files_digest, (0.0, None))
        return error if not self.settled and time.monotonic() < until_s else None


def choose_model(
    shards: Sequence[ShardDescription],
    *,
    files_matter: bool = True,
    is_rejected: Callable[[ShardDescription], bool] = lambda shard: False,
    is_expected: Callable[[ShardDescription], bool] = lambda shard: True,
) -> ShardDescription | None:
    """A shard whose model it is; one that has the small files, where any has them. None: there are none to choose from.

    is_rejected: whether the small files of that shard are of no use. is_expected: whether its model is to be preferred.
    """
    groups: list[list[ShardDescription]] = []
    # Those with files first: the others go with any of them, and so stand in every group that they fit into.
    useful = [shard for shard in shards if not (shard.facts.files_digest and is_rejected(shard))]
    for shard in sorted(useful, key=lambda shard: not shard.facts.files_digest):
        fitting = [group for group in groups if shard.mismatch(group[0], files_matter=files_matter) is None]
        for group in fitting:
            group.append(shard)
        if not fitting:
            groups.append([shard])
    groups = [group for group in groups if not is_rejected(group[0])]
    if len(groups) <= 1:
        return groups[0][0] if groups else None
    places = {shard.address: place for place, shard in enumerate(shards)}
    best = max(
        groups,
        key=lambda group: (
            has_whole_chain(group),
            is_expected(group[0]),
            len(group),
            -min(places[shard.address] for shard in group),
        ),
    )
    return best[0]


def has_whole_chain(shards: Sequence[ShardDescription]) -> bool:
    """Whether these shards make a pipeline, those that can load layers included."""
    candidates = [
        Candidate(shard.address, shard.layers, shard.facts.assignable, shard.facts.num_free_blocks) for shard in shards
    ]
    try:
        find_chain(candidates, shards[0].facts.model.num_layers)
    except TopologyError:
        return False
    return True
