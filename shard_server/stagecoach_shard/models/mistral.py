"""Mistral: Llama without biases and, unless `sliding_window` is null, with the same window on every layer."""

from __future__ import annotations

from stagecoach_shard.models.raw_config import RawConfig
from stagecoach_shard.models.traits import FULL, SLIDING, Traits, refuse_fields, require_layer_types

# What transformers assumes where config.json does not mention the window at all; null there means none.
DEFAULT_WINDOW = 4096


def traits(raw: RawConfig, num_layers: int) -> Traits:
    """Refuses biases, which this family has not."""
    refuse_fields(raw, "is not supported for model_type 'mistral'", "attention_bias", "mlp_bias")
    window = None if raw.is_null("sliding_window") else raw.integer("sliding_window", DEFAULT_WINDOW)
    require_layer_types(raw, FULL if window is None else SLIDING, num_layers)
    return Traits(qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, windows=(window,) * num_layers)
