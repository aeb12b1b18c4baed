"""Mistral: Llama without biases and, unless `sliding_window` is null, with the same window on every layer."""

from __future__ import annotations

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.decoder_config import read_decoder, refuse_fields, same_window

# What transformers assumes where config.json does not mention the window at all; null there means none.
DEFAULT_WINDOW = 4096


def read_config(raw: RawConfig) -> ModelConfig:
    """Refuses biases, as transformers would not compute them for this family."""
    refuse_fields(raw, "attention_bias", "mlp_bias")
    window = None if raw.is_null("sliding_window") else raw.integer("sliding_window", DEFAULT_WINDOW)
    return read_decoder(raw, windows=same_window(raw, window))
