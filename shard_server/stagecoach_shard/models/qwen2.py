"""Qwen2 and Qwen2.5: biases on query, key and value always; later layers may slide."""

from __future__ import annotations

from stagecoach_shard.models.raw_config import RawConfig
from stagecoach_shard.models.traits import Traits, refuse_fields, windows_by_layer_type


def traits(raw: RawConfig, num_layers: int) -> Traits:
    """The query, key and value biases are not optional here: a checkpoint without them is refused as it is loaded."""
    refuse_fields(raw, "is not supported for model_type 'qwen2'", "mlp_bias")
    return Traits(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=windows_by_layer_type(raw, num_layers),
    )
