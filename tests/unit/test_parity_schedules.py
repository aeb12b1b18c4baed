"""However a scheduler lays rows into micro-batches and blocks, a sequence's logits are those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stagecoach_shard.checkpoint import Checkpoint
from tests.unit.stage_chain import Running, StageChain
from tests.unit.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

TOLERANCE = 1e-4
LENGTHS = (37, 5, 23, 12)


@dataclass(frozen=True)
class Known:
    """A checkpoint, and four sequences with the logits that transformers computes for them."""

    checkpoint: Checkpoint
    token_ids: list[list[int]]
    logits: list[Tensor]

    def running(self, index: int, blocks: list[int]) -> Running:
        return Running(self.token_ids[index], blocks)

    def check(self, index: int, running: Running, first: int = 0) -> None:
        expected = self.logits[index][first : running.position]
        torch.testing.assert_close(running.stacked()[first:], expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(
    scope="module",
    params=["llama-9-heads-tied", "mistral-window", "qwen2-late-layers-slide", "qwen3-biases-layer-types"],
)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(folder, MODELS[request.param])
    # All begin with the same twelve tokens, three whole blocks, for prefixes to be shared.
    shared = random_tokens(12, seed=9)
    token_ids = [(shared + random_tokens(40, seed=10 + index))[:length] for index, length in enumerate(LENGTHS)]
    return Known(Checkpoint.open(folder), token_ids, [reference_logits(model, ids) for ids in token_ids])


def test_prefill_chunks_and_decodes_of_different_lengths_share_micro_batches(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 1, 3, 4])
    long, short, middle, late = (
        known.running(0, list(range(30, 40))),
        known.running(1, [7, 2]),
        known.running(2, [20, 3, 19, 4, 18, 5]),
        known.running(3, [40, 45, 41]),
    )
    chain.step((short, 4), (long, 20))
    chain.step((short, 1), (long, 1), (middle, 9))
    chain.step((middle, 1), (late, 11), (long, 1))
    chain.step((long, 1), (middle, 1), (late, 1))
    while middle.position < 23:
        chain.step((middle, 1), (long, 1))
    for index, running in enumerate((long, short, middle, late)):
        assert running.position > 4
        known.check(index, running)


def test_a_prefix_that_is_already_in_the_cache_need_not_be_computed_again(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 2, 4])
    first = known.running(0, list(range(10)))
    chain.step((first, 37))
    second = known.running(2, [0, 1, 2, 50, 51, 52])
    second.position, second.logits = 12, list(known.logits[2][:12])
    chain.step((second, 10), (known.running(3, [60, 61, 62]), 12))
    chain.step((second, 1))
    known.check(2, second, first=12)


def test_a_row_may_share_a_prefix_that_another_row_of_the_same_micro_batch_is_writing(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 2, 4])
    writer = known.running(0, list(range(10)))
    reader = known.running(2, [0, 1, 2, 50, 51, 52])
    reader.position, reader.logits = 12, list(known.logits[2][:12])
    decoding = known.running(3, [0, 1, 2])
    decoding.position, decoding.logits = 11, list(known.logits[3][:11])
    chain.step((reader, 11), (decoding, 1), (writer, 37))
    known.check(0, writer)
    known.check(2, reader, first=12)
    known.check(3, decoding, first=11)


def test_two_chunks_of_one_sequence_may_be_rows_of_one_micro_batch(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 4])
    blocks = list(range(20, 30))
    front, back = known.running(0, blocks), known.running(0, blocks)
    back.position, back.logits = 18, list(known.logits[0][:18])
    chain.step((front, 18), (back, 19))
    known.check(0, front)
    known.check(0, back, first=18)


def test_blocks_of_a_cancelled_sequence_may_hold_anything_when_they_are_used_again(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 2, 4])
    cancelled = known.running(0, list(range(10)))
    chain.step((cancelled, 30))
    chain.poison(range(10))  # as if it had overflowed
    running, other = known.running(2, [9, 8, 7, 6, 5, 4]), known.running(3, [0, 1, 2])
    chain.step((running, 14), (other, 3))
    while running.position < 23:
        chain.step((running, 1), (other, 1))
    known.check(2, running)
    known.check(3, other)


def test_a_preempted_sequence_is_computed_again_in_other_blocks_and_goes_on(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 2, 4])
    running = known.running(0, list(range(10)))
    chain.step((running, 19))
    chain.step((running, 1))
    chain.poison(range(10))
    running.blocks, running.position = list(range(60, 70))[::-1], 0
    chain.step((running, 20))
    while running.position < 37:
        chain.step((running, 1))
    known.check(0, running)


def test_a_row_that_starts_again_further_back_overwrites_what_was_rejected(known: Known) -> None:
    chain = StageChain(known.checkpoint, [0, 3, 4])
    running = known.running(0, list(range(10)))
    chain.step((running, 14))
    right = running.token_ids
    running.token_ids = [*right[:15], *(token ^ 1 for token in right[15:19]), *right[19:]]
    chain.step((running, 5))
    running.token_ids, running.position = right, 15
    chain.step((running, 3))
    chain.step((running, 1))
    known.check(0, running)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_into_rows_gives_the_same_logits(known: Known, data: st.DataObject) -> None:
    chain = StageChain(known.checkpoint, data.draw(st.sampled_from(([0, 4], [0, 1, 4], [0, 1, 2, 3, 4]))))
    blocks = data.draw(st.permutations(range(24)))
    sequences, taken = [], 0
    for index, length in enumerate(LENGTHS):
        needed = -(-length // chain.block_size)
        sequences.append(known.running(index, list(blocks[taken : taken + needed])))
        taken += needed
    while unfinished := [running for running in sequences if running.position < len(running.token_ids)]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique_by=id))
        chain.step(
            *(
                (running, min(data.draw(st.sampled_from((1, 1, 2, 5, 16))), len(running.token_ids) - running.position))
                for running in chosen
            )
        )
    for index, running in enumerate(sequences):
        known.check(index, running)
