"""The decoder layer that Llama, Mistral, Qwen2 and Qwen3 share; what differs between them is in the config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import Attention, AttentionShape, AttentionStep
from stagecoach_shard.checkpoints.checkpoint import TensorReader
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.layer_weights import LayerWeights, stacked_head_norm
from stagecoach_shard.models.linear import Linear
from stagecoach_shard.models.rms_norm import RMSNorm
from stagecoach_shard.models.rope import Rotation, inverse_frequencies


class TorchLayers:
    """Layers in plain torch, for any device and dtype; the stage's dtype throughout."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        reader: TensorReader,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention,
    ) -> None:
        """Reads `layers`. Raises CheckpointError as LayerWeights does."""
        self._dtype = dtype
        self._attention = attention
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        self._layers = [
            DecoderLayer(config, index, LayerWeights.read(config, index, reader))
            for index in range(layers.start, layers.end)
        ]

    @property
    def num_bytes(self) -> int:
        """How many bytes the weights take."""
        return sum(layer.num_bytes for layer in self._layers)

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """The kinds of these layers."""
        return {layer.shape for layer in self._layers}

    def forward(self, hidden_states: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """`hidden_states` [num_tokens, hidden_size] -> the same."""
        steps = {shape: self._attention.prepare(batch, shape, self._dtype) for shape in self.attention_shapes}
        return self.run(hidden_states, batch.positions, steps, cache)

    def run(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        steps: Mapping[AttentionShape, AttentionStep],
        cache: KVCache,
    ) -> Tensor:
        """The same for a micro-batch that is prepared: `positions` int64 [num_tokens], and a step for each kind."""
        rotation = Rotation.at(positions, self._inverse_frequencies, self._dtype)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            hidden_states = layer.forward(hidden_states, rotation, steps[layer.shape], layer_cache)
        return hidden_states


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, weights: LayerWeights) -> None:
        self.shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, config.windows[index])
        eps, head_norm = config.rms_norm_eps, stacked_head_norm(weights, config)
        self._head_norm = None if head_norm is None else RMSNorm(head_norm, eps)
        self._input_norm = RMSNorm(weights.input_norm, eps)
        self._qkv = Linear(weights.qkv.weight, weights.qkv.bias)
        self._output = Linear(weights.output.weight, weights.output.bias)
        self._mlp_norm = RMSNorm(weights.mlp_norm, eps)
        self._gate_up = Linear(weights.gate_up.weight, weights.gate_up.bias)
        self._down = Linear(weights.down.weight, weights.down.bias)

    @property
    def num_bytes(self) -> int:
        """How many bytes the layer's weights take."""
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
