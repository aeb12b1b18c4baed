"""Rotary position embeddings: how config.json's parameters become frequencies, and frequencies a rotation.

Formulas are those of transformers' `modeling_rope_utils` (5.23): "default" is RoFormer's (arXiv 2104.09864), "linear"
is position interpolation (arXiv 2306.15595), "llama3" is that of Llama 3.1.

"dynamic" is computed as "default", and its `factor` changes nothing. Transformers stretches the base only for
sequences longer than `max_position_embeddings`, and that is the context length, which we refuse to exceed. Whoever
wants a longer context of it does not get it here. Beyond, the result would depend on how a prompt was cut, as a cached
key keeps the rotation of the length at which it was computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stagecoach_shard.checkpoints.model_config import RopeConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig

_KNOWN_TYPES = ("default", "linear", "dynamic", "llama3")
_KNOWN_FIELDS = frozenset(
    (
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    )
)
_DEFAULT_THETA = 10_000.0


def read_rope(raw: RawConfig, context_length: int) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_scaling` beside `rope_theta` (before it).

    Raises CheckpointError, with the field, for a type or a parameter that we do not compute.
    """
    new, old = raw.section("rope_parameters"), raw.section("rope_scaling")
    if new is not None and old is not None and raw.get("rope_parameters") != raw.get("rope_scaling"):
        raw.refuse("rope_scaling", "and rope_parameters differ; only one of them can be meant")
    rope = new or old or RawConfig({}, "rope_parameters.")
    for name in rope.names():
        if name not in _KNOWN_FIELDS:
            rope.refuse(name, "is not a parameter that we know how to compute with")
    for section in (raw, rope):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            section.refuse("partial_rotary_factor", "must be 1: rotating a part of each head is not supported")
    theta = rope.number("rope_theta", raw.number("rope_theta", _DEFAULT_THETA))
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type not in _KNOWN_TYPES:
        name = "rope_type" if rope.get("rope_type") is not None else "type"
        rope.refuse(name, f"must be one of {', '.join(_KNOWN_TYPES)}", limit=_KNOWN_TYPES)
    if rope_type == "default":
        return RopeConfig(rope_type, theta)
    factor = rope.number("factor", minimum=1.0)
    if rope_type != "llama3":
        return RopeConfig(rope_type, theta, factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor, {low:g}", limit=low)
    inner = rope.integer("original_max_position_embeddings", context_length)
    original = raw.integer("original_max_position_embeddings", inner)
    return RopeConfig(rope_type, theta, factor, low, high, original)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position, float32 [head_dim / 2], on the CPU. "dynamic" is "default" here: see above."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slows waves longer than the original context, keeps short ones, and blends in between."""
    turns = rope.original_context_length * frequencies / (2 * math.pi)  # in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of one micro-batch's tokens; computed once and used by every layer.

    A head's number i turns with number i + head_dim / 2, the pairing of the checkpoints that transformers writes.
    """

    cos: Tensor  # [num_tokens, 1, head_dim], model dtype
    sin: Tensor  # [num_tokens, 1, head_dim], model dtype; the first half negated

    @classmethod
    def at(cls, positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> Rotation:
        """`positions` int64 [num_tokens]; angles are taken in float32."""
        angles = positions[:, None].float() * inverse_frequencies  # [num_tokens, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return cls(
            torch.cat((cos, cos), -1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1),
        )

    def apply(self, heads: Tensor) -> Tensor:
        """`heads` [num_tokens, num_heads, head_dim] -> the same, turned."""
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        return torch.addcmul(heads * self.cos, swapped, self.sin)
