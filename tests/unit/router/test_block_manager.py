"""Block tables and the prefix cache."""

from __future__ import annotations

from array import array
from hashlib import blake2b

import pytest

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.scheduling.block_manager import DIGEST_BYTES, BlockManager
from stagecoach_router.scheduling.sequence import Sequence

BLOCK_SIZE = 4


def make_sequence(tokens: list[int], salt: bytes = b"") -> Sequence:
    return Sequence(seq_id=1, prompt_tokens=tuple(tokens), params=SamplingParams(), seed=0, cache_salt=salt)


def run_through(blocks: BlockManager, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Computes a prompt, lets it go again, and says which blocks it had."""
    sequence = make_sequence(tokens, salt)
    assert blocks.allocate(sequence)
    blocks.commit(sequence, len(tokens))
    block_ids = list(sequence.block_ids)
    blocks.release(sequence)
    return block_ids


def num_found(blocks: BlockManager, tokens: list[int], salt: bytes = b"") -> int:
    """How many blocks of a prompt are in the prefix cache."""
    sequence = make_sequence(tokens, salt)
    assert blocks.allocate(sequence)
    found = sequence.num_committed
    blocks.release(sequence)
    return found


def test_table_covers_the_whole_prompt():
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = make_sequence(list(range(9)))
    assert blocks.allocate(sequence)
    assert len(sequence.block_ids) == len(set(sequence.block_ids)) == 3
    assert blocks.num_free == 5


def test_same_prefix_is_found_and_shared():
    blocks = BlockManager(8, BLOCK_SIZE)
    first = make_sequence([*range(8), 100])
    assert blocks.allocate(first)
    blocks.commit(first, 9)
    second = make_sequence([*range(8), 200, 201])
    assert blocks.allocate(second)
    assert second.num_committed == 2
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert blocks.num_free == 8 - 4


def test_last_token_is_always_left_to_compute():
    blocks = BlockManager(8, BLOCK_SIZE)
    run_through(blocks, list(range(8)))
    assert num_found(blocks, list(range(8))) == 1
    assert num_found(blocks, list(range(9))) == 2


def test_block_that_is_not_full_is_not_found():
    blocks = BlockManager(8, BLOCK_SIZE)
    run_through(blocks, list(range(7)))
    assert num_found(blocks, list(range(12))) == 1


def test_block_is_not_found_behind_a_different_one():
    blocks = BlockManager(8, BLOCK_SIZE)
    run_through(blocks, [0, 1, 2, 3, 4, 5, 6, 7])
    assert num_found(blocks, [9, 1, 2, 3, 4, 5, 6, 7, 8]) == 0


def test_other_salt_shares_nothing():
    blocks = BlockManager(16, BLOCK_SIZE)
    run_through(blocks, list(range(9)), salt=b"a")
    assert num_found(blocks, list(range(9)), salt=b"b") == 0
    assert num_found(blocks, list(range(9)), salt=b"a") == 2


def test_salt_cannot_pose_as_tokens():
    """A caller who picks the salt must not reach another's blocks by making it look like their first block."""
    blocks = BlockManager(16, BLOCK_SIZE)
    run_through(blocks, list(range(9)))
    first_block = blake2b(digest_size=DIGEST_BYTES).digest() + array("I", range(4)).tobytes()
    assert num_found(blocks, [4, 5, 6, 7, 8], salt=first_block) == 0


def test_least_recently_released_goes_first():
    blocks = BlockManager(4, BLOCK_SIZE)
    run_through(blocks, [1] * 4)
    run_through(blocks, [2] * 4)
    run_through(blocks, [3] * 4)
    assert num_found(blocks, [1] * 5) == 1  # now the latest again; took the fourth block for its fifth token
    filler = make_sequence([9] * 8)
    assert blocks.allocate(filler)
    blocks.release(filler)
    assert [num_found(blocks, [token] * 5) for token in (1, 3, 2)] == [1, 1, 0]


def test_tail_of_a_prefix_is_evicted_before_its_head():
    blocks = BlockManager(4, BLOCK_SIZE)
    run_through(blocks, list(range(16)))
    filler = make_sequence([99] * 8)
    assert blocks.allocate(filler)
    blocks.release(filler)
    assert num_found(blocks, list(range(12))) == 2


def test_prefix_in_use_is_not_evicted():
    blocks = BlockManager(4, BLOCK_SIZE)
    holder = make_sequence(list(range(9)))
    assert blocks.allocate(holder)
    blocks.commit(holder, 9)
    assert not blocks.allocate(make_sequence([50] * 8))
    assert blocks.allocate(make_sequence([50] * 4))


def test_idle_prefix_counts_as_free_only_once():
    """Two idle blocks that are to be shared cannot at the same time be evicted for the rest of the prompt."""
    blocks = BlockManager(3, BLOCK_SIZE)
    run_through(blocks, list(range(8)))
    assert blocks.num_free == 3
    too_long = make_sequence(list(range(16)))
    assert not blocks.allocate(too_long)
    assert too_long.block_ids == []
    assert blocks.num_free == 3
    fits = make_sequence(list(range(12)))
    assert blocks.allocate(fits)
    assert fits.num_committed == 2
    assert blocks.num_free == 0


def test_reserve_is_left_free():
    blocks = BlockManager(4, BLOCK_SIZE)
    assert not blocks.allocate(make_sequence([1] * 8), reserve=3)
    assert blocks.allocate(make_sequence([1] * 8), reserve=2)


def test_extend_grows_by_whole_blocks_or_not_at_all():
    blocks = BlockManager(3, BLOCK_SIZE)
    sequence = make_sequence([1] * 4)
    assert blocks.allocate(sequence)
    assert blocks.extend(sequence, 4)
    assert len(sequence.block_ids) == 1
    assert blocks.extend(sequence, 5)
    assert len(sequence.block_ids) == 2
    assert not blocks.extend(sequence, 17)
    assert len(sequence.block_ids) == 2
    assert blocks.num_free == 1


def test_output_is_cached_like_a_prompt():
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = make_sequence([1, 2, 3])
    assert blocks.allocate(sequence)
    sequence.output_tokens += [4, 5, 6, 7, 8, 9]
    assert blocks.extend(sequence, 8)
    blocks.commit(sequence, 8)
    blocks.release(sequence)
    assert num_found(blocks, [*range(1, 9), 55]) == 2


def test_same_tokens_computed_twice_are_cached_once():
    blocks = BlockManager(8, BLOCK_SIZE)
    first, second = make_sequence([1] * 5), make_sequence([1] * 5)
    assert blocks.allocate(first)
    assert blocks.allocate(second)
    blocks.commit(first, 5)
    blocks.commit(second, 5)
    first_block = first.block_ids[0]
    blocks.release(second)
    third = make_sequence([1] * 5)
    assert blocks.allocate(third)
    assert third.block_ids[0] == first_block
    blocks.release(first)
    blocks.release(third)
    assert blocks.num_free == 8


def test_reset_forgets_contents():
    blocks = BlockManager(4, BLOCK_SIZE)
    run_through(blocks, list(range(8)))
    blocks.reset()
    assert blocks.num_free == 4
    assert num_found(blocks, list(range(9))) == 0


def test_reset_with_blocks_held_is_a_bug():
    blocks = BlockManager(4, BLOCK_SIZE)
    assert blocks.allocate(make_sequence([1]))
    with pytest.raises(AssertionError, match="1 blocks are held"):
        blocks.reset()


def test_log_slices_across_prompt_and_output():
    sequence = make_sequence([1, 2, 3])
    sequence.output_tokens += [4, 5]
    assert list(sequence.tokens(1, 3)) == [2, 3]
    assert list(sequence.tokens(2, 4)) == [3, 4]
    assert list(sequence.tokens(3, 5)) == [4, 5]
    assert sequence.num_tokens == 5
