"""Rotation frequencies are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from stagecoach_shard.checkpoints.model_config import RopeConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.rope import Rotation, inverse_frequencies, read_rope


def _theirs(parameters: dict[str, Any], head_dim: int, context_length: int) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=context_length,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)[0]
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)[0]


@given(
    rope_type=st.sampled_from(("default", "linear", "dynamic", "llama3")),
    theta=st.floats(10.0, 1e7),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.1, 4.0),
    gap=st.floats(0.1, 8.0),
    original=st.integers(16, 16_384),
    head_dim=st.sampled_from((4, 16, 64, 128)),
)
def test_frequencies_equal_those_of_transformers(
    rope_type: str, theta: float, factor: float, low: float, gap: float, original: int, head_dim: int
) -> None:
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    if rope_type != "default":
        parameters["factor"] = factor
    if rope_type == "llama3":
        parameters |= {
            "low_freq_factor": low,
            "high_freq_factor": low + gap,
            "original_max_position_embeddings": original,
        }
    ours = inverse_frequencies(read_rope(RawConfig({"rope_parameters": parameters}), 32_768), head_dim)
    torch.testing.assert_close(ours, _theirs(parameters, head_dim, 32_768), rtol=2e-6, atol=0)


def test_the_original_context_is_the_outer_field_then_the_inner_then_the_context() -> None:
    parameters = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inner = {**parameters, "original_max_position_embeddings": 100}
    outer = {"rope_scaling": inner, "original_max_position_embeddings": 50}
    assert read_rope(RawConfig(outer), 200).original_context_length == 50
    assert read_rope(RawConfig({"rope_scaling": inner}), 200).original_context_length == 100
    assert read_rope(RawConfig({"rope_scaling": parameters}), 200).original_context_length == 200


def test_the_parameters_own_theta_goes_before_the_outer_one() -> None:
    raw = RawConfig({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}})
    assert read_rope(raw, 64).theta == 9.0
    assert read_rope(RawConfig({"rope_theta": 7.0}), 64).theta == 7.0


@pytest.mark.parametrize("head_dim", [4, 64])
def test_heads_are_turned_as_transformers_turns_them(head_dim: int) -> None:
    frequencies = inverse_frequencies(RopeConfig("default", 10_000.0), head_dim)
    positions = torch.tensor([0, 5, 1000])
    heads = torch.randn(3, 2, head_dim, generator=torch.Generator().manual_seed(0))
    angles = positions[:, None].float() * frequencies
    table = torch.cat((angles, angles), -1)
    expected, _ = apply_rotary_pos_emb(heads, heads, table.cos(), table.sin())
    ours = Rotation.at(positions, frequencies, torch.float32).apply(heads)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_dynamic_rotation_is_transformers_default_one_up_to_the_last_position_of_the_context(factor: float) -> None:
    """We compute the one as the other. That this is what transformers does is shown with nothing of ours in it."""
    length = 48
    settings = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": length}
    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": factor}
    dynamic = LlamaRotaryEmbedding(LlamaConfig(**settings, rope_parameters=scaled))
    default = LlamaRotaryEmbedding(
        LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    )

    def turned(embedding: LlamaRotaryEmbedding, first: int, end: int) -> torch.Tensor:
        return torch.stack(embedding(torch.zeros(1), torch.arange(first, end)[None]))

    for first, end in ((0, length), (0, 1), (length - 1, length), (7, 30)):
        assert torch.equal(turned(dynamic, first, end), turned(default, first, end))
    # And the first position past it is where they part, so that the comparison can fail.
    assert not torch.equal(turned(dynamic, 0, length + 1), turned(default, 0, length + 1))
    # Once more within the context, transformers sets the base back.
    assert torch.equal(turned(dynamic, 0, length - 1), turned(default, 0, length - 1))
