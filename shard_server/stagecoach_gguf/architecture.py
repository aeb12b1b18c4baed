"""What a GGUF file's architecture means in a checkpoint: config.json, and which tensor is which.

llama (Llama 1 to 3, Mistral, SmolLM: llama.cpp calls them all llama), qwen2 and qwen3. Anything in the metadata that
would change the computation in a way we do not write down is refused: a checkpoint must never be almost right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagecoach.errors import CheckpointError
from stagecoach_gguf.gguf_file import GGUFFile
from stagecoach_shard.checkpoints.raw_config import MAX_INTEGER
from stagecoach_shard.models.decoder_config import MAX_LAYERS

_CLASS_NAMES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# These keys, after "<architecture>.", change what a layer computes where they are present and not zero.
_REFUSED_KEYS = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)

# Llama 3.1 to 3.3. The file holds only the factors that come out of these.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where one tensor of the checkpoint comes from.

    `rotary_heads`: the heads for which llama.cpp's order of rows is to be undone, 0 for none.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes from which the shapes of all tensors follow."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


class Architecture:
    """Reads general.architecture and its keys. Raises CheckpointError for what cannot be mapped exactly."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.name = file.text("general.architecture")
        if self.name not in _CLASS_NAMES:
            raise CheckpointError(
                f"general.architecture {self.name!r} cannot be imported",
                field="general.architecture",
                limit=", ".join(_CLASS_NAMES),
                value=self.name,
            )
        if file.integer("split.count", 1) > 1:
            raise CheckpointError(f"{file.path.name} is one of several parts; merge them first", field="split.count")
        self._refuse_unmapped()
        self.context_length = self._integer("context_length")
        self.shape = self._read_shape()
        self.tied_head = "output.weight" not in file.tensors
        self.attention_bias = "blk.0.attn_q.bias" in file.tensors
        self.mlp_bias = "blk.0.ffn_up.bias" in file.tensors
        self._rope_scaling = self._read_rope_scaling()

    def config(self, token_ids: Mapping[str, int]) -> dict[str, object]:
        """config.json. `token_ids` are the entries for special tokens, such as bos_token_id."""
        shape = self.shape
        config: dict[str, object] = {
            "architectures": [_CLASS_NAMES[self.name]],
            "model_type": self.name,
            "torch_dtype": "bfloat16",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self._file.number(f"{self.name}.attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self.context_length,
            "rope_theta": self._file.number(f"{self.name}.rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling,
            "tie_word_embeddings": self.tied_head,
            **token_ids,
        }
        if self.name == "llama":
            config |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        if self.name == "qwen3":
            config |= {"attention_bias": self.attention_bias}
        if self.name != "llama":
            config |= {"use_sliding_window": False}
        return config

    def tensors(self) -> list[TensorPlan]:
        """Every tensor of the checkpoint, in the file's order.

        Raises CheckpointError for a tensor that is missing, of another shape than the sizes ask for, or unknown.
        """
        plans = {plan.source: plan for plan in self._expected_tensors()}
        for plan in plans.values():
            tensor = self._file.tensors.get(plan.source)
            if tensor is None:
                raise CheckpointError(f"tensor {plan.source} is missing", field=plan.source)
            if tensor.shape != plan.shape:
                raise CheckpointError(
                    f"tensor {plan.source} has shape {list(tensor.shape)}, not {list(plan.shape)}",
                    field=plan.source,
                    limit=list(plan.shape),
                    value=list(tensor.shape),
                )
        unknown = sorted(set(self._file.tensors) - set(plans) - {"rope_freqs.weight"})
        if unknown:
            raise CheckpointError(
                f"a {self.name} model has no tensor {unknown[0]}", field=unknown[0], value=len(unknown)
            )
        return [plans[source] for source in self._file.tensors if source in plans]

    def _expected_tensors(self) -> list[TensorPlan]:
        shape = self.shape
        plans = [
            TensorPlan("token_embd.weight", "model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size)),
            TensorPlan("output_norm.weight", "model.norm.weight", (shape.hidden_size,)),
        ]
        if not self.tied_head:
            plans.append(TensorPlan("output.weight", "lm_head.weight", (shape.vocab_size, shape.hidden_size)))
        for layer in range(shape.num_layers):
            plans += self._layer_tensors(f"blk.{layer}", f"model.layers.{layer}")
        return plans

    def _layer_tensors(self, source: str, name: str) -> list[TensorPlan]:
        shape, hidden = self.shape, self.shape.hidden_size
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        # llama.cpp turns neighbouring pairs for llama, halves of a head for the others; checkpoints always mean halves.
        query_heads, key_heads = (shape.num_heads, shape.num_kv_heads) if self.name == "llama" else (0, 0)
        plans = [
            TensorPlan(f"{source}.attn_norm.weight", f"{name}.input_layernorm.weight", (hidden,)),
            TensorPlan(f"{source}.ffn_norm.weight", f"{name}.post_attention_layernorm.weight", (hidden,)),
        ]
        if self.name == "qwen3":
            plans += [
                TensorPlan(f"{source}.attn_q_norm.weight", f"{name}.self_attn.q_norm.weight", (shape.head_dim,)),
                TensorPlan(f"{source}.attn_k_norm.weight", f"{name}.self_attn.k_norm.weight", (shape.head_dim,)),
            ]
        inner = shape.intermediate_size
        has_output_bias = self.attention_bias and self.name != "qwen2"
        for part, module, rows, columns, heads, has_bias in (
            ("attn_q", "self_attn.q_proj", query, hidden, query_heads, self.attention_bias),
            ("attn_k", "self_attn.k_proj", key, hidden, key_heads, self.attention_bias),
            ("attn_v", "self_attn.v_proj", key, hidden, 0, self.attention_bias),
            ("attn_output", "self_attn.o_proj", hidden, query, 0, has_output_bias),
            ("ffn_gate", "mlp.gate_proj", inner, hidden, 0, self.mlp_bias),
            ("ffn_up", "mlp.up_proj", inner, hidden, 0, self.mlp_bias),
            ("ffn_down", "mlp.down_proj", hidden, inner, 0, self.mlp_bias),
        ):
            plans.append(TensorPlan(f"{source}.{part}.weight", f"{name}.{module}.weight", (rows, columns), heads))
            if has_bias:
                plans.append(TensorPlan(f"{source}.{part}.bias", f"{name}.{module}.bias", (rows,), heads))
        return plans

    def _read_shape(self) -> ModelShape:
        hidden, num_heads = self._integer("embedding_length"), self._integer("attention.head_count")
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError("tensor token_embd.weight is missing", field="token_embd.weight")
        shape = ModelShape(
            num_layers=self._integer("block_count", maximum=MAX_LAYERS),
            hidden_size=hidden,
            intermediate_size=self._integer("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=self._integer("attention.head_count_kv", num_heads),
            head_dim=self._integer("attention.key_length", hidden // num_heads),
            vocab_size=embedding.shape[0],
        )
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._integer(key, shape.head_dim) != shape.head_dim:
                raise self._unmapped(key)
        if shape.num_heads % shape.num_kv_heads:
            raise self._unmapped("attention.head_count_kv")
        if shape.head_dim % 2:
            raise self._unmapped("attention.key_length")
        return shape

    def _read_rope_scaling(self) -> dict[str, object] | None:
        kind = self._file.text(f"{self.name}.rope.scaling.type", "none")
        factors = self._file.tensors.get("rope_freqs.weight")
        if factors is not None:
            if kind != "none":
                raise self._unmapped("rope.scaling.type")
            return _llama3_scaling(
                factors.values().reshape(-1),
                self._file.number(f"{self.name}.rope.freq_base", 10000.0),
                self.shape.head_dim,
            )
        if kind == "none":
            return None
        if kind != "linear":
            raise self._unmapped("rope.scaling.type")
        return {"rope_type": "linear", "factor": self._file.number(f"{self.name}.rope.scaling.factor")}

    def _refuse_unmapped(self) -> None:
        for key in _REFUSED_KEYS:
            name = f"{self.name}.{key}"
            if name in self._file and self._number_or_flag(name) != 0:
                raise self._unmapped(key)
        window = f"{self.name}.attention.sliding_window"
        if window in self._file and 0 < self._file.integer(window) < self._integer("context_length"):
            raise self._unmapped("attention.sliding_window")

    def _number_or_flag(self, key: str) -> float:
        try:
            return float(self._file.integer(key))
        except CheckpointError:
            return self._file.number(key)

    def _integer(self, key: str, default: int | None = None, *, maximum: int = MAX_INTEGER) -> int:
        name = f"{self.name}.{key}"
        value = self._file.integer(name, default)
        if not 1 <= value <= maximum:
            raise CheckpointError(f"{name} must be in [1, {maximum}]", field=name, limit=maximum, value=value)
        return value

    def _unmapped(self, key: str) -> CheckpointError:
        name = f"{self.name}.{key}"
        return CheckpointError(f"{name} has a value that cannot be imported exactly", field=name)


def _llama3_scaling(factors: npt.NDArray[np.float32], rope_theta: float, head_dim: int) -> dict[str, object]:
    """The "llama3" rope parameters that `factors` [head_dim / 2], float32, were made from.

    The file holds what each frequency is divided by: 1 for short waves, the factor for waves longer than the original
    context, and in between the blend of https://arxiv.org/abs/2407.21783 as Meta published it. We take the largest for
    the factor, compute the rest anew with Llama 3's constants, and refuse the file where they differ.
    """
    factor = float(str(factors.max()))
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [head_dim / 2]
    periods = _LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = np.clip((periods - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            "rope_freqs.weight holds other factors than Llama 3's; they cannot be written into config.json",
            field="rope_freqs.weight",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }
