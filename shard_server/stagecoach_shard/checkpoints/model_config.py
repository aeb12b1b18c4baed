"""What a stage has to know of a model: plain figures, in our words. The families of `models/` read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The parameters of the rotary position embedding. Those past `factor` are Llama 3's, and 0 for other types."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context_length: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model: pre-norm layers of grouped-query attention and a SiLU-gated MLP."""

    family: str  # config.json's model_type
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int  # the most positions that a sequence may have
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    # For each layer the positions that a token sees, the token itself among them; None: all positions up to it.
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each query and key head, before the rotation

    def cache_shape(self, layer: int, *, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """The shape of one layer's K/V: a block is one contiguous piece, within it a position, its keys, its values."""
        assert 0 <= layer < self.num_layers
        return (num_blocks, block_size, 2, self.num_kv_heads, self.head_dim)
