"""The decoder layer that Llama, Mistral, Qwen2 and Qwen3 share; what differs between them is in the config's traits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stagecoach_shard.attention.interface import AttentionShape, AttentionStep
from stagecoach_shard.checkpoint import TensorReader
from stagecoach_shard.model.config import ModelConfig
from stagecoach_shard.model.linear import Linear
from stagecoach_shard.model.rms_norm import RMSNorm
from stagecoach_shard.model.rope import Rotation


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, reader: TensorReader) -> None:
        """Reads layer `index`. Raises CheckpointError for a tensor that is missing or not of the config's shape."""
        hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        traits, prefix = config.traits, f"model.layers.{index}."
        query_rows, key_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        self.shape = AttentionShape(config.num_heads, config.num_kv_heads, head_dim, traits.windows[index])
        self._head_norm = _head_norm(config, attention, reader) if traits.qk_norm else None
        self._input_norm = RMSNorm(reader.read(f"{prefix}input_layernorm.weight", [hidden]), config.rms_norm_eps)
        self._qkv = _linear(
            reader,
            [(f"{attention}q_proj", query_rows), (f"{attention}k_proj", key_rows), (f"{attention}v_proj", key_rows)],
            hidden,
            traits.qkv_bias,
        )
        self._output = _linear(reader, [(f"{attention}o_proj", hidden)], query_rows, traits.output_bias)
        self._mlp_norm = RMSNorm(reader.read(f"{prefix}post_attention_layernorm.weight", [hidden]), config.rms_norm_eps)
        self._gate_up = _linear(reader, [(f"{mlp}gate_proj", inner), (f"{mlp}up_proj", inner)], hidden, traits.mlp_bias)
        self._down = _linear(reader, [(f"{mlp}down_proj", hidden)], inner, traits.mlp_bias)

    @staticmethod
    def tensor_names(config: ModelConfig, index: int) -> list[str]:
        """The tensors of layer `index`."""
        traits = config.traits
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if traits.qk_norm else []
        attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
        names = [f"{name}.weight" for name in norms]
        names += [f"self_attn.{name}.weight" for name in [*attention, "o_proj"]]
        names += [f"mlp.{name}.weight" for name in mlp]
        names += [f"self_attn.{name}.bias" for name in attention if traits.qkv_bias]
        names += ["self_attn.o_proj.bias"] if traits.output_bias else []
        names += [f"mlp.{name}.bias" for name in mlp if traits.mlp_bias]
        return [f"model.layers.{index}.{name}" for name in names]

    @property
    def num_bytes(self) -> int:
        """What the layer's weights take."""
        linears = (self._qkv, self._output, self._gate_up, self._down)
        norms = self._input_norm.num_bytes + self._mlp_norm.num_bytes
        norms += self._head_norm.num_bytes if self._head_norm is not None else 0
        return norms + sum(linear.num_bytes for linear in linears)

    def forward(self, hidden_states: Tensor, rotation: Rotation, step: AttentionStep, cache: Tensor) -> Tensor:
        """`hidden_states` [num_tokens, hidden_size] -> the same; `cache` is this layer's."""
        num_tokens, shape = hidden_states.shape[0], self.shape
        heads = self._qkv(self._input_norm(hidden_states)).view(num_tokens, -1, shape.head_dim)
        num_turned = shape.num_heads + shape.num_kv_heads
        turned = heads[:, :num_turned]  # queries, then keys
        if self._head_norm is not None:
            turned = self._head_norm(turned)
        turned = rotation.apply(turned)
        step.write(cache, turned[:, shape.num_heads :], heads[:, num_turned:])
        attended = step.attend(cache, turned[:, : shape.num_heads])
        hidden_states = self._output(attended).add_(hidden_states)
        gate, up = self._gate_up(self._mlp_norm(hidden_states)).chunk(2, -1)
        return self._down(functional.silu(gate).mul_(up)).add_(hidden_states)


def _head_norm(config: ModelConfig, attention: str, reader: TensorReader) -> RMSNorm:
    """Qwen3's norm over each query and each key head, as one: weight [num_heads + num_kv_heads, head_dim]."""
    query = reader.read(f"{attention}q_norm.weight", [config.head_dim])
    key = reader.read(f"{attention}k_norm.weight", [config.head_dim])
    weight = torch.cat([query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)])
    return RMSNorm(weight, config.rms_norm_eps)


def _linear(reader: TensorReader, parts: Sequence[tuple[str, int]], columns: int, bias: bool) -> Linear:
    """One Linear of several projections of the same input, stacked: `parts` are (module name, rows)."""
    weight = reader.read_stacked([(f"{name}.weight", [rows, columns]) for name, rows in parts])
    biases = reader.read_stacked([(f"{name}.bias", [rows]) for name, rows in parts]) if bias else None
    return Linear(weight, biases)
