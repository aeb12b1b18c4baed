"""The sequences that ran when their pipeline was lost: who is computed again first, and who by itself. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import chain

from stagecoach_router.scheduling.sequence import Sequence

# A suspect with a long log is computed in turns of so many steps, so that nobody beside it stands still for all of it.
# What it has computed stays in the prefix cache. As others may evict it, each turn is twice as long as the one before.
FIRST_TURN_STEPS = 16


class Replays:
    """Sequences that have lost their pipeline and have neither slot nor blocks.

    The one with the shortest log is first: so tokens come again soonest, and each loss leaves somebody further than
    before. Suspects are last, and are tried: one runs at a time while nobody else does, until it has made progress. So
    when the pipeline breaks, it is known who has broken it, and nobody beside it has lost anything but time. The others
    run between two trials for as many steps as a trial takes, so that many suspects do not stop everything.
    """

    def __init__(self) -> None:
        self._innocent: list[Sequence] = []
        self._suspects: list[Sequence] = []
        self._on_trial: Sequence | None = None
        self._num_owed = 0  # steps that the others have yet to get for the last turn's
        self._last_tried: Sequence | None = None
        self._turn_steps = FIRST_TURN_STEPS

    def __len__(self) -> int:
        return len(self._innocent) + len(self._suspects)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._innocent, self._suspects)

    @property
    def first(self) -> Sequence | None:
        """The next one of those that may run beside others."""
        return self._innocent[0] if self._innocent else None

    @property
    def first_suspect(self) -> Sequence | None:
        """The next one to be tried."""
        return self._suspects[0] if self._suspects else None

    @property
    def on_trial(self) -> Sequence | None:
        """The one that runs while nobody else may."""
        if self._on_trial is not None and (self._on_trial.slot is None or not self._on_trial.is_suspect):
            self._on_trial = None
        return self._on_trial

    @property
    def others_are_owed(self) -> bool:
        """Whether the last turn of a suspect took more steps than the others have had since."""
        return self._num_owed > 0

    @property
    def turn_is_over(self) -> bool:
        """Whether the one on trial has had as many steps as it may have before others get some."""
        return self._num_owed >= self._turn_steps

    def add(self, sequence: Sequence) -> None:
        """A sequence that has just stopped running, or was let go of by another pipeline's queue."""
        insort(self._suspects if sequence.is_suspect else self._innocent, sequence, key=_shortest_first)

    def discard(self, sequence: Sequence) -> bool:
        """Takes out a sequence, which may now run, or is not wanted any more. False: it is not here."""
        for queue in (self._innocent, self._suspects):
            if sequence in queue:
                queue.remove(sequence)
                return True
        return False

    def begin_trial(self, sequence: Sequence) -> None:
        """A suspect has a slot and blocks now."""
        self._turn_steps = 2 * self._turn_steps if sequence is self._last_tried else FIRST_TURN_STEPS
        self._on_trial, self._last_tried, self._num_owed = sequence, sequence, 0

    def stepped(self) -> None:
        """One more step was planned: of the sequence on trial, where there is one, else of others."""
        self._num_owed += 1 if self.on_trial is not None else -1 if self._num_owed else 0


def _shortest_first(sequence: Sequence) -> tuple[int, int, int]:
    return (-sequence.priority, sequence.num_tokens, sequence.seq_id)
