"""config.json is read as transformers reads it, or refused by the name of the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach.errors import CheckpointError
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.models.families import open_checkpoint, read_config
from tests.unit.shard.stage_chain import Running, StageChain
from tests.unit.shard.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def test_a_plain_configuration_is_read() -> None:
    config = read_config(RawConfig({**LLAMA, "rope_theta": 5e5, "tie_word_embeddings": True}))
    assert (config.family, config.num_layers, config.head_dim, config.num_kv_heads) == ("llama", 4, 16, 2)
    assert (config.context_length, config.rope.theta, config.tie_word_embeddings) == (2048, 5e5, True)


def test_what_transformers_leaves_to_defaults_may_be_absent_or_null() -> None:
    fields = {**LLAMA, "num_key_value_heads": None, "rms_norm_eps": None, "rope_scaling": None, "head_dim": None}
    config = read_config(RawConfig(fields))
    assert (config.num_kv_heads, config.rms_norm_eps, config.rope.theta, config.head_dim) == (4, 1e-6, 10000.0, 16)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gemma3_text"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": 2**31 - 2}, "head_dim"),  # whose frequencies take minutes and gigabytes
        ({"head_dim": None, "hidden_size": 2**31 - 4, "num_attention_heads": 2, "num_key_value_heads": 2}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": None}}, "rope_parameters.low_freq_factor"),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "rope_parameters.high_freq_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(RawConfig({**LLAMA, **change}))
    assert caught.value.field == field
    assert field.rsplit(".", 1)[-1] in caught.value.message


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
    ],
)
def test_families_refuse_what_they_have_not(family: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(RawConfig({**LLAMA, "model_type": family, **change}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8, 8)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, (None,) * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_follow_the_family(family: str, change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read_config(RawConfig({**LLAMA, "model_type": family, **change})).windows == windows


def test_qwen3_heads_have_their_own_size() -> None:
    assert read_config(RawConfig({**LLAMA, "model_type": "qwen3"})).head_dim == 128


@pytest.mark.parametrize("name", ["llama", "llama-rope-llama3", "llama-rope-linear", "llama-rope-dynamic"])
def test_the_keys_of_transformers_4_mean_the_same(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS[name])
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    parameters = fields.pop("rope_parameters")
    fields["rope_theta"] = parameters.pop("rope_theta")
    fields["rope_scaling"] = None if parameters == {"rope_type": "default"} else parameters
    if name == "llama-rope-linear":
        parameters["type"] = parameters.pop("rope_type")
    path.write_text(json.dumps(fields))
    token_ids = random_tokens(90, seed=5)
    running = Running(token_ids, list(range(23)))
    StageChain(open_checkpoint(tmp_path), [0, 4]).step((running, 90))
    torch.testing.assert_close(running.stacked(), reference_logits(model, token_ids), atol=1e-4, rtol=0)
