"""What the prefix cache gives up under pressure: the least recently used, and never a block before those behind it."""

from hypothesis import given
from hypothesis import strategies as st

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.sequence import Sequence

BLOCK_SIZE = 2


class Watched:
    """A block manager, and what an LRU cache of chains would hold: when each chain was last let go of."""

    def __init__(self, num_blocks):
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.running = []
        self.chains = {}  # digest -> (digest of the block before, or None)
        self.released_at = {}  # digest -> (time, depth from the end), of the latest sequence that had it
        self.time = 0

    def start(self, tokens):
        sequence = Sequence(seq_id=0, prompt_tokens=tokens, params=SamplingParams(), seed=0)
        before = self.idle()
        if not self.blocks.allocate(sequence):
            assert self.idle() == before
            return
        self.check_evicted(before)
        self.running.append(sequence)

    def compute(self, index, output):
        """Commits a sequence that runs: others may have started with the same tokens meanwhile. Then it grows."""
        sequence = self.running[index % len(self.running)]
        self.commit(sequence)
        before = self.idle()
        if self.blocks.extend(sequence, sequence.num_tokens + len(output)):
            sequence.output_tokens += output
            self.check_evicted(before)
            self.commit(sequence)

    def commit(self, sequence):
        self.blocks.commit(sequence, sequence.num_tokens)
        for parent, digest in zip([None, *sequence.digests], sequence.digests, strict=False):
            self.chains[digest] = parent

    def end(self, index):
        sequence = self.running.pop(index % len(self.running))
        self.time += 1
        for depth, digest in enumerate(sequence.digests[: sequence.num_committed]):
            self.released_at[digest] = (self.time, -depth)
        self.blocks.release(sequence)

    def idle(self):
        return {self.blocks._digest_of[block] for block in self.blocks._idle}

    def check_evicted(self, before):
        """What went is older than all that stayed."""
        evicted = {digest for digest in before if digest not in self.blocks._block_of}
        stayed = self.idle() & before
        if evicted and stayed:
            assert max(self.released_at[digest] for digest in evicted) < min(
                self.released_at[digest] for digest in stayed
            )

    def check(self):
        blocks = self.blocks
        assert blocks.num_free + sum(map(bool, blocks._num_holders)) == blocks.num_blocks
        assert {blocks._digest_of[block] for block in blocks._block_of.values()} == set(blocks._block_of)
        order = {blocks._digest_of[block]: place for place, block in enumerate(blocks._idle)}
        for digest, place in order.items():
            parent = self.chains[digest]
            if parent is not None:
                assert parent in blocks._block_of, "a block can no longer be found"
                assert order.get(parent, len(order)) > place, "a block would go before one behind it"


chains = st.lists(st.integers(0, 1), min_size=1, max_size=11)
steps = st.tuples(st.sampled_from(["start", "compute", "end"]), chains, st.integers(0, 3), st.integers(0, 10))
events = st.lists(steps, min_size=1, max_size=40)


@given(num_blocks=st.integers(2, 14), events=events)
def test_under_pressure_the_longest_unused_goes_first_and_a_tail_before_its_head(num_blocks, events):
    watched = Watched(num_blocks)
    for event, tokens, num_output, index in events:
        if event == "start" or not watched.running:
            watched.start(tokens)
        elif event == "compute":
            watched.compute(index, [1] * num_output)
        else:
            watched.end(index)
        watched.check()
    while watched.running:
        watched.end(0)
        watched.check()
    assert watched.blocks.num_free == num_blocks


def run_through(blocks, *prompts):
    """Computes prompts at the same time; none of them finds another one's blocks."""
    sequences = [Sequence(seq_id=0, prompt_tokens=tokens, params=SamplingParams(), seed=0) for tokens in prompts]
    assert all(blocks.allocate(sequence) for sequence in sequences)
    for sequence in sequences:
        blocks.commit(sequence, sequence.num_tokens)
    return sequences


def test_what_follows_a_repeated_prompt_is_not_kept_longer_than_the_prompt():
    """The last block of a prompt is computed again each time, and what comes next is found through that."""
    blocks = BlockManager(4, BLOCK_SIZE)
    blocks.release(*run_through(blocks, [1, 2, 3, 4]))
    [again] = run_through(blocks, [1, 2, 3, 4])
    again.output_tokens += [5, 6]
    assert blocks.extend(again, 6)
    blocks.commit(again, 6)
    again_blocks = list(again.block_ids)
    blocks.release(again)
    assert len(blocks._idle) == 3
    for filler in run_through(blocks, [9, 9], [8, 8]):
        blocks.release(filler)
    [third] = run_through(blocks, [1, 2, 3, 4, 5, 6, 7])
    assert third.num_committed == 3, "the tail went and was computed anew, and the first two blocks stayed"
    assert third.block_ids[:2] == again_blocks[:2]


def test_a_block_computed_twice_at_a_time_serves_when_the_first_copy_is_gone():
    blocks = BlockManager(4, BLOCK_SIZE)
    first, second = run_through(blocks, [1, 2], [1, 2, 3, 4])
    second_blocks = list(second.block_ids)
    blocks.release(first)
    fillers = run_through(blocks, [9], [8])
    assert len(blocks._block_of) == 1, "the first copy was not evicted"
    for sequence in (second, *fillers):
        blocks.release(sequence)
    [third] = run_through(blocks, [1, 2, 3, 4, 5])
    assert third.block_ids[:2] == second_blocks
