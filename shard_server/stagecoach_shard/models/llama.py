"""Llama 2 and 3, SmolLM and others of model_type "llama": the plain decoder, optionally with biases."""

from __future__ import annotations

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.decoder_config import read_decoder, refuse_fields, same_window


def read_config(raw: RawConfig) -> ModelConfig:
    """`attention_bias` covers all four projections of the attention, `mlp_bias` all three of the MLP."""
    refuse_fields(raw, "sliding_window", "use_sliding_window")
    attention_bias = raw.boolean("attention_bias", False)
    return read_decoder(
        raw,
        windows=same_window(raw, None),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=raw.boolean("mlp_bias", False),
    )
