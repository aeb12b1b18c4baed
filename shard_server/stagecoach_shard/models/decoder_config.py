"""What the families of decoder-only models read alike in config.json. What would be computed wrongly is refused."""

from __future__ import annotations

from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.rope import read_rope

# Something is kept of each layer, so a number from a file has to be bounded.
MAX_LAYERS = 4096
# Frequencies are made of it before a tensor has shown that it is so. Real ones have 64 to 256.
MAX_HEAD_DIM = 1 << 16
FULL = "full_attention"
SLIDING = "sliding_attention"


def read_decoder(
    raw: RawConfig,
    *,
    windows: tuple[int | None, ...],
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """The configuration with the sizes and the rotation that config.json names; a family says the rest.

    `default_head_dim` holds where config.json has no head_dim; None: hidden_size / num_attention_heads. Raises
    CheckpointError with the field's name.
    """
    _refuse_unsupported(raw)
    hidden_size, num_heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    num_kv_heads = raw.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raw.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}", limit=num_heads)
    context_length = raw.integer("max_position_embeddings")
    return ModelConfig(
        family=raw.text("model_type"),
        num_layers=read_num_layers(raw),
        hidden_size=hidden_size,
        intermediate_size=raw.integer("intermediate_size"),
        vocab_size=raw.integer("vocab_size"),
        context_length=context_length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(raw, hidden_size, num_heads, default_head_dim),
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.boolean("tie_word_embeddings", False),
        rope=read_rope(raw, context_length),
        windows=windows,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def read_num_layers(raw: RawConfig) -> int:
    """How many layers the model has. Raises CheckpointError."""
    return raw.integer("num_hidden_layers", maximum=MAX_LAYERS)


def refuse_fields(raw: RawConfig, *names: str) -> None:
    """Raises CheckpointError for any of `names` that is set: the family does not have it."""
    for name in names:
        if raw.get(name) not in (None, False):
            raw.refuse(name, f"is not supported for model_type {raw.get('model_type')!r}")


def same_window(raw: RawConfig, window: int | None) -> tuple[int | None, ...]:
    """`window` for every layer. Raises CheckpointError where config.json lists layers of another type."""
    num_layers, expected = read_num_layers(raw), FULL if window is None else SLIDING
    listed = raw.texts("layer_types")
    if listed is not None and listed != [expected] * num_layers:
        raw.refuse("layer_types", f"must be {num_layers} x {expected!r} for model_type {raw.get('model_type')!r}")
    return (window,) * num_layers


def windows_by_layer_type(raw: RawConfig) -> tuple[int | None, ...]:
    """The windows of models that mix full and sliding layers as Qwen2 and Qwen3 do.

    Where there are `layer_types`, each layer says what it is; where not, layers from `max_window_layers` on slide.
    Nothing slides unless `use_sliding_window` is set. Raises CheckpointError.
    """
    num_layers = read_num_layers(raw)
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


def _refuse_unsupported(raw: RawConfig) -> None:
    if raw.get("quantization_config") is not None:
        raw.refuse("quantization_config", "is set, and quantized checkpoints are not supported")
    if raw.text("hidden_act", "silu") != "silu":
        raw.refuse("hidden_act", "must be 'silu'", limit="silu")
    architectures = raw.texts("architectures")
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raw.refuse("architectures", "must hold a causal language model, ...ForCausalLM")


def _head_dim(raw: RawConfig, hidden_size: int, num_heads: int, family_default: int | None) -> int:
    if raw.get("head_dim") is None and family_default is None and hidden_size % num_heads:
        raw.refuse("num_attention_heads", f"must divide hidden_size, {hidden_size}, as there is no head_dim")
    head_dim = raw.integer("head_dim", family_default or hidden_size // num_heads)
    if head_dim > MAX_HEAD_DIM:
        raw.refuse("head_dim", f"must be at most {MAX_HEAD_DIM}; it comes to {head_dim}", limit=MAX_HEAD_DIM)
    if head_dim % 2:
        raw.refuse("head_dim", f"must be even to be rotated in pairs; it comes to {head_dim}")
    return head_dim
