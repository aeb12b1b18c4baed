"""Ways in which a scheduler lays rows into micro-batches and blocks. After each, logits are those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.models.families import open_checkpoint
from tests.unit.shard.stage_chain import CPU, Running, StageChain
from tests.unit.shard.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

TOLERANCE = 1e-4
LENGTHS = (37, 5, 23, 12)
# Of the tiny models' four layers: one, two, three and as many stages as there are layers, most of them uneven.
SPLITS = ([0, 4], [0, 2, 4], [0, 1, 4], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4])


@dataclass(frozen=True)
class Known:
    """A checkpoint, and four sequences with the logits that transformers computes for them."""

    checkpoint: Checkpoint
    token_ids: list[list[int]]
    logits: list[Tensor]

    @classmethod
    def make(cls, name: str, folder: Path) -> Known:
        """Writes the tiny model `name` into `folder`."""
        model = save_tiny_model(folder, MODELS[name])
        # All begin with the same twelve tokens, three whole blocks, for prefixes to be shared.
        shared = random_tokens(12, seed=9)
        token_ids = [(shared + random_tokens(40, seed=10 + index))[:length] for index, length in enumerate(LENGTHS)]
        return cls(open_checkpoint(folder), token_ids, [reference_logits(model, ids) for ids in token_ids])

    def chain(self, split: Sequence[int], device: torch.device = CPU) -> StageChain:
        """Stages with the boundaries `split`, all their K/V poisoned."""
        return StageChain(self.checkpoint, split, device=device)

    def running(self, index: int, blocks: list[int], *, cached: int = 0) -> Running:
        """Sequence `index`, the K/V of whose first `cached` tokens is in its blocks already."""
        return Running(self.token_ids[index], blocks, cached, list(self.logits[index][:cached]))

    def check(self, index: int, running: Running, first: int = 0) -> None:
        """Every logit from position `first` on."""
        assert running.position > first
        expected = self.logits[index][first : running.position]
        torch.testing.assert_close(running.stacked()[first:], expected, atol=TOLERANCE, rtol=0)


def one_whole_prompt_then_tokens(known: Known, chain: StageChain) -> None:
    running = known.running(0, [9, 3, 50, 4, 8, 1, 2, 60, 61, 5])
    chain.step((running, 31))
    while running.position < 37:
        chain.step((running, 1))
    known.check(0, running)


def prefill_chunks_and_decodes_share_micro_batches(known: Known, chain: StageChain) -> None:
    long, short = known.running(0, list(range(30, 40))), known.running(1, [7, 2])
    middle, late = known.running(2, [20, 3, 19, 4, 18, 5]), known.running(3, [40, 45, 41])
    chain.step((short, 4), (long, 20))
    chain.step((short, 1), (long, 1), (middle, 9))
    chain.step((middle, 1), (late, 11), (long, 1))
    chain.step((long, 1), (middle, 1), (late, 1))
    while middle.position < 23:
        chain.step((middle, 1), (long, 1))
    for index, running in enumerate((long, short, middle, late)):
        known.check(index, running)


def a_prefix_hit_beside_a_miss(known: Known, chain: StageChain) -> None:
    first = known.running(0, list(range(10)))
    chain.step((first, 37))
    hit, miss = known.running(2, [0, 1, 2, 50, 51, 52], cached=12), known.running(3, [60, 61, 62])
    chain.step((hit, 10), (miss, 12))
    chain.step((hit, 1))
    known.check(0, first)
    known.check(2, hit, first=12)
    known.check(3, miss)


def a_prefix_that_another_row_is_only_now_writing(known: Known, chain: StageChain) -> None:
    writer = known.running(0, list(range(10)))
    reader = known.running(2, [0, 1, 2, 50, 51, 52], cached=12)
    decoding = known.running(3, [0, 1, 2], cached=11)
    chain.step((reader, 11), (decoding, 1), (writer, 37))
    known.check(0, writer)
    known.check(2, reader, first=12)
    known.check(3, decoding, first=11)


def two_chunks_of_one_sequence_in_one_micro_batch(known: Known, chain: StageChain) -> None:
    blocks = list(range(20, 30))
    front, back = known.running(0, blocks), known.running(0, blocks, cached=18)
    chain.step((front, 18), (back, 19))
    known.check(0, front)
    known.check(0, back, first=18)


def blocks_of_a_cancelled_sequence_used_again(known: Known, chain: StageChain) -> None:
    cancelled = known.running(0, list(range(10)))
    chain.step((cancelled, 30))
    chain.poison(range(10))  # as if it had overflowed
    running, other = known.running(2, [9, 8, 7, 6, 5, 4]), known.running(3, [0, 1, 2])
    chain.step((running, 14), (other, 3))
    while running.position < 23:
        chain.step((running, 1), (other, 1))
    known.check(2, running)
    known.check(3, other)


def preempted_then_computed_again_in_other_blocks(known: Known, chain: StageChain) -> None:
    running = known.running(0, list(range(10)))
    chain.step((running, 19))
    chain.step((running, 1))
    chain.poison(range(10))
    running.blocks, running.position = list(range(60, 70))[::-1], 0
    chain.step((running, 20))
    while running.position < 37:
        chain.step((running, 1))
    known.check(0, running)


def preempted_then_computed_again_in_chunks_beside_decodes(known: Known, chain: StageChain) -> None:
    """Its blocks went to the sequences that it now runs beside, and it keeps the prefix that it shares with one."""
    running, other = known.running(0, list(range(10))), known.running(2, [0, 1, 2, 50, 51, 52], cached=12)
    chain.step((running, 24))
    chain.step((running, 1), (other, 1))
    chain.poison(range(3, 10))
    newcomer = known.running(3, [9, 3, 8])
    chain.step((newcomer, 7), (other, 1))
    running.blocks, running.position = [0, 1, 2, *range(70, 77)], 12
    for chunk in (5, 1, 4):
        chain.step((other, 1), (running, chunk), (newcomer, 1))
    while running.position < 37:
        chain.step((running, 3), *((decode, 1) for decode in (other, newcomer) if decode.position < 12))
    chain.step((other, 23 - other.position))
    known.check(0, running)
    known.check(2, other, first=12)
    known.check(3, newcomer)


def a_row_starts_further_back_than_it_was(known: Known, chain: StageChain) -> None:
    """Tokens that were rejected are overwritten."""
    running = known.running(0, list(range(10)))
    chain.step((running, 14))
    right = running.token_ids
    running.token_ids = [*right[:15], *(token ^ 1 for token in right[15:19]), *right[19:]]
    chain.step((running, 5))
    running.token_ids, running.position = right, 15
    chain.step((running, 3))
    chain.step((running, 1))
    known.check(0, running)


SCHEDULES: tuple[Callable[[Known, StageChain], None], ...] = (
    one_whole_prompt_then_tokens,
    prefill_chunks_and_decodes_share_micro_batches,
    a_prefix_hit_beside_a_miss,
    a_prefix_that_another_row_is_only_now_writing,
    two_chunks_of_one_sequence_in_one_micro_batch,
    blocks_of_a_cancelled_sequence_used_again,
    preempted_then_computed_again_in_other_blocks,
    preempted_then_computed_again_in_chunks_beside_decodes,
    a_row_starts_further_back_than_it_was,
)
