"""A lease that is sent one micro-batch header after the other, beside the model of it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from stagecoach.errors import InvalidArgument
from stagecoach.v1 import shard_pb2 as pb
from tests.fuzz.engine import Target
from tests.fuzz.lease_model import EPOCH, LeaseBesideModel

MAX_HEADERS = 12


def header(
    rows: list[tuple[int, int, int]], block_table_updates: list[tuple[int, int, list[int]]], **changes: int
) -> pb.MicroBatchHeader:
    """rows: (slot, start, tokens); block_table_updates: (slot, first, blocks)."""
    facts = {"epoch": EPOCH, "step": 1} | changes
    return pb.MicroBatchHeader(
        **facts,
        row_slots=[row[0] for row in rows],
        row_starts=[row[1] for row in rows],
        row_num_tokens=[row[2] for row in rows],
        block_table_updates=[
            pb.BlockTableUpdate(slot=slot, first=first, block_ids=ids) for slot, first, ids in block_table_updates
        ],
    )


def join(headers: list[pb.MicroBatchHeader]) -> bytes:
    parts = [header.SerializeToString() for header in headers]
    return b"".join(struct.pack("<H", len(part)) + part for part in parts)


def split(data: bytes) -> Iterator[pb.MicroBatchHeader]:
    """The headers in it; what is none is passed over."""
    for _ in range(MAX_HEADERS):
        if len(data) < 2:
            return
        (length,) = struct.unpack_from("<H", data)
        part, data = data[2 : 2 + length], data[2 + length :]
        with contextlib.suppress(DecodeError):
            yield pb.MicroBatchHeader.FromString(part)


def _check(data: bytes) -> None:
    both = LeaseBesideModel()
    num_accepted = 0
    for message in split(data):
        if message.step < 100:  # else nearly all would be refused for it
            message.step = both.next_step
        num_accepted += both.take(message)
    if not num_accepted:
        raise InvalidArgument("none of them")


def lease(scratch: Path) -> Target:
    chunked = [
        header([(0, 0, 5)], [(0, 0, [3, 1])]),
        header([(0, 5, 1), (1, 0, 8)], [(1, 0, [0, 2])]),
        header([(0, 6, 1), (1, 8, 1)], [(1, 2, [5])]),
    ]
    shared = [
        header([(0, 0, 8)], [(0, 0, [4, 6])]),
        header([(2, 8, 3), (0, 8, 1)], [(2, 0, [4, 6, 7]), (0, 2, [0])]),
        header([(1, 4, 4)], [(1, 0, [4, 5])]),
    ]
    same_step = [header([(1, 4, 2), (0, 0, 6)], [(0, 0, [1, 2]), (1, 0, [1, 3])])]
    return Target("lease", [join(chunked), join(shared), join(same_step)], _check, share=12, max_input_bytes=4096)
