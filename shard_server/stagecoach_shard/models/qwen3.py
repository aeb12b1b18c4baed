"""Qwen3: query and key heads are normalised before they are rotated; optional attention biases."""

from __future__ import annotations

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.decoder_config import read_decoder, refuse_fields, windows_by_layer_type


def read_config(raw: RawConfig) -> ModelConfig:
    """A head has 128 numbers unless config.json says otherwise, whatever the hidden size."""
    refuse_fields(raw, "mlp_bias")
    attention_bias = raw.boolean("attention_bias", False)
    return read_decoder(
        raw,
        windows=windows_by_layer_type(raw),
        default_head_dim=128,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )
