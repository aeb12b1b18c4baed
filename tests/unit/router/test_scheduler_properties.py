"""Whatever comes in whatever order, the scheduler's plans make shards compute the right thing.

A simulated pipeline runs plans first in, first out, as shards do, and keeps for every position of its K/V memory which
tokens it was computed from. Before a row attends, all it can see has to be its own sequence's token log.
"""

import random
from collections import deque

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stagecoach.errors import OutOfRange, Overloaded
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.scheduling.sequence import Sequence

VOCABULARY = 2  # so that prompts often share prefixes


def identities(sequence):
    """For each position of the log, a number that stands for all tokens up to and with it."""
    result, identity = [], hash(sequence.cache_salt)
    for token in sequence.tokens(0, sequence.num_tokens):
        identity = hash((identity, token))
        result.append(identity)
    return result


class SimulatedPipeline:
    def __init__(self, block_size):
        self.block_size = block_size
        self.memory = {}  # (block, offset) -> identity
        self.tables = {}  # slot -> block ids
        self.queue = deque()

    def send(self, plan):
        logs = {row.slot: identities(row.sequence)[: row.start + row.num_tokens] for row in plan.rows}
        self.queue.append((plan, logs))

    def run_oldest(self):
        plan, logs = self.queue.popleft()
        for update in plan.block_table_updates:
            table = self.tables.setdefault(update.slot, [])
            assert update.first <= len(table), "a gap in the block table"
            table[update.first :] = update.block_ids
        for row in plan.rows:
            for position in range(row.start, row.start + row.num_tokens):
                self.memory[self.place(row, position)] = logs[row.slot][position]
        for row in plan.rows:
            for position, identity in enumerate(logs[row.slot]):
                assert self.memory.get(self.place(row, position)) == identity, f"{row} sees other tokens at {position}"
        return plan

    def place(self, row, position):
        return self.tables[row.slot][position // self.block_size], position % self.block_size


class World:
    """A scheduler, its pipeline and its callers, and what must always hold between them."""

    def __init__(self, *, num_blocks, block_size, max_batch_tokens, max_running, num_lanes, max_waiting=6):
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            num_lanes=num_lanes,
            context_length=24,
        )
        self.pipeline = SimulatedPipeline(block_size)
        self.live = {}  # seq_id -> sequence
        self.handed_out = []  # sequences whose logits came back
        self.abandoned = []  # plans of lost pipelines
        self.expected = {}  # (seq_id, incarnation) -> the position its next row starts at
        self.num_sent = {}  # (seq_id, incarnation) -> block table entries
        self.next_seq_id = 0

    def add(self, prompt, max_tokens, priority=0, leader=None, salt=b""):
        sequence = Sequence(
            seq_id=self.next_seq_id,
            prompt_tokens=tuple(prompt),
            params=SamplingParams(max_tokens=max_tokens),
            seed=0,
            priority=priority,
            leader=leader,
            cache_salt=salt,
        )
        self.next_seq_id += 1
        try:
            self.scheduler.add(sequence)
        except (Overloaded, OutOfRange):
            self.scheduler.remove(sequence)  # as a caller would who ends all siblings of a refused one
            return None
        self.live[sequence.seq_id] = sequence
        return sequence

    def running(self):
        return [sequence for sequence in self.live.values() if sequence.slot is not None]

    def schedule(self):
        before = self.running()
        held = [(block, sequence, sequence.incarnation) for sequence in before for block in sequence.block_ids]
        cached = dict(enumerate(self.blocks._digest_of))
        plan = self.scheduler.schedule()
        if before:
            first = min(before, key=lambda sequence: sequence.order)
            assert first.slot is not None or first.is_suspect, "the first in order was preempted"
        if plan is None:
            return None
        assert plan.rows
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows) <= self.scheduler.max_batch_tokens
        assert len({row.slot for row in plan.rows}) == len({row.sequence.seq_id for row in plan.rows}) == len(plan.rows)
        block_table_updates = {update.slot: update for update in plan.block_table_updates}
        assert len(block_table_updates) == len(plan.block_table_updates)
        assert block_table_updates.keys() <= {row.slot for row in plan.rows}, "a table was sent before it is needed"
        for row in plan.rows:
            self.check_row(row, block_table_updates.get(row.slot))
            for position in range(row.start, row.start + row.num_tokens):
                block = row.sequence.block_ids[position // self.blocks.block_size]
                assert not [
                    holder
                    for held_block, holder, incarnation in held
                    if held_block == block and holder is not row.sequence and holder.incarnation == incarnation
                ], "another sequence's block is written"
                # An idle one may have been evicted, written and cached again.
                was_held = any(held_block == block for held_block, _, _ in held)
                still_cached = cached.get(block) is not None and cached[block] == self.blocks._digest_of[block]
                assert not (was_held and still_cached), "a block in the prefix cache is written"
            self.check_trial(row, plan)
        self.pipeline.send(plan)
        return plan

    def check_trial(self, row, plan):
        if row.sequence.is_suspect:
            under_way = [each for sent, _ in self.pipeline.queue for each in sent.rows] + list(plan.rows)
            assert all(each.sequence is row.sequence for each in under_way), "a suspect has company"

    def check_row(self, row, update):
        sequence = row.sequence
        run = (sequence.seq_id, row.incarnation)
        end = row.start + row.num_tokens
        assert (row.slot, row.incarnation) == (sequence.slot, sequence.incarnation)
        assert row.num_tokens >= 1
        assert row.wants_logits == (end == sequence.num_tokens) == sequence.awaiting_token
        if run in self.expected:
            assert row.start == self.expected[run], "a position was left out or computed twice"
        else:
            assert row.start % self.blocks.block_size == 0
            assert row.start < sequence.num_tokens
            assert update is not None, "a slot was used with its former table"
        self.expected[run] = end
        if update is not None:
            assert update.block_ids
            assert update.first == self.num_sent.get(run, 0), "a block table entry was sent twice or left out"
            self.num_sent[run] = update.first + len(update.block_ids)
        assert self.num_sent[run] == len(sequence.block_ids)

    def complete(self):
        plan = self.pipeline.run_oldest()
        rows = self.scheduler.complete(plan)
        for row in rows:
            assert row.wants_logits
            assert row.sequence.seq_id in self.live
            assert row.start + row.num_tokens == row.sequence.num_tokens
            self.handed_out.append(row.sequence)
        assert self.scheduler.complete(plan) == [], "a step came back twice"

    def append(self, sequence, token, stop=False):
        self.handed_out.remove(sequence)
        sequence.got_token()
        self.scheduler.append_token(sequence, token)
        if stop or sequence.num_tokens == sequence.token_limit:
            self.remove(sequence)

    def repeat(self, sequence):
        self.handed_out.remove(sequence)
        self.scheduler.repeat(sequence)
        self.expected[sequence.seq_id, sequence.incarnation] -= 1

    def remove(self, sequence):
        self.scheduler.remove(sequence)
        self.scheduler.remove(sequence)
        del self.live[sequence.seq_id]
        if sequence in self.handed_out:
            self.handed_out.remove(sequence)

    def lose_pipeline(self):
        self.abandoned += [plan for plan, _ in self.pipeline.queue]
        for sequence in {row.sequence for plan, _ in self.pipeline.queue for row in plan.rows}:
            sequence.lost_pipeline(alone=False)
        self.pipeline = SimulatedPipeline(self.blocks.block_size)
        self.handed_out.clear()
        self.scheduler.preempt_all()
        assert self.scheduler.num_running == self.scheduler.num_in_flight == 0
        assert all(self.scheduler.complete(plan) == [] for plan in self.abandoned)

    def check(self):
        scheduler, running = self.scheduler, self.running()
        assert scheduler.num_in_flight == len(self.pipeline.queue) <= scheduler.num_lanes
        assert scheduler.num_running == len(running) <= scheduler.max_running
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)
        assert scheduler.has_work() == bool(self.live)
        assert len({sequence.slot for sequence in running}) == len(running)
        held = {}
        for sequence in running:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            for index, block in enumerate(sequence.block_ids):
                held.setdefault(block, []).append((sequence, index))
        assert len(held) + self.blocks.num_free == self.blocks.num_blocks, "a block was lost or given out twice"
        for sharers in held.values():
            ends = {
                (index, identities(sequence)[(index + 1) * self.blocks.block_size - 1])
                for sequence, index in sharers[1:]
            }
            ends |= {
                (index, identities(sequence)[(index + 1) * self.blocks.block_size - 1])
                for sequence, index in sharers[:1]
                if ends
            }
            assert len(ends) <= 1, "sequences of different tokens share a block"
            assert len(sharers) == 1 or all(index < sequence.num_committed for sequence, index in sharers)

    def drain(self):
        """Everything finishes, in a number of steps that does not depend on luck."""
        steps_left = 20 + 10 * self.scheduler.num_lanes * sum(s.token_limit for s in self.live.values())
        while self.live:
            steps_left -= 1
            assert steps_left, "starvation"
            for sequence in list(self.handed_out):
                self.append(sequence, sequence.num_tokens % VOCABULARY)
            while self.schedule() is not None:
                pass
            self.check()
            if self.live:
                assert self.pipeline.queue, "there is work, and nothing is scheduled"
                self.complete()
        assert self.blocks.num_free == self.blocks.num_blocks


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=14)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        max_running=st.integers(1, 5),
        num_lanes=st.integers(1, 3),
    )
    def start(self, **limits):
        self.world = World(**limits)

    @rule(prompt=prompts, max_tokens=st.integers(1, 10), priority=st.sampled_from([0, 0, 0, 1]), n=st.integers(1, 3))
    def add(self, prompt, max_tokens, priority, n):
        leader = self.world.add(prompt, max_tokens, priority)
        for _ in range(n - 1 if leader else 0):
            self.world.add(prompt, max_tokens, priority, leader)

    @rule()
    def schedule(self):
        self.world.schedule()

    @precondition(lambda self: self.world.pipeline.queue)
    @rule()
    def complete(self):
        self.world.complete()

    @precondition(lambda self: self.world.handed_out)
    @rule(data=st.data(), token=st.integers(0, VOCABULARY - 1), stop=st.sampled_from([False, False, True]))
    def append(self, data, token, stop):
        self.world.append(data.draw(st.sampled_from(self.world.handed_out)), token, stop)

    @precondition(lambda self: self.world.handed_out)
    @rule(data=st.data())
    def repeat(self, data):
        self.world.repeat(data.draw(st.sampled_from(self.world.handed_out)))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.remove(data.draw(st.sampled_from(list(self.world.live.values()))))

    @rule()
    def lose_pipeline(self):
        self.world.lose_pipeline()

    @invariant()
    def consistent(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(stateful_step_count=60, suppress_health_check=list(HealthCheck))
TestAnyOrderOfEvents = SchedulerMachine.TestCase


@given(seed=st.integers(0, 2**32))
def test_a_long_busy_time_leaves_everything_consistent(seed):
    """Much longer runs than the machine above makes, mostly of steps, with the pool under pressure."""
    rng = random.Random(seed)
    world = World(
        num_blocks=rng.randint(6, 16),
        block_size=rng.randint(1, 4),
        max_batch_tokens=rng.randint(1, 16),
        max_running=rng.randint(2, 6),
        num_lanes=rng.randint(1, 4),
    )
    for _ in range(250):
        event = rng.random()
        if event < 0.12:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 14))]
            priority, max_tokens, salt = rng.randrange(2), rng.randint(1, 14), rng.choice([b"", b"", b"tenant"])
            leader = world.add(prompt, max_tokens, priority, salt=salt)
            for _ in range(rng.choice([0, 0, 2]) if leader else 0):
                world.add(prompt, max_tokens, priority, leader, salt)
        elif event < 0.14 and world.live:
            world.remove(rng.choice(list(world.live.values())))
        elif event < 0.145:
            world.lose_pipeline()
        elif event < 0.45:
            world.schedule()
        elif event < 0.65 and world.pipeline.queue:
            world.complete()
        elif world.handed_out:
            sequence = rng.choice(world.handed_out)
            if rng.random() < 0.1:
                world.repeat(sequence)
            else:
                world.append(sequence, rng.randrange(VOCABULARY), stop=rng.random() < 0.05)
        world.check()
    world.drain()
