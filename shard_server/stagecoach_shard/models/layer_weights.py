"""The tensors of one decoder layer: their names in a checkpoint, and how layers want them, projections stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagecoach_shard.checkpoints.checkpoint import TensorReader
from stagecoach_shard.checkpoints.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map: `weight` [out_features, in_features], `bias` [out_features] or none."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of Llama, Mistral, Qwen2 or Qwen3, in the stage's dtype and on its device."""

    input_norm: Tensor  # [hidden_size]
    qkv: Projection  # queries of all heads, then keys, then values
    head_norms: tuple[Tensor, Tensor] | None  # of queries and of keys, [head_dim] each
    output: Projection
    mlp_norm: Tensor  # [hidden_size]
    gate_up: Projection  # gate, then up
    down: Projection

    @classmethod
    def read(cls, config: ModelConfig, index: int, reader: TensorReader) -> LayerWeights:
        """Reads layer `index`. Raises CheckpointError for a tensor that is missing or not of the config's shape."""
        hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        prefix = f"model.layers.{index}."
        query_rows, key_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = [(f"{attention}q_proj", query_rows), (f"{attention}k_proj", key_rows), (f"{attention}v_proj", key_rows)]
        gate_up = [(f"{mlp}gate_proj", inner), (f"{mlp}up_proj", inner)]
        head_norms = None
        if config.qk_norm:
            head_norms = (
                reader.read(f"{attention}q_norm.weight", [head_dim]),
                reader.read(f"{attention}k_norm.weight", [head_dim]),
            )
        return cls(
            input_norm=reader.read(f"{prefix}input_layernorm.weight", [hidden]),
            qkv=_projection(reader, qkv, hidden, config.qkv_bias),
            head_norms=head_norms,
            output=_projection(reader, [(f"{attention}o_proj", hidden)], query_rows, config.output_bias),
            mlp_norm=reader.read(f"{prefix}post_attention_layernorm.weight", [hidden]),
            gate_up=_projection(reader, gate_up, hidden, config.mlp_bias),
            down=_projection(reader, [(f"{mlp}down_proj", hidden)], inner, config.mlp_bias),
        )

    @staticmethod
    def tensor_names(config: ModelConfig, index: int) -> list[str]:
        """What a checkpoint calls the tensors of layer `index`."""
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
        attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
        names = [f"{name}.weight" for name in norms]
        names += [f"self_attn.{name}.weight" for name in [*attention, "o_proj"]]
        names += [f"mlp.{name}.weight" for name in mlp]
        names += [f"self_attn.{name}.bias" for name in attention if config.qkv_bias]
        names += ["self_attn.o_proj.bias"] if config.output_bias else []
        names += [f"mlp.{name}.bias" for name in mlp if config.mlp_bias]
        return [f"model.layers.{index}.{name}" for name in names]


def _projection(reader: TensorReader, parts: Sequence[tuple[str, int]], columns: int, bias: bool) -> Projection:
    """Several projections of the same input, stacked: `parts` are (module name, rows)."""
    weight = reader.read_stacked([(f"{name}.weight", [rows, columns]) for name, rows in parts])
    biases = reader.read_stacked([(f"{name}.bias", [rows]) for name, rows in parts]) if bias else None
    return Projection(weight, biases)


def stacked_head_norm(weights: LayerWeights, config: ModelConfig) -> Tensor | None:
    """The norms of query and key heads as one: [num_heads + num_kv_heads, head_dim]."""
    if weights.head_norms is None:
        return None
    query, key = weights.head_norms
    return torch.cat([query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)])
