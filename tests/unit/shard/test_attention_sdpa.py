"""Paged attention against the definition, for any rows, windows and block sizes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import AttentionShape
from stagecoach_shard.attention.sdpa import SdpaAttention

CPU = torch.device("cpu")
HEAD_DIM = 8


def _batch(rows: list[tuple[int, int]], block_size: int) -> tuple[Batch, int]:
    """Rows of (start, num_tokens) over blocks in random order, and how many blocks there are."""
    needed = [-(-(start + count) // block_size) for start, count in rows]
    order = np.random.default_rng(1).permutation(sum(needed)).astype(np.int32)
    tables = np.full((len(rows), max(needed)), -1, dtype=np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum(needed) - needed, needed, strict=True)):
        tables[row, :count] = order[first : first + count]
    batch = Batch.build(
        starts=np.array([start for start, _ in rows]),
        num_tokens=np.array([count for _, count in rows]),
        block_tables=tables,
        block_size=block_size,
    )
    return batch, sum(needed)


def _expected(batch: Batch, cache: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """One query at a time, in float64."""
    group = queries.shape[1] // cache.shape[3]
    by_slot = cache.double().flatten(0, 1).permute(1, 2, 0, 3)
    outputs, token = [], 0
    for row, (start, end) in enumerate(zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)):
        for position in range(start, end):
            seen = np.arange(0 if window is None else max(0, position - window + 1), position + 1)
            slots = torch.from_numpy(
                batch.block_tables[row, seen // batch.block_size].astype(np.int64) * batch.block_size
                + seen % batch.block_size
            )
            keys, values = by_slot[:, :, slots].repeat_interleave(group, dim=1)
            scores = (keys @ queries[token].double().unsqueeze(-1)).squeeze(-1) / HEAD_DIM**0.5
            outputs.append((scores.softmax(-1).unsqueeze(1) @ values).flatten())
            token += 1
    return torch.stack(outputs)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from((0, 1, 3, 30, 200)), st.sampled_from((1, 1, 1, 2, 7, 140))), min_size=1, max_size=5
    ),
    block_size=st.sampled_from((1, 4, 16)),
    window=st.sampled_from((None, 1, 2, 5, 16, 130)),
    heads=st.sampled_from(((1, 1), (6, 2), (9, 3), (4, 1))),
)
def test_it_equals_the_definition(
    rows: list[tuple[int, int]], block_size: int, window: int | None, heads: tuple[int, int]
) -> None:
    num_heads, num_kv_heads = heads
    batch, num_blocks = _batch(rows, block_size)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(num_blocks, block_size, 2, num_kv_heads, HEAD_DIM, generator=generator)
    queries = torch.randn(batch.total_tokens, num_heads, HEAD_DIM, generator=generator)
    new_keys, new_values = torch.randn(2, batch.total_tokens, num_kv_heads, HEAD_DIM, generator=generator)
    shape = AttentionShape(num_heads, num_kv_heads, HEAD_DIM, window)
    step = SdpaAttention().prepare(batch, shape, torch.float32)
    step.write(cache, new_keys, new_values)
    assert torch.equal(cache.flatten(0, 1)[batch.cache_slots], torch.stack((new_keys, new_values), dim=1))
    attended = step.attend(cache, queries)
    torch.testing.assert_close(attended.double(), _expected(batch, cache, queries, window), atol=1e-5, rtol=0)


def test_many_decodes_of_very_different_lengths_keep_their_order() -> None:
    rows = [(start, 1) for start in (900, 3, 2000, 40, 1, 700, 41, 0)]
    batch, num_blocks = _batch(rows, 16)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(num_blocks, 16, 2, 3, HEAD_DIM, generator=generator)
    queries = torch.randn(8, 9, HEAD_DIM, generator=generator)
    step = SdpaAttention().prepare(batch, AttentionShape(9, 3, HEAD_DIM, None), torch.float32)
    attended = step.attend(cache, queries)
    torch.testing.assert_close(attended.double(), _expected(batch, cache, queries, None), atol=1e-5, rtol=0)


def _sdpa_calls(rows: list[tuple[int, int]]) -> tuple[int, int]:
    """How often torch's attention was called, and how often it chose its fused kernel."""
    batch, num_blocks = _batch(rows, 16)
    cache = torch.zeros(num_blocks, 16, 2, 3, 64, dtype=torch.bfloat16)
    queries = torch.zeros(batch.total_tokens, 9, 64, dtype=torch.bfloat16)
    step = SdpaAttention().prepare(batch, AttentionShape(9, 3, 64, None), torch.bfloat16)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        step.attend(cache, queries)
    calls = {event.key: event.count for event in profile.key_averages()}
    return (
        calls["aten::scaled_dot_product_attention"],
        calls.get("aten::_scaled_dot_product_flash_attention_for_cpu", 0),
    )


def test_it_runs_on_the_fused_kernel() -> None:
    """Torch falls back to a slow path without a word where it does not like its arguments."""
    called, fused = _sdpa_calls([(5, 1), (300, 1), (70, 200)])
    assert called == fused >= 3


def test_decodes_are_attended_to_together() -> None:
    assert _sdpa_calls([(100 + row, 1) for row in range(8)]) == (1, 1)
