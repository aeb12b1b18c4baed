"""The CPU kernels in several builds, and layers computed by them, by torch in bfloat16 and by torch in float32."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import Attention, AttentionShape, AttentionStep
from stagecoach_shard.attention.sdpa import SdpaAttention
from stagecoach_shard.checkpoints.model_config import ModelConfig
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.decoder import TorchLayers
from stagecoach_shard.models.families import read_config
from stagecoach_shard.models.interface import Layers
from stagecoach_shard.native import library
from stagecoach_shard.native.layers import NativeLayers
from stagecoach_shard.native.library import Library

CPU = torch.device("cpu")
SOURCE = Path(library.__file__).with_name("kernels.c")

# Registers of 16, 8 and 4 floats, as far as this CPU has them: another number of rows in a tile and of columns in a
# panel each, and the last without fused products.
BUILDS = ("this-cpu", "x86-64-v3", "x86-64")

# What differs between families, with 1, 3, 5, 9 and 16 query heads to a key head and every size of a head. Widths that
# are no multiple of a register, so that every loop has a remainder.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-biases": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-3-to-1": {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32},
    "mistral-short-window": {
        "model_type": "mistral",
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "sliding_window": 7,
    },
    "mistral-long-window": {
        "model_type": "mistral",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 96,
        "sliding_window": 300,
    },
    "qwen2-9-to-1": {"model_type": "qwen2", "num_attention_heads": 9, "num_key_value_heads": 1, "head_dim": 64},
    "qwen3-16-to-1": {
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "head_dim": 96,
        "use_sliding_window": True,
        "sliding_window": 41,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
NUM_LAYERS = 2
ALL_LAYERS = LayerRange(0, NUM_LAYERS)

_WITH_INNER_FUNCTIONS = """
#include "kernels.c"
void exp_of(const float *x, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += LANES) store(y + i, exp_(load(x + i)));
}
void silu_of(const float *x, int64_t n, float *y) { activate(x, 1, n, y); }
void round_of(const float *x, int64_t n, uint16_t *y) {
  for (int64_t i = 0; i < n; i += LANES) store_bf16(y + i, load(x + i));
}
"""


def family(name: str, **changes: Any) -> ModelConfig:
    """The configuration of FAMILIES[name]."""
    common = {
        "hidden_size": 70,
        "intermediate_size": 90,
        "num_hidden_layers": NUM_LAYERS,
        "vocab_size": 97,
        "max_position_embeddings": 4096,
    }
    return read_config(RawConfig({**common, **FAMILIES[name], **changes}))


def compiler() -> str:
    """A C compiler; skips where there is none."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        pytest.skip("no C compiler here")
    return found


@functools.cache
def kernels(build: str) -> Library:
    """The library for `build`; skips where this machine cannot run it. That for this CPU is what a shard takes."""
    if build == BUILDS[0]:
        compiler()
        return library.load()
    return Library(compiled(build))


@functools.cache
def compiled(build: str) -> Path:
    """A library's file for `build`, with some of the kernels' own functions beside the rest.

    It is kept where a shard keeps its own, so that it is made once for all processes that test and all times.
    """
    if build == BUILDS[0]:
        flag = library._machine_flag()
    elif platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{build} is for another CPU")
    elif build == "x86-64-v3" and not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this CPU is none of {build}")
    else:
        flag = f"-march={build}"
    command = [*compiler().split(), *library._FLAGS[0], flag, f"-I{SOURCE.parent}"]
    made_of = "\0".join([*command, _WITH_INNER_FUNCTIONS, SOURCE.read_text(), library._cpu().hex()])
    path = library._folder() / f"tests-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source, built = Path(folder) / "tests.c", Path(folder) / "tests.so"
            source.write_text(_WITH_INNER_FUNCTIONS)
            subprocess.run(
                [*command, str(source), "-o", str(built), "-lm"], check=True, timeout=library.BUILD_TIMEOUT_S
            )
            built.replace(path)
    return path


class RandomWeights:
    """In place of a TensorReader: every tensor that is asked for, by its name always the same.

    Its numbers are those of bfloat16, in any dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        return self._make(name, shape)

    def read_stacked(self, parts: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        return torch.cat([self._make(name, shape) for name, shape in parts])

    def _make(self, name: str, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(*shape, generator=generator)
        if name.endswith("norm.weight"):
            weight = 1 + 0.3 * noise
        elif len(shape) == 1:
            weight = 0.5 * noise
        else:  # large enough for attention to be far from uniform
            weight = 1.5 * noise / shape[1] ** 0.5
        return weight.bfloat16().to(self._dtype)


class RoundedKV:
    """Attention whose K/V is rounded to bfloat16 before it is written, whatever dtype it is kept in."""

    def __init__(self) -> None:
        self._inner = SdpaAttention()

    def prepare(self, batch: Batch, shape: AttentionShape, dtype: torch.dtype) -> AttentionStep:
        return _RoundedStep(self._inner.prepare(batch, shape, dtype))


class _RoundedStep:
    def __init__(self, inner: AttentionStep) -> None:
        self._inner = inner

    def write(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        self._inner.write(cache, keys.bfloat16().to(keys.dtype), values.bfloat16().to(values.dtype))

    def attend(self, cache: Tensor, queries: Tensor) -> Tensor:
        return self._inner.attend(cache, queries)


class Computed:
    """All layers of a model in one implementation, with a cache of their own."""

    def __init__(self, layers: Layers, config: ModelConfig, dtype: torch.dtype, num_blocks: int, block_size: int):
        self._layers = layers
        self._dtype = dtype
        self.cache = KVCache.allocate(
            config, ALL_LAYERS, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=CPU
        )

    def fill(self, seed: int) -> None:
        """The whole cache with bfloat16 numbers, the same in any dtype."""
        for index, layer in enumerate(self.cache.layers):
            layer.copy_(_noise(layer.shape, seed + index))

    @torch.inference_mode()
    def forward(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """bfloat16 [num_tokens, hidden_size] -> float32 of that shape; the argument is left as it is."""
        inputs = hidden_states.to(self._dtype)
        before = inputs.clone()
        outputs = self._layers.forward(inputs, batch, self.cache).float()
        assert torch.equal(inputs.nan_to_num(), before.nan_to_num())
        return outputs


def native(config: ModelConfig, build: str, *, num_blocks: int = 64, block_size: int = 16) -> Computed:
    """The kernels."""
    layers = NativeLayers(config, ALL_LAYERS, RandomWeights(torch.bfloat16), kernels(build))
    return Computed(layers, config, torch.bfloat16, num_blocks, block_size)


def in_torch(
    config: ModelConfig, dtype: torch.dtype, *, attention: Attention, num_blocks: int = 64, block_size: int = 16
) -> Computed:
    """Torch, in any dtype."""
    layers = TorchLayers(config, ALL_LAYERS, RandomWeights(dtype), dtype=dtype, device=CPU, attention=attention)
    return Computed(layers, config, dtype, num_blocks, block_size)


@functools.lru_cache(maxsize=8)
def _noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_batch(rows: Sequence[tuple[int, int, Sequence[int]]], *, block_size: int = 16) -> Batch:
    """`rows` are (start, number of tokens, blocks)."""
    tables = np.full((len(rows), max(len(blocks) for _, _, blocks in rows)), -1, dtype=np.int32)
    for table, (_, _, blocks) in zip(tables, rows, strict=True):
        table[: len(blocks)] = blocks
    return Batch.build(
        starts=np.array([start for start, _, _ in rows]),
        num_tokens=np.array([count for _, count, _ in rows]),
        block_tables=tables,
        block_size=block_size,
    )


def random_hidden(num_tokens: int, config: ModelConfig, seed: int) -> Tensor:
    """Hidden states, bfloat16 [num_tokens, hidden_size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, config.hidden_size, generator=generator).bfloat16()


def distance(ours: Tensor, expected: Tensor) -> Tensor:
    """For each token (the last dimension is one), the length of the difference relative to what is expected."""
    return (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
