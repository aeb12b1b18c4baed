"""Layers by the CPU kernels, beside torch in float32 with the same bfloat16 weights and K/V."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_shard.attention.sdpa import SdpaAttention
from tests.unit.shard.native_layers import (
    BUILDS,
    FAMILIES,
    Computed,
    RoundedKV,
    distance,
    family,
    in_torch,
    make_batch,
    native,
    random_hidden,
)

# For the worst token: what float32 leaves is a thousandth of it, but a number of K/V here and there falls on the other
# side when it is rounded.
TOLERANCE = 1e-2
NUM_BLOCKS, BLOCK_SIZE = 260, 16
# Beginnings of blocks (16), of what is widened at a time (256), and of windows (7, 41, 300); and around them.
STARTS = (0, 0, 1, 6, 15, 16, 40, 90, 255, 256, 257, 300, 511, 530)
COUNTS = (1, 1, 1, 1, 2, 3, 13, 14, 40, 260)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[int, list[int], list[int]]]:
    """(first position, tokens of each step, blocks) of up to five sequences. Some share blocks before they start."""
    free, made = list(range(NUM_BLOCKS)), []
    draw(st.randoms(use_true_random=False)).shuffle(free)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.sampled_from(STARTS))
        counts = draw(st.lists(st.sampled_from(COUNTS), min_size=1, max_size=3))
        needed = -(-(start + sum(counts)) // BLOCK_SIZE)
        shared: list[int] = []
        if made and draw(st.booleans()):
            other_start, _, other_blocks = made[-1]
            shared = other_blocks[: min(start, other_start) // BLOCK_SIZE]
        made.append((start, counts, shared + [free.pop() for _ in range(needed - len(shared))]))
    return made


def written(made: list[tuple[int, list[int], list[int]]]) -> torch.Tensor:
    """Whether a place in the cache was written, bool [NUM_BLOCKS * BLOCK_SIZE]."""
    places = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bool)
    for start, counts, blocks in made:
        for position in range(start, start + sum(counts)):
            places[blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    return places.flatten()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_micro_batches_give_what_torch_gives_in_float32(name: str, build: str) -> None:
    config = family(name)
    ours = native(config, build, num_blocks=NUM_BLOCKS)
    reference = in_torch(config, torch.float32, attention=RoundedKV(), num_blocks=NUM_BLOCKS)

    @settings(max_examples=settings().max_examples // (8 if build == BUILDS[0] else 16))  # each computes a lot
    @given(made=sequences(), seed=st.integers(0, 1000))
    def check(made: list[tuple[int, list[int], list[int]]], seed: int) -> None:
        ours.fill(seed)
        reference.fill(seed)
        for step in range(3):
            rows = [
                (start + sum(counts[:step]), counts[step], blocks)
                for start, counts, blocks in made
                if step < len(counts)
            ]
            if rows:
                batch = make_batch(rows)
                hidden = random_hidden(batch.total_tokens, config, seed + step)
                assert distance(ours.forward(hidden, batch), reference.forward(hidden, batch)).max() <= TOLERANCE
        places = written(made)
        mine, theirs = ([layer.flatten(0, 1).float() for layer in each.cache.layers] for each in (ours, reference))
        # The first layer's is of the same numbers: to a unit in bfloat16's last place. Later ones differ as those do.
        torch.testing.assert_close(mine[0][places], theirs[0][places], rtol=2**-7, atol=1e-5)
        assert distance(mine[1][places].flatten(1), theirs[1][places].flatten(1)).max() <= TOLERANCE
        ours.fill(seed)
        for layer, before in zip(mine, ours.cache.layers, strict=True):
            assert torch.equal(layer[~places], before.flatten(0, 1)[~places].float())

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_nearer_to_float32_than_torch_in_bfloat16(name: str) -> None:
    config = family(name)
    exact = in_torch(config, torch.float32, attention=SdpaAttention())  # K/V in float32 too
    ours, theirs = native(config, BUILDS[0]), in_torch(config, torch.bfloat16, attention=SdpaAttention())
    long, short = list(range(40)), list(range(50, 60))
    steps = [
        make_batch([(0, 290, long), (0, 5, short)]),
        make_batch([(5, 1, short), (290, 37, long)]),
        *(make_batch([(327 + n, 1, long), (6 + n, 1, short)]) for n in range(12)),
    ]
    outputs: dict[str, list[torch.Tensor]] = {"exact": [], "ours": [], "theirs": []}
    for number, batch in enumerate(steps):
        hidden = random_hidden(batch.total_tokens, config, number)
        for key, computed in (("exact", exact), ("ours", ours), ("theirs", theirs)):
            outputs[key].append(computed.forward(hidden, batch))
    expected = torch.cat(outputs["exact"])
    our_error, their_error = (distance(torch.cat(outputs[key]), expected) for key in ("ours", "theirs"))
    assert their_error.square().mean() > 0
    assert our_error.square().mean() <= their_error.square().mean()
    assert our_error.max() <= 1.2 * their_error.max()
    for index, written in enumerate(exact.cache.layers):
        our_kv, their_kv = ((each.cache.layers[index].float() - written).norm() for each in (ours, theirs))
        assert our_kv <= 1.05 * their_kv


@pytest.mark.parametrize("name", ["llama-biases", "llama-3-to-1", "mistral-short-window", "qwen3-16-to-1"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_row_is_the_same_bit_for_bit_beside_any_others_and_on_two_threads(name: str, build: str) -> None:
    config = family(name)
    # Decodes of one key block and of several, and chunks of prompts, each in blocks of its own.
    rows, free = [], iter(range(260))
    for start, count in ((300, 1), (0, 1), (270, 33), (5, 1), (0, 14), (17, 1), (250, 2)):
        rows.append((start, count, [next(free) for _ in range(-(-(start + count) // BLOCK_SIZE))]))
    hidden = [random_hidden(count, config, seed) for seed, (_, count, _) in enumerate(rows)]
    computed = native(config, build, num_blocks=NUM_BLOCKS)

    def run(numbers: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        computed.fill(0)
        batch = make_batch([rows[number] for number in numbers])
        outputs = computed.forward(torch.cat([hidden[number] for number in numbers]), batch)
        return list(outputs.split([rows[number][1] for number in numbers])), computed.cache.layers[-1].clone()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run([number])[0][0] for number in range(len(rows))]
        everybody = list(range(len(rows)))
        written = run(everybody)[1]
        for num_threads, numbers in ((1, everybody), (1, [5, 0, 3]), (2, everybody), (2, everybody[::-1]), (2, [0])):
            torch.set_num_threads(num_threads)
            outputs, cache = run(numbers)
            for number, output in zip(numbers, outputs, strict=True):
                assert torch.equal(output, alone[number]), f"row {number} of {numbers} on {num_threads} threads"
                blocks = rows[number][2]
                assert torch.equal(cache[blocks], written[blocks])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("build", BUILDS)
def test_more_tokens_than_go_through_the_products_together(build: str) -> None:
    config = family("llama-3-to-1")
    ours = native(config, build, num_blocks=60)
    reference = in_torch(config, torch.float32, attention=RoundedKV(), num_blocks=60)
    batch = make_batch([(0, 700, list(range(44))), (9, 1, [50])])
    hidden = random_hidden(701, config, 0)
    for each in (ours, reference):
        each.fill(0)
    assert distance(ours.forward(hidden, batch), reference.forward(hidden, batch)).max() <= TOLERANCE


@pytest.mark.parametrize("block_size", [1, 3, 512])
def test_blocks_of_any_size(block_size: int) -> None:
    config = family("mistral-short-window")
    num_blocks = -(-600 // block_size)
    both: list[Computed] = [
        native(config, BUILDS[0], num_blocks=num_blocks, block_size=block_size),
        in_torch(config, torch.float32, attention=RoundedKV(), num_blocks=num_blocks, block_size=block_size),
    ]
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    for start, count in ((0, 280), (280, 1), (281, 9)):
        batch = make_batch([(start, count, blocks)], block_size=block_size)
        hidden = random_hidden(count, config, start)
        ours, expected = (each.forward(hidden, batch) for each in both)
        assert distance(ours, expected).max() <= TOLERANCE
