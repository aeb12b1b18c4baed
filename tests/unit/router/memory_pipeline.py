"""A pipeline of no network with K/V memory that holds tokens, so that a wrong block, position or replay shows.

A row is written through its block table, and the token that comes back is a hash of all that is read back through it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from stagecoach.rpc.framing import read_frame
from stagecoach.v1 import shard_pb2 as pb
from tests.unit.router.fake_pipelines import BLOCK_SIZE, VOCAB_SIZE, FakePipeline

UNWRITTEN = -1


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % VOCAB_SIZE


class MemoryPipeline(FakePipeline):
    """Computes what its memory says. A new epoch finds the memory full of nonsense."""

    def __init__(self, num_blocks: int = 12) -> None:
        super().__init__(num_blocks)
        self.is_open = False
        self.num_losses = 0

    async def connect(self, listener: Any) -> Any:
        opened = await super().connect(listener)
        self._memory = np.full((self.num_blocks + 1) * BLOCK_SIZE, UNWRITTEN)
        self._tables: dict[int, list[int]] = defaultdict(list)
        self._results: list[tuple[pb.StepResult, bytes]] = []
        self.is_open = True
        opened.send = self._compute
        return opened

    def _compute(self, frame: bytes, expected_s: float | None) -> None:
        message, payload = read_frame(pb.MicroBatch, frame)
        header, tokens = message.header, np.frombuffer(payload, "<i4")
        assert header.epoch == self.epoch
        for update in header.block_table_updates:
            table = self._tables[update.slot]
            del table[update.first :]
            table.extend(update.block_ids)
        ends, first = [], 0
        rows = list(zip(header.row_slots, header.row_starts, header.row_num_tokens, strict=True))
        for slot, start, num_tokens in rows:
            for offset in range(num_tokens):
                self._memory[self._place(slot, start + offset)] = tokens[first + offset]
                ends.append((slot, start + offset))
            first += num_tokens
        result, payload_out = pb.StepResult(epoch=header.epoch, step=header.step), b""
        for group in header.outputs:
            chosen = [next_token(self._read(*ends[index])) for index in group.token_indices]
            result.outputs.add(num_rows=len(chosen), num_columns=1, candidates=True, dtype=1)
            payload_out += np.array(chosen, "<i4").tobytes() + np.ones(len(chosen), "<f4").tobytes()
        self._results.append((result, payload_out))

    def _place(self, slot: int, position: int) -> int:
        return self._tables[slot][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def _read(self, slot: int, last: int) -> list[int]:
        return [int(self._memory[self._place(slot, position)]) for position in range(last + 1)]

    def answer_one(self) -> bool:
        """The oldest step comes back. False: nothing is under way."""
        if not self.is_open or not self._results:
            return False
        result, payload = self._results.pop(0)
        self.listener.result_came(result, memoryview(payload))
        return True

    def break_down(self) -> None:
        self.is_open = False
        self.num_losses += 1
        super().break_down()


def expected_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]
