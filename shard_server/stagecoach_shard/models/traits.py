"""In what the families of decoder-only models that we compute differ from one another."""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_shard.models.raw_config import RawConfig

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family's file makes of config.json."""

    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # an RMS norm over each query and key head, before the rotation
    windows: tuple[
        int | None, ...
    ]  # a layer's sliding window in positions, the token itself among them; None: all before it
    default_head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads


def refuse_fields(raw: RawConfig, why: str, *names: str) -> None:
    """Raises CheckpointError for any of `names` that is set to something."""
    for name in names:
        if raw.get(name) not in (None, False):
            raw.refuse(name, why)


def require_layer_types(raw: RawConfig, expected: str, num_layers: int) -> None:
    """Raises CheckpointError where config.json lists layer types other than `num_layers` times `expected`."""
    listed = raw.texts("layer_types")
    if listed is not None and listed != [expected] * num_layers:
        raw.refuse("layer_types", f"must be {num_layers} x {expected!r} for model_type {raw.get('model_type')!r}")


def windows_by_layer_type(raw: RawConfig, num_layers: int) -> tuple[int | None, ...]:
    """The windows of models that mix full and sliding layers as Qwen2 and Qwen3 do.

    With `layer_types` each layer says what it is; without, layers from `max_window_layers` on slide. Nothing slides
    unless `use_sliding_window` is set.
    """
    has_window = raw.boolean("use_sliding_window", False) and raw.get("sliding_window") is not None
    window = raw.integer("sliding_window") if has_window else None
    listed = raw.texts("layer_types")
    if listed is None:
        if window is None:
            return (None,) * num_layers
        first = raw.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(listed) != num_layers:
        raw.refuse("layer_types", f"must name {num_layers} layers; it names {len(listed)}", limit=num_layers)
    for kind in listed:
        if kind not in (FULL, SLIDING):
            raw.refuse("layer_types", f"may hold {FULL!r} and {SLIDING!r} only")
        if kind == SLIDING and window is None:
            raw.refuse("layer_types", "has sliding layers, and use_sliding_window and sliding_window set no window")
    return tuple(window if kind == SLIDING else None for kind in listed)
