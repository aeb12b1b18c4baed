"""Qwen2 and Qwen2.5: biases on query, key and value always; later layers may have a sliding window."""

from __future__ import annotations

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.decoder_config import read_decoder, refuse_fields, windows_by_layer_type


def read_config(raw: RawConfig) -> ModelConfig:
    """The query, key and value biases are not optional here: a checkpoint without them is refused as it is loaded."""
    refuse_fields(raw, "mlp_bias")
    return read_decoder(raw, windows=windows_by_layer_type(raw), qkv_bias=True)
