"""Which sequence gets a slot and blocks next: one whose pipeline was lost, one on trial, or a newcomer. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.replays import Replays
from stagecoach_router.scheduling.running import RunningSequences
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.scheduling.waiting_queue import WaitingQueue, give_blocks


class Admission:
    """All sequences that do not run: those that have lost their pipeline, which go first, and the waiting queue."""

    def __init__(self, blocks: BlockManager, running: RunningSequences, max_waiting: int) -> None:
        self._blocks = blocks
        self._running = running
        self._waiting = WaitingQueue(blocks, max_waiting)
        self._replays = Replays()
        # Of `blocks`, when there were too few for a replay: until more come free, nobody else gets any either.
        self._blocked_at: int | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._replays)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._replays, self._waiting)

    @property
    def on_trial(self) -> Sequence | None:
        """The suspect that runs now, beside which nobody else may have a row under way."""
        return self._replays.on_trial

    @property
    def retry_after_s(self) -> float:
        """The last estimate of when a refused caller may come again."""
        return self._waiting.retry_after_s

    def check_room(
        self, *, num_sequences: int = 1, sequence: Sequence | None = None, now_s: float | None = None
    ) -> None:
        """Raises as WaitingQueue.check_room."""
        self._waiting.check_room(
            self._running.num_free_slots,
            num_sequences=num_sequences,
            sequence=sequence,
            num_ahead=len(self._replays),
            now_s=now_s,
        )

    # ---- who comes and goes

    def join(self, sequence: Sequence) -> None:
        """A new sequence, or one that was preempted for want of blocks."""
        self._waiting.join(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """A sequence that another pipeline's admission has released."""
        if sequence.incarnation or sequence.is_suspect:  # it has run: its caller has waited for long enough
            self._replays.add(sequence)
        else:
            self._waiting.adopt(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence that is not wanted any more."""
        if self._discard_replay(sequence):
            self._waiting.num_left += 1
        else:
            self._waiting.leave(sequence)

    def release(self, sequence: Sequence) -> None:
        """A sequence that goes to another pipeline."""
        if not self._discard_replay(sequence):
            self._waiting.release(sequence)

    def take_back_all(self) -> None:
        """The pipeline is lost, and with it what ran has its slots and blocks."""
        replays = [sequence for sequence in self._waiting if sequence.is_suspect]  # preempted, with rows under way
        for sequence in replays:
            self._waiting.release(sequence)
        for sequence in list(self._running):
            self._running.unseat(sequence)
            self._waiting.num_left -= 1
            replays.append(sequence)
        for sequence in replays:
            self._replays.add(sequence)
        self._blocked_at = None

    def _discard_replay(self, sequence: Sequence) -> bool:
        found = self._replays.discard(sequence)
        if found:
            self._blocked_at = None
        return found

    # ---- who starts

    def starting(self) -> list[Sequence]:
        """Those that may start with the next steps, as far as is known."""
        if self._replays.on_trial is not None or self._lacks_blocks():
            return []
        num_free_slots = self._running.num_free_slots
        num_replays = len(self._replays)
        num_waiting = self._waiting.num_starting(max(0, num_free_slots - num_replays))
        return [*islice(self._replays, num_free_slots), *islice(self._waiting, num_waiting)]

    def next_to_prefill(self) -> Sequence | None:
        """The first of those that are being prefilled and those that can be admitted; admits it."""
        running = self._running
        first = running.prefilling[0] if running.prefilling else None
        if not running.num_free_slots:
            return first
        newcomer = self._admit(first)
        if newcomer is None:
            return first
        running.seat(newcomer)
        return newcomer

    def _admit(self, first: Sequence | None) -> Sequence | None:
        """Gives somebody blocks who is to be prefilled before `first`, which is being prefilled now."""
        replay = self._replays.first
        if replay is None:
            if self._lacks_blocks():  # a suspect waits for them
                return None
            return self._waiting.admit(len(self._running), before=first.order if first else None)
        ahead = self._waiting.admit(
            len(self._running), before=min(replay.order, first.order) if first else replay.order
        )
        if ahead is not None or first is not None:  # one is computed to its end before the next begins
            return ahead
        if not self._give_blocks(replay):
            return None
        self._begin(replay)
        return replay

    # ---- trials

    @property
    def turn_is_over(self) -> bool:
        """Whether the suspect on trial gets no step now, as others are to have some as soon as its last is back."""
        suspect = self._replays.on_trial
        if suspect is None or suspect not in self._running.prefilling or not self._replays.turn_is_over:
            return False
        return len(self._running) > 1 or any(sequence.leader is None for sequence in self._waiting)

    def take_turns(self, num_in_flight: int) -> None:
        """Lets the next suspect run, if its turn has come, and stops the one that runs, if its turn is over.

        Suspects come after those others that the loss has put back, and take turns with everybody else.
        """
        replays, running = self._replays, self._running
        if self.turn_is_over and not num_in_flight and replays.on_trial is not None:
            self._put_back(replays.on_trial)
            return
        suspect = replays.first_suspect
        if suspect is None or replays.on_trial is not None or replays.first is not None or not running.num_free_slots:
            return
        if any(sequence.num_losses for sequence in running.prefilling):
            return
        is_idle = not (num_in_flight or running)
        if (is_idle or not replays.others_are_owed) and self._give_blocks(suspect, for_trial=True):
            self._begin(suspect)
            running.seat(suspect)
            replays.begin_trial(suspect)

    def end_trial(self, suspect: Sequence) -> None:
        """It cannot go on, as the others have the blocks that it needs: it has to wait until they let some go."""
        self._put_back(suspect)
        self._blocked_at = self._blocks.num_releases

    def _put_back(self, suspect: Sequence) -> None:
        self._running.unseat(suspect)
        self._replays.add(suspect)
        self._waiting.num_left -= 1

    def stepped(self) -> None:
        """One more step was planned."""
        self._replays.stepped()

    def _begin(self, replay: Sequence) -> None:
        self._replays.discard(replay)
        self._waiting.num_left += 1

    def _give_blocks(self, replay: Sequence, *, for_trial: bool = False) -> bool:
        """Blocks for a replay. On trial it needs one more to grow into, as nobody gives any back meanwhile."""
        if self._lacks_blocks():
            return False
        num_running = len(self._running)
        if not give_blocks(replay, self._blocks, num_running, least_reserve=int(for_trial and num_running > 0)):
            self._blocked_at = self._blocks.num_releases
            return False
        self._blocked_at = None
        return True

    def _lacks_blocks(self) -> bool:
        """Whether there were too few for a replay, and none were released since."""
        return self._blocked_at == self._blocks.num_releases
