"""Writes GGUF files of small models, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from tokenizers import pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<s>"]


def byte_level_tokens() -> list[str]:
    """Every byte, the special tokens, and one that a merge makes."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL_TOKENS, "he"]


@dataclass
class GGUFModel:
    """What to write; tests change what they are about. `metadata` may overrule any key, None leaves it out."""

    architecture: str = "llama"
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden_size: int = 64
    intermediate_size: int = 96
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return len(byte_level_tokens())

    def all_metadata(self) -> dict[str, Any]:
        name = self.architecture
        tokens = byte_level_tokens()
        defaults = {
            f"{name}.block_count": self.num_layers,
            f"{name}.context_length": 128,
            f"{name}.embedding_length": self.hidden_size,
            f"{name}.feed_forward_length": self.intermediate_size,
            f"{name}.attention.head_count": self.num_heads,
            f"{name}.attention.head_count_kv": self.num_kv_heads,
            f"{name}.attention.key_length": self.head_dim,
            f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{name}.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens],
            "tokenizer.ggml.merges": ["h e"],
            "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        }
        merged = {**defaults, **self.metadata}
        return {key: value for key, value in merged.items() if value is not None}

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.metadata.get("general.architecture", self.architecture))
        for key, value in self.all_metadata().items():
            if key != "general.architecture":
                _add(writer, key, value)
        for name, values in self.tensors.items():
            # Like the converter, vectors stay float32.
            kind = self.quantization if values.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def interleaved(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of the rows of q and k: 0, half, 1, half + 1, ... within each head."""
    out = np.empty_like(rows)
    head_dim = len(rows) // num_heads
    for head in range(num_heads):
        for row in range(head_dim):
            source = row // 2 + (head_dim // 2 if row % 2 else 0)
            out[head * head_dim + row] = rows[head * head_dim + source]
    return out


def gguf_tensors(state: Mapping[str, torch.Tensor], model: GGUFModel) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint's tensors under llama.cpp's names and in its order."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, tensor in state.items():
        values = tensor.detach().float().numpy()
        stem, kind = name.rsplit(".", 1)
        if stem in top:
            tensors[f"{top[stem]}.{kind}"] = values
            continue
        _, _, layer, part = stem.split(".", 3)
        if model.architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            values = interleaved(values, model.num_heads if "q_proj" in part else model.num_kv_heads)
        tensors[f"blk.{layer}.{parts[part]}.{kind}"] = values
    return tensors
