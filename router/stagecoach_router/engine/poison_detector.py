"""Which request breaks whatever computes it, if one does, and which only ran when something else broke. Pure.

A request that was being computed when a pipeline broke has broken it, or a process died of something else at that time.
One loss does not tell these apart. So whoever ran at two losses in a row is a suspect, and is computed alone from then
on (see scheduling/replays.py): a request that breaks pipelines breaks the next one alone, any other makes progress, and
is a suspect no more. Only who has broken pipelines alone is convicted. Once is not enough, as a process may die of
something else during a trial, too. How often is enough depends on how often the pipeline breaks without this request:
where that happens all the time, another loss says little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling.sequence import Sequence

# So many losses alone, in a row and without progress in between, are still an accident.
MAX_LOSSES_ALONE = 3
# Losses in which a request had no part speak for it, one each, if they are no older than this; but no more than so
# many, so that every request that breaks pipelines ends some time.
MEMORY_S = 60.0
MAX_LOSSES_WITHOUT = 8


@dataclass(frozen=True, slots=True)
class _Loss:
    at_s: float
    seq_ids: frozenset[int]  # of what was being computed


class PoisonDetector:
    """Watches the losses of one replica's pipelines."""

    def __init__(self) -> None:
        self._losses: deque[_Loss] = deque()

    def pipeline_lost(self, under_way: Mapping[RequestState, Many[Sequence]], now_s: float) -> RequestState | None:
        """A pipeline was lost at `now_s`, and these sequences had a row in it. Returns the request that is convicted.

        A sequence that only waited for a step cannot have broken anything.
        """
        while self._losses and self._losses[0].at_s < now_s - MEMORY_S:
            self._losses.popleft()
        sequences = [sequence for each in under_way.values() for sequence in each]
        self._losses.append(_Loss(now_s, frozenset(sequence.seq_id for sequence in sequences)))
        for sequence in sequences:
            sequence.lost_pipeline(alone=len(under_way) == 1)
        if len(under_way) != 1:
            return None
        [request] = under_way
        others = [loss for loss in self._losses if loss.seq_ids.isdisjoint(_ids(request))]
        if request.num_losses_alone <= MAX_LOSSES_ALONE + min(len(others), MAX_LOSSES_WITHOUT):
            return None
        self._losses = deque(others)  # the rest is explained, and speaks for nobody else
        return request


def _ids(request: RequestState) -> set[int]:
    return {sequence.seq_id for sequence in request.sequences}
