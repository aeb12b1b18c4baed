"""Llama 2 and 3, SmolLM and others of model_type "llama": the plain decoder, optionally with biases."""

from __future__ import annotations

from stagecoach_shard.models.raw_config import RawConfig
from stagecoach_shard.models.traits import FULL, Traits, refuse_fields, require_layer_types


def traits(raw: RawConfig, num_layers: int) -> Traits:
    """`attention_bias` covers all four projections of the attention, `mlp_bias` all three of the MLP."""
    refuse_fields(raw, "is not supported for model_type 'llama'", "sliding_window", "use_sliding_window")
    require_layer_types(raw, FULL, num_layers)
    attention_bias = raw.boolean("attention_bias", False)
    return Traits(
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=raw.boolean("mlp_bias", False),
        qk_norm=False,
        windows=(None,) * num_layers,
    )
