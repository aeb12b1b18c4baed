"""The router's heart: requests in, deltas of text out, over as many pipelines as there are.

A request is assigned to one replica, which computes it. When that one's pipeline is lost, the request moves at once to
another that is ready and has room for it; where there is none it waits, and goes on with whichever is ready first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Protocol

from stagecoach import errors
from stagecoach_router.engine.load_balancer import ReplicaLoad, choose_replica, relative_speeds
from stagecoach_router.engine.replica import Owner, Replica
from stagecoach_router.metrics.counters import ActiveTime, Counters
from stagecoach_router.requests.completion import Completion
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled, wanted_output
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# After an attempt to open a further pipeline that failed, and after many.
GROW_FIRST_DELAY_S = 1.0
GROW_MAX_DELAY_S = 30.0
# Of the largest pipeline's room: pipelines with less are not counted with where a request names no limit.
MIN_USUAL_CAPACITY = 0.5
# A suspect, which may be what breaks pipelines, moves to another only when its own has not come back for so long.
POISON_PATIENCE_S = 10.0
# A pipeline that is open has so long until its first token, before its requests move to another.
UNPROVEN_PATIENCE_S = 5.0

MakeReplica = Callable[[Owner], Replica]


class ShardSupply(Protocol):
    """Where the shards of further pipelines come from."""

    def is_ready_for(self, num_replicas: int) -> bool:
        """Whether there are shards for so many pipelines. All but the last of them are open."""

    def stand_by(self) -> None:
        """Nothing is lost, and no further pipeline wanted: those that are left get ready to take a lost one's place."""

    async def changed(self) -> None:
        """Returns when that may have changed."""


class Engine:
    """Generates for many requests over one pipeline or several.

    `make_replica` makes what runs one pipeline; `on_ready` is told when the first of them can generate, and when none
    can any more.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, make_replica: MakeReplica, on_ready: Callable[[bool], None]
    ) -> None:
        self.replicas: list[Replica] = []
        self.counters = Counters()
        self.active_time = ActiveTime()
        self.ready = False
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._make_replica = make_replica
        self._on_ready = on_ready
        self._next_seq_id = 1
        self._next_expiry: asyncio.TimerHandle | None = None

    @property
    def num_running(self) -> int:
        return sum(replica.scheduler.num_running for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        return sum(replica.scheduler.num_waiting for replica in self.replicas)

    @property
    def num_places(self) -> int:
        """How many sequences may run and wait."""
        return sum(replica.scheduler.max_running + replica.scheduler.max_waiting for replica in self.replicas)

    @property
    def capacity_tokens(self) -> int:
        """The most tokens, prompt and output, that a sequence may come to."""
        return max(self._capacities)

    def usual_capacity_tokens(self, num_prompt_tokens: int) -> int:
        """What a sequence that names no limit is taken to want: as much as fits wherever it may have to go.

        Where one pipeline has far less room than another, such sequences are for those that have more.
        """
        least = max(max(self._capacities) * MIN_USUAL_CAPACITY, num_prompt_tokens + 1)
        return min((each for each in self._capacities if each >= least), default=self.capacity_tokens)

    @property
    def _capacities(self) -> list[int]:
        return [replica.scheduler.blocks.capacity_tokens for replica in self.replicas]

    async def open_replica(self) -> Replica:
        """Opens one more pipeline. Raises what its `connect` raises. `run` has to run it."""
        replica = self._make_replica(self)
        await replica.open()
        self.replicas.append(replica)
        self.replica_changed(replica)  # a token may have come before it was one of us
        return replica

    async def run(self, shards: ShardSupply) -> None:
        """Keeps the pipelines open, and opens further ones when there are shards for them. Runs until cancelled.

        Whatever becomes of a further pipeline, those that are open go on.
        """
        async with asyncio.TaskGroup() as tasks:
            for replica in self.replicas:
                tasks.create_task(replica.run())
            delay_s = GROW_FIRST_DELAY_S
            while True:
                try:
                    # A replica that has lost its pipeline comes first, and looks for shards itself.
                    all_open = all(replica.is_open for replica in self.replicas)
                    if not (all_open and shards.is_ready_for(len(self.replicas) + 1)):
                        if all_open:
                            shards.stand_by()
                        await shards.changed()
                        continue
                    tasks.create_task((await self.open_replica()).run())
                    delay_s = GROW_FIRST_DELAY_S
                except Exception as error:
                    unforeseen = not isinstance(error, errors.StagecoachError)
                    text = "no further pipeline yet, next attempt in %g s: %s"
                    logger.warning(text, delay_s, error, exc_info=unforeseen)
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, GROW_MAX_DELAY_S)

    async def close(self) -> None:
        """Fails all requests, and closes the pipelines."""
        for replica in self.replicas:
            replica.fail_all(errors.Unavailable("the router is stopping"))
        self.work_changed()
        self._expire()  # no deadline is left
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    # ---- requests

    def check_room(self, num_sequences: int) -> None:
        """Raises Overloaded where `submit` would: before anything is spent on a request."""
        full: list[errors.Overloaded] = []
        now_s = time.monotonic()
        for replica in [replica for replica in self.replicas if replica.ready] or self.replicas:
            try:
                replica.scheduler.check_room(num_sequences, now_s)
            except errors.Overloaded as error:
                full.append(error)
            else:
                return
        raise min(full, key=lambda error: error.retry_after_s or 0.0)

    @property
    def retry_after_s(self) -> float:
        """The last estimate of when a refused caller may come again."""
        return min(replica.scheduler.retry_after_s for replica in self.replicas)

    def submit(self, state: RequestState, past: Many[Many[Sampled]] = ()) -> None:
        """Begins a request, or goes on with one that has had the tokens of `past`, by completion.

        Raises OutOfRange, and Overloaded for a new one, and then nothing was begun.
        """
        num_completions, most = state.request.params.n, None
        if past and not state.request.names_limit:  # in a former process there may have been more room
            room = self.usual_capacity_tokens(len(state.request.prompt_tokens)) - len(state.request.prompt_tokens)
            most = max(room, 0 if any(past) else 1)
        replica: Replica | None = None
        leader: Sequence | None = None
        try:
            # Once for all completions: where few tokens of a prompt have text, many of them have to be looked at.
            tail = self._tokenizer.prompt_tail(state.request.prompt_tokens)
            for index in range(num_completions):
                sequence = self._add_completion(state, most, leader, tail)
                if past and state.replay(index, past[index], most):
                    continue
                leader = leader or sequence
                replica = replica or self._assign_new(sequence, was_accepted=bool(past))
                replica.add(state, sequence, was_accepted=bool(past))
        except BaseException:  # also what nobody foresaw: else some of it would go on, for nobody
            self.cancel(state)
            raise
        self.counters.prompt_tokens += len(state.request.prompt_tokens) * num_completions
        if replica is not None:
            replica.dispatch()

    def cancel(self, request: RequestState) -> None:
        """Ends a request wherever it is; its blocks are free at once. Harmless for one that is finished."""
        for replica in self.replicas:
            replica.cancel(request)
            replica.dispatch()

    def set_deadline(self, request: RequestState, deadline_s: float | None) -> None:
        """When a request has to be finished, in seconds of time.monotonic(); None: whenever. It fails then."""
        for replica in self.replicas:
            replica.set_deadline(request, deadline_s)
        self._expire()

    def _expire(self) -> None:
        """Fails the requests whose deadline has passed, and comes back at the next deadline."""
        if self._next_expiry is not None:
            self._next_expiry.cancel()
            self._next_expiry = None
        now_s = time.monotonic()
        for replica in self.replicas:
            if replica.expire(now_s):
                replica.dispatch()
        deadlines = [replica.scheduler.next_deadline_s for replica in self.replicas]
        next_s = min((deadline_s for deadline_s in deadlines if deadline_s is not None), default=None)
        if next_s is not None:
            self._next_expiry = asyncio.get_running_loop().call_later(max(0.0, next_s - now_s), self._expire)

    def _add_completion(
        self, state: RequestState, most: int | None, leader: Sequence | None, prompt_tail: tuple[int, ...]
    ) -> Sequence:
        """Adds the next completion to a request; returns its sequence, which comes to `most` tokens, where given."""
        request, index = state.request, len(state.completions)
        assert request.params.seed is not None, "set where the request came in"
        sequence = Sequence(
            seq_id=self._next_seq_id,
            prompt_tokens=request.prompt_tokens,
            params=request.params if most is None else request.shortened(max(most, 1)).params,
            seed=request.params.seed,
            index=index,
            priority=request.priority,
            caller=state.caller_name,
            leader=leader,
            cache_salt=request.cache_salt,
            want=wanted_output(request.params, self._vocab_size),
        )
        self._next_seq_id += 1
        state.sequences.append(sequence)
        state.completions.append(Completion(index, prompt_tail, request.params, self._tokenizer))
        return sequence

    # ---- which replica computes what

    def _assign_new(self, sequence: Sequence, *, was_accepted: bool) -> Replica:
        """The replica that is to compute a new sequence, and those of the same request that follow it."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        speeds = relative_speeds([replica.token_s for replica in self.replicas])
        loads = [
            ReplicaLoad(
                num_sequences=replica.num_sequences,
                num_cached_tokens=replica.scheduler.blocks.num_cached_tokens(sequence),
                fits=replica.fits_new(sequence),
                has_room=was_accepted or replica.scheduler.has_room(sequence),
                ready=replica.ready,
                speed=speed,
                away_s=replica.unproven_s,
            )
            for replica, speed in zip(self.replicas, speeds, strict=True)
        ]
        chosen = choose_replica(loads)
        if chosen is None:  # then let the largest say what is too much
            return max(self.replicas, key=lambda replica: replica.scheduler.blocks.capacity_tokens)
        return self.replicas[chosen]

    def replica_changed(self, replica: Replica) -> None:
        """A replica has become ready, or has lost its pipeline: some requests may have to move."""
        if replica not in self.replicas:
            return
        ready = any(replica.ready for replica in self.replicas)
        if ready != self.ready:
            self.ready = ready
            self._on_ready(ready)
        changed = self._reassign()
        if replica.ready:
            changed |= self._share_waiting(replica)
        for each in changed:
            each.dispatch()
        if changed:
            self._expire()

    def find_room(self, replica: Replica, request: RequestState) -> None:
        """Moves a request that its replica has no room for any more to one that has, or had when it was open.

        Where there is none, one that names no limit ends where the largest has no more room, and any other fails.
        """
        others = [each for each in self.replicas if each is not replica and each.fits(request)]
        if others:
            other = min(others, key=lambda each: each.unproven_s)
            replica.move(request, other)
            other.dispatch()
            return
        capacity, has_begun = self.capacity_tokens, request.num_output_tokens > 0
        if not request.request.names_limit and (has_begun or len(request.request.prompt_tokens) < capacity):
            replica.shorten(request, capacity)
            if not replica.fits(request):
                self.find_room(replica, request)  # that is another one
        else:
            text = f"the pipeline came back with room for {capacity} tokens"
            replica.fail(request, errors.OutOfRange(text, field="max_tokens", limit=capacity))

    def _reassign(self) -> set[Replica]:
        """Moves requests from lost pipelines to those that are ready. Returns the replicas that this changed."""
        changed = set()
        speeds = relative_speeds([replica.token_s for replica in self.replicas])
        for lost in self.replicas:
            if lost.ready or (lost.is_open and lost.unproven_s < UNPROVEN_PATIENCE_S):
                continue
            for request in lost.requests:
                # It may be what broke one pipeline, and then another: it waits for this one rather than break a third.
                if request.is_suspect and lost.unproven_s < POISON_PATIENCE_S:
                    continue
                loads = [
                    ReplicaLoad(
                        num_sequences=replica.num_sequences,
                        num_cached_tokens=0,
                        fits=replica.ready and replica.fits(request),
                        ready=replica.ready,
                        speed=speed,
                    )
                    for replica, speed in zip(self.replicas, speeds, strict=True)
                ]
                chosen = choose_replica(loads)
                if chosen is not None:
                    lost.move(request, self.replicas[chosen])
                    changed |= {lost, self.replicas[chosen]}
        return changed

    def _share_waiting(self, newcomer: Replica) -> set[Replica]:
        """Moves requests that wait for a slot elsewhere to one that has become ready, the last ones in line first.

        Suspects stay: what they have to wait for is the next trial.
        """
        changed = set()
        for other in self.replicas:
            waiting = [] if other is newcomer else [each for each in other.waiting() if not each.is_suspect]
            while waiting and other.num_sequences > newcomer.num_sequences + len(waiting[-1].sequences):
                request = waiting.pop()
                if newcomer.fits(request):
                    other.move(request, newcomer)
                    changed |= {other, newcomer}
        return changed

    def work_changed(self) -> None:
        self.active_time.set(any(replica.scheduler.num_running for replica in self.replicas))
