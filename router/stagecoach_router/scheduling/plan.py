"""What one step computes: rows of sequences, and the block-table updates that go before them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stagecoach_router.scheduling.sequence import Sequence


class Row(NamedTuple):
    """Positions [start, start + num_tokens) of a sequence's token log, to be computed in one step."""

    sequence: Sequence
    slot: int
    start: int
    num_tokens: int
    wants_logits: bool  # of the last of these positions
    incarnation: int


class BlockTableUpdate(NamedTuple):
    """A slot's block table from entry `first` on is now `block_ids`."""

    slot: int
    first: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step. Plans are sent in the order they were made, and every one of them is: the scheduler counts on it."""

    rows: tuple[Row, ...]  # at most one for each sequence
    block_table_updates: tuple[BlockTableUpdate, ...]  # to be applied before the rows run
    num_tokens: int


class Draft:
    """A plan that is being made. `room`: tokens that still fit; `logit_room`: rows that may still want logits."""

    __slots__ = ("block_table_updates", "logit_room", "room", "rows", "victims")

    def __init__(self, max_batch_tokens: int, max_logit_rows: int) -> None:
        self.room = max_batch_tokens
        self.logit_room = max_logit_rows
        self.rows: dict[Sequence, Row] = {}
        self.block_table_updates: list[BlockTableUpdate] = []
        self.victims: list[Sequence] | None = None  # who may be preempted, first in order first; made when needed
