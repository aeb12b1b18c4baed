"""A stage's layers and head on a CPU in bfloat16, computed by kernels.c: the fast path beside `TorchLayers`.

Weights and K/V are bfloat16, everything in between is float32, and only what goes on the wire is rounded.
"""

from __future__ import annotations

import itertools
import logging
from ctypes import byref
from typing import Literal

import torch
from torch import Tensor

from stagecoach.errors import ConfigError, InternalError
from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.checkpoints.checkpoint import TensorReader
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.memory import give_back_unused
from stagecoach_shard.models.layer_weights import LayerWeights, Projection
from stagecoach_shard.models.rope import inverse_frequencies
from stagecoach_shard.native import library
from stagecoach_shard.native.library import LayerStruct, Library, StepStruct

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "native", "torch"]
MAX_HEAD_DIM = 1024  # a few heads are held on a thread's stack


def native_library(kernels: Kernels, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Library | None:
    """The library to compute with; None: torch does it.

    "auto" takes it where it can be built and fits, and logs why not. "native" raises ConfigError instead.
    """
    if kernels == "torch":
        return None
    try:
        if device.type != "cpu" or dtype != torch.bfloat16:
            raise ConfigError(f"kernels: native is for bfloat16 on a CPU, not {dtype} on {device}", field="kernels")
        loaded = library.load()
        unit = 2 * loaded.lanes
        if config.head_dim % unit:
            raise ConfigError(
                f"kernels: native takes a head_dim that is a multiple of {unit} here, not {config.head_dim}",
                field="kernels",
                limit=unit,
                value=config.head_dim,
            )
        if config.head_dim > MAX_HEAD_DIM:
            raise ConfigError(
                f"kernels: native takes a head_dim up to {MAX_HEAD_DIM}, not {config.head_dim}",
                field="kernels",
                limit=MAX_HEAD_DIM,
                value=config.head_dim,
            )
    except ConfigError as error:
        if kernels == "native":
            raise
        if device.type == "cpu" and dtype == torch.bfloat16:
            logger.warning("the layers run on torch, at about half the speed: %s", error)
        return None
    return loaded


class NativeLinear:
    """x -> x @ weight.T + bias, the weight in bfloat16, all else in float32.

    A row's result does not depend on what other rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, functions: Library) -> None:
        """`weight` [out_features, in_features], `bias` [out_features], bfloat16 on the CPU. Keeps a copy."""
        assert weight.dtype == torch.bfloat16
        self.out_features, self.in_features = weight.shape
        self._functions = functions
        weight = weight.contiguous()
        self.words = torch.empty(functions.packed_words(*weight.shape), dtype=torch.int32)
        functions.pack(weight.data_ptr(), *weight.shape, self.words.data_ptr())
        self.bias = None if bias is None else bias.float().contiguous()

    @property
    def num_bytes(self) -> int:
        """How many bytes weight and bias take."""
        return self.words.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [n, in_features] -> float32 [n, out_features], on as many threads as torch has."""
        assert x.dtype == torch.float32
        assert x.shape[1:] == (self.in_features,)
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        _check(
            self._functions.linear(
                x.data_ptr(),
                x.shape[0],
                self.words.data_ptr(),
                self.out_features,
                self.in_features,
                None if self.bias is None else self.bias.data_ptr(),
                y.data_ptr(),
                0,
                None,
                torch.get_num_threads(),
            )
        )
        return y


class NativeLayers:
    """Layers computed by kernels.c, each in one call. The K/V cache is bfloat16."""

    def __init__(self, config: ModelConfig, layers: LayerRange, reader: TensorReader, functions: Library) -> None:
        """Reads `layers` and packs them. Raises CheckpointError as LayerWeights does."""
        self._functions = functions
        self._is_last = layers.end == config.num_layers
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._layers = []
        for index in range(layers.start, layers.end):
            self._layers.append(_Layer(config, index, LayerWeights.read(config, index, reader), functions))
            give_back_unused()  # what was read, now that it is packed
        for layer, following in itertools.pairwise(self._layers):
            layer.struct.after = following.struct.qkv

    @property
    def num_bytes(self) -> int:
        """How many bytes the weights take."""
        return sum(layer.num_bytes for layer in self._layers)

    def forward(self, hidden_states: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """bfloat16 [num_tokens, hidden_size] -> the same, or float32 where the head comes next."""
        hidden = hidden_states.to(torch.float32, copy=True).contiguous()
        angles = batch.positions[:, None].float() * self._inverse_frequencies  # [num_tokens, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        step = StepStruct(
            total_tokens=batch.total_tokens,
            num_rows=len(batch.starts),
            block_size=batch.block_size,
            table_width=batch.block_tables.shape[1],
            num_threads=torch.get_num_threads(),
            starts=batch.starts.ctypes.data,
            num_tokens=batch.num_tokens.ctypes.data,
            first_tokens=batch.first_tokens.ctypes.data,
            block_tables=batch.block_tables.ctypes.data,
            cache_slots=batch.cache_slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )
        address = hidden.data_ptr()
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            assert layer_cache.dtype == torch.bfloat16
            _check(self._functions.layer(byref(layer.struct), byref(step), layer_cache.data_ptr(), address))
        return hidden if self._is_last else hidden.to(torch.bfloat16)


class _Layer:
    """A layer's weights in the layout of the kernels, and the struct that points to them."""

    def __init__(self, config: ModelConfig, index: int, weights: LayerWeights, functions: Library) -> None:
        self._linears = {
            name: _packed(projection, functions)
            for name, projection in (
                ("qkv", weights.qkv),
                ("output", weights.output),
                ("gate_up", weights.gate_up),
                ("down", weights.down),
            )
        }
        norms = {"input_norm": weights.input_norm, "mlp_norm": weights.mlp_norm}
        if weights.head_norms is not None:
            norms["query_norm"], norms["key_norm"] = weights.head_norms
        self._norms = {name: norm.float().contiguous() for name, norm in norms.items()}
        self.struct = LayerStruct(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.windows[index] or 0,
            eps=config.rms_norm_eps,
            **{name: linear.words.data_ptr() for name, linear in self._linears.items()},
            **{
                f"{name}_bias": linear.bias.data_ptr()
                for name, linear in self._linears.items()
                if linear.bias is not None
            },
            **{name: norm.data_ptr() for name, norm in self._norms.items()},
        )

    @property
    def num_bytes(self) -> int:
        norms = sum(norm.nbytes for norm in self._norms.values())
        return norms + sum(linear.num_bytes for linear in self._linears.values())


def _packed(projection: Projection, functions: Library) -> NativeLinear:
    return NativeLinear(projection.weight, projection.bias, functions)


def _check(status: int) -> None:
    if status != 0:
        raise InternalError("the machine has no memory left for a step")
