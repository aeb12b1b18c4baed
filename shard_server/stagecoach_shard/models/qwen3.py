"""Qwen3: an RMS norm on every query and key head, a head size of its own, optional attention biases."""

from __future__ import annotations

from stagecoach_shard.models.raw_config import RawConfig
from stagecoach_shard.models.traits import Traits, refuse_fields, windows_by_layer_type


def traits(raw: RawConfig, num_layers: int) -> Traits:
    """A head has 128 numbers unless config.json says otherwise, whatever the hidden size."""
    refuse_fields(raw, "is not supported for model_type 'qwen3'", "mlp_bias")
    attention_bias = raw.boolean("attention_bias", False)
    return Traits(
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
        windows=windows_by_layer_type(raw, num_layers),
        default_head_dim=128,
    )
