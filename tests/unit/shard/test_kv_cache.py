"""The K/V cache is one allocation of the size it says."""

from __future__ import annotations

import torch

from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.families import read_config

CONFIG = read_config(
    RawConfig(
        {
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "vocab_size": 100,
            "max_position_embeddings": 2048,
        }
    )
)
LAYERS = LayerRange(1, 4)


def test_all_layers_lie_in_one_allocation_of_zeros() -> None:
    cache = KVCache.allocate(
        CONFIG, LAYERS, num_blocks=5, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert [tuple(layer.shape) for layer in cache.layers] == [(5, 16, 2, 2, 24)] * 3
    assert len({layer.untyped_storage().data_ptr() for layer in cache.layers}) == 1
    assert cache.layers[0].untyped_storage().nbytes() == cache.total_bytes
    for index, layer in enumerate(cache.layers):
        assert not layer.any(), "layers overlap, or memory was not cleared"
        layer.fill_(index + 1)


def test_a_block_costs_what_the_cache_takes_for_it() -> None:
    a_block = KVCache.bytes_per_block(CONFIG, LAYERS, block_size=16, dtype=torch.float32)
    assert a_block == 3 * 2 * 2 * 16 * 24 * 4
    cache = KVCache.allocate(
        CONFIG, LAYERS, num_blocks=7, block_size=16, dtype=torch.float32, device=torch.device("cpu")
    )
    assert cache.total_bytes == 7 * a_block
