"""What a checkpoint's config.json says of the model, in our words, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_shard.models import llama, mistral, qwen2, qwen3
from stagecoach_shard.models.raw_config import RawConfig
from stagecoach_shard.models.rope import RopeConfig
from stagecoach_shard.models.traits import Traits

_FAMILIES: dict[str, Callable[[RawConfig, int], Traits]] = {
    "llama": llama.traits,
    "mistral": mistral.traits,
    "qwen2": qwen2.traits,
    "qwen3": qwen3.traits,
}


# Something is kept of each.
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model: pre-norm layers of grouped-query attention and a SiLU-gated MLP."""

    family: str  # config.json's model_type
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int  # the most positions a sequence may have
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    traits: Traits

    @classmethod
    def parse(cls, fields: dict[str, object]) -> ModelConfig:
        """Reads config.json's object.

        Raises CheckpointError with the field's name for anything missing, wrong or not supported: what would be
        computed wrongly is refused.
        """
        raw = RawConfig(fields)
        family = raw.text("model_type")
        if family not in _FAMILIES:
            raw.refuse("model_type", f"must be one of {', '.join(_FAMILIES)}", limit=", ".join(_FAMILIES))
        _refuse_unsupported(raw)
        num_layers = raw.integer("num_hidden_layers", maximum=MAX_LAYERS)
        traits = _FAMILIES[family](raw, num_layers)
        hidden_size, num_heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
        num_kv_heads = raw.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raw.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}", limit=num_heads)
        context_length = raw.integer("max_position_embeddings")
        return cls(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=raw.integer("intermediate_size"),
            vocab_size=raw.integer("vocab_size"),
            context_length=context_length,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(raw, hidden_size, num_heads, traits.default_head_dim),
            rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.boolean("tie_word_embeddings", False),
            rope=RopeConfig.parse(raw, context_length),
            traits=traits,
        )

    def cache_shape(self, layer: int, *, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """The shape of one layer's K/V: a block is one contiguous piece, within it a position, its keys, its values."""
        assert 0 <= layer < self.num_layers
        return (num_blocks, block_size, 2, self.num_kv_heads, self.head_dim)


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
    if head_dim % 2:
        raw.refuse("head_dim", f"must be even to be rotated in pairs; it comes to {head_dim}")
    return head_dim
