"""What a router that is let in can do with micro-batches that its lease accepts, on layers that really compute.

The same ones run on K/V memory full of numbers that are none, and on memory full of others. Neither may show in a
result, and nothing outside of the lease's blocks may change.
"""

from __future__ import annotations

from pathlib import Path

import torch

from stagecoach.errors import InvalidArgument, StagecoachError
from stagecoach.topology import LayerRange
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.stage import Stage
from tests.fuzz.engine import Target
from tests.fuzz.lease_model import BLOCK_SIZE, EPOCH, FIRST_BLOCK, NUM_BLOCKS, make_lease
from tests.fuzz.lease_target import header, join, split
from tests.unit.shard.tiny_models import save_tiny_model

CPU = torch.device("cpu")
LAYERS = LayerRange(0, 2)
# A full layer and one with a window, in the sizes that the native layers take on any CPU.
SETTINGS = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
}


class _Others:
    """A stage and its memory, in which all blocks hold `value` before the lease begins."""

    def __init__(self, stage: Stage, value: float) -> None:
        self.stage = stage
        self.value = value
        self.cache = KVCache.allocate(
            stage.config,
            LAYERS,
            num_blocks=FIRST_BLOCK + NUM_BLOCKS + 2,
            block_size=BLOCK_SIZE,
            dtype=stage.dtype,
            device=CPU,
        )

    def results(self, headers: list[pb.MicroBatchHeader]) -> list[torch.Tensor]:
        """The logits of each micro-batch until one is refused. AssertionError where another's block has changed."""
        for layer in self.cache.layers:
            layer.fill_(self.value)
        before = [layer.clone() for layer in self.cache.layers]
        lease, results = make_lease(), []
        for message in headers:
            try:
                batch = lease.accept(message)
            except StagecoachError:
                break
            tokens = torch.arange(batch.total_tokens, dtype=torch.int32) + 7 * len(results)
            states = self.stage.forward(tokens, batch, self.cache)
            results.append(self.stage.logits(states).float())
        for layer, former in zip(self.cache.layers, before, strict=True):
            for blocks in (slice(0, FIRST_BLOCK), slice(FIRST_BLOCK + NUM_BLOCKS, None)):
                now, then = layer[blocks].view(torch.uint8), former[blocks].view(torch.uint8)
                assert torch.equal(now, then), "a block of another lease was written"
        return results


def isolation(scratch: Path) -> Target:
    save_tiny_model(scratch, SETTINGS)
    checkpoint = open_checkpoint(scratch)
    stages = [Stage.load(checkpoint, LAYERS, dtype=dtype, device=CPU) for dtype in (torch.float32, torch.bfloat16)]
    pairs = [(_Others(stage, torch.nan), _Others(stage, 3.0)) for stage in stages]

    def check(data: bytes) -> None:
        headers = list(split(data))
        for number, message in enumerate(headers, start=1):
            message.epoch, message.step = EPOCH, number  # what is accepted is what counts here
        num_results = 0
        for one, other in pairs:
            ours, theirs = one.results(headers), other.results(headers)
            for step, (expected, found) in enumerate(zip(ours, theirs, strict=True)):
                assert bool(torch.isfinite(found).all()), f"step {step} has no numbers ({found.dtype})"
                assert torch.equal(expected, found), f"step {step} shows what was in the memory ({one.stage.dtype})"
            num_results += len(ours)
        if not num_results:
            raise InvalidArgument("none of them")

    chunked = [
        header([(0, 0, 5)], [(0, 0, [3, 1])]),
        header([(0, 5, 1), (1, 0, 8)], [(1, 0, [0, 2])]),
        header([(0, 6, 1), (1, 8, 1)], [(1, 2, [5])]),
        header([(0, 2, 4)], []),
        header([(1, 9, 1), (0, 6, 1)], []),
    ]
    shared = [
        header([(0, 0, 8)], [(0, 0, [4, 6])]),
        header([(2, 8, 3), (0, 8, 1)], [(2, 0, [4, 6, 7]), (0, 2, [0])]),
        header([(1, 4, 4)], [(1, 0, [4, 5])]),
        header([(1, 3, 1), (2, 11, 1)], []),
    ]
    same_step = [
        header([(1, 4, 2), (0, 0, 6)], [(0, 0, [1, 2]), (1, 0, [1, 3])]),
        header([(0, 6, 9), (1, 6, 1)], [(0, 2, [1, 0])]),
        header([(0, 15, 1)], []),
    ]
    corpus = [join(headers) for headers in (chunked, shared, same_step)]
    return Target("isolation", corpus, check, share=2, max_input_bytes=4096)
