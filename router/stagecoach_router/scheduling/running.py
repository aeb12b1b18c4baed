"""The sequences that run: which slot each has, and what it waits for. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.plan import Draft
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.scheduling.waiting_queue import by_order


class RunningSequences:
    """Sequences with a slot and blocks. Each is prefilled, is ready for its next decode, or awaits its token."""

    def __init__(self, blocks: BlockManager, max_running: int) -> None:
        self._blocks = blocks
        self._by_slot: list[Sequence | None] = [None] * max_running
        self._free_slots = list(range(max_running - 1, -1, -1))  # the last one is taken first
        self.prefilling: list[Sequence] = []  # by order
        self.ready: OrderedDict[Sequence, None] = OrderedDict()  # one token to compute; longest ready first

    def __len__(self) -> int:
        return len(self._by_slot) - len(self._free_slots)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._by_slot if sequence is not None)

    @property
    def num_free_slots(self) -> int:
        """How many more may run."""
        return len(self._free_slots)

    @property
    def num_decoding(self) -> int:
        """How many have been prefilled."""
        return len(self) - len(self.prefilling)

    def seat(self, sequence: Sequence) -> None:
        """A sequence that is first in order of all to be prefilled, and has its blocks, gets a slot."""
        sequence.slot = self._free_slots.pop()
        self._by_slot[sequence.slot] = sequence
        self.prefilling.insert(0, sequence)

    def unseat(self, sequence: Sequence) -> None:
        """Takes a sequence's slot and blocks; results of its steps are void from now on."""
        assert sequence.slot is not None
        self._by_slot[sequence.slot] = None
        self._free_slots.append(sequence.slot)
        self.ready.pop(sequence, None)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        # Nothing more is written to its blocks, also if its last position is still on its way.
        self._blocks.commit(sequence, sequence.num_computed)
        self._blocks.release(sequence)
        sequence.slot = None
        sequence.num_computed = sequence.num_reused = sequence.num_sent_blocks = 0
        sequence.awaiting_token = sequence.sampling = False
        sequence.incarnation += 1

    def resume(self, sequence: Sequence) -> None:
        """Makes a sequence ready again whose logits were handed out."""
        assert sequence.sampling, f"{sequence} has no logits to sample from"
        sequence.sampling = sequence.awaiting_token = False
        self.ready[sequence] = None

    def find_victim(self, sequence: Sequence, draft: Draft) -> Sequence | None:
        """The last in order of those after `sequence` that have no row in the draft and no token about to come."""
        if draft.victims is None:
            draft.victims = sorted(self, key=by_order)
        while draft.victims and draft.victims[-1].order > sequence.order:
            victim = draft.victims.pop()
            if victim not in draft.rows and not victim.sampling:
                return victim
        return None
