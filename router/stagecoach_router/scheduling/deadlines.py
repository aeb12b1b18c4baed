"""Which sequences have to be finished by when. Pure: the clock's reading comes in."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from stagecoach_router.scheduling.sequence import Sequence

# Entries of the heap that no deadline is behind any more, beyond as many as there are deadlines.
MAX_STALE_ENTRIES = 64


class Deadlines:
    """Sequences by deadline, in seconds of one clock. To set one costs the logarithm of how many there are."""

    def __init__(self) -> None:
        self._deadlines: dict[int, tuple[float, Sequence]] = {}  # by seq_id
        self._heap: list[tuple[float, int]] = []  # an entry counts while its deadline is the sequence's

    def __len__(self) -> int:
        return len(self._deadlines)

    @property
    def next_s(self) -> float | None:
        """The first deadline of all; None where there is none."""
        heap = self._heap
        while heap and not self._counts(*heap[0]):
            heappop(heap)
        return heap[0][0] if heap else None

    def set(self, sequence: Sequence, deadline_s: float) -> None:
        """The sequence's deadline from now on."""
        self._deadlines[sequence.seq_id] = (deadline_s, sequence)
        heappush(self._heap, (deadline_s, sequence.seq_id))
        if len(self._heap) > 2 * len(self._deadlines) + MAX_STALE_ENTRIES:
            self._heap = [(deadline_s, seq_id) for seq_id, (deadline_s, _) in self._deadlines.items()]
            heapify(self._heap)

    def discard(self, sequence: Sequence) -> float | None:
        """Takes a sequence's deadline away, if it has one; returns that."""
        deadline_s, _ = self._deadlines.pop(sequence.seq_id, (None, sequence))
        return deadline_s

    def take_expired(self, now_s: float) -> list[Sequence]:
        """Takes out the sequences whose deadline is `now_s` or before, the earliest first."""
        expired = []
        while (next_s := self.next_s) is not None and next_s <= now_s:
            _, seq_id = heappop(self._heap)
            expired.append(self._deadlines.pop(seq_id)[1])
        return expired

    def _counts(self, deadline_s: float, seq_id: int) -> bool:
        known = self._deadlines.get(seq_id)
        return known is not None and known[0] == deadline_s
