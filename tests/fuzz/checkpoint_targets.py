"""What a shard reads of a checkpoint folder, and what the importer reads of a GGUF file."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from stagecoach.topology import LayerRange
from stagecoach_gguf import import_gguf
from stagecoach_gguf.architecture import Architecture
from stagecoach_gguf.gguf_file import GGUFFile
from stagecoach_shard.checkpoints.json_file import read_json_object
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.checkpoints.tensor_table import INDEX_FILE, SINGLE_FILE
from stagecoach_shard.models.families import open_checkpoint, read_config
from stagecoach_shard.models.rope import inverse_frequencies
from stagecoach_shard.runtime.stage import Stage
from tests.fuzz.engine import Target
from tests.gguf_model import GGUFModel
from tests.unit.shard.tiny_models import save_tiny_model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Pieces with scores, in place of merges. As many as there are tokens otherwise.
_NUM_PIECES = GGUFModel().vocab_size
_PIECES = ["ab" * (number // 2) + "a" * (number % 2) for number in range(1, _NUM_PIECES)]
_SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": None,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": [
        "<unk>",
        *("ab" * (number // 2) + "a" * (number % 2) for number in range(1, _NUM_PIECES)),
    ],
    "tokenizer.ggml.token_type": [2] + [1] * (_NUM_PIECES - 1),
    "tokenizer.ggml.scores": [-float(number) for number in range(_NUM_PIECES)],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}
# A tensor without rows takes no bytes of its file, however wide they would be.
_MAX_READ_NUMBERS = 1 << 20


def _safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """tensors: name -> (dtype, shape, bytes)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(256)) * (end // 256) + bytes(end % 256)


def safetensors(scratch: Path) -> Target:
    """The single file, or the index beside a valid one, as the first byte says; opened, and its tensors read."""
    (scratch / "config.json").write_text(json.dumps(CONFIG))
    valid = _safetensors(
        {
            "model.embed_tokens.weight": ("BF16", [20, 8], 320),
            "model.layers.0.input_layernorm.weight": ("F32", [8], 32),
            "model.layers.1.mlp.down_proj.weight": ("F16", [8, 16], 256),
            "model.norm.weight": ("F64", [8], 64),
        }
    )
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.safetensors"}}
    (scratch / "part.safetensors").write_bytes(valid)
    single, indexed = scratch / SINGLE_FILE, scratch / INDEX_FILE

    def check(data: bytes) -> None:
        if data[:1] == b"i":
            single.unlink(missing_ok=True)
            indexed.write_bytes(data[1:])
        else:
            single.write_bytes(data[1:])
        checkpoint = open_checkpoint(scratch)
        with checkpoint.reader(torch.float32, torch.device("cpu")) as reader:
            for entry in list(checkpoint.tensors.values())[:8]:
                if math.prod(entry.shape) <= _MAX_READ_NUMBERS:
                    reader.read(entry.name, entry.shape)

    words = (
        b'"dtype"', b'"shape"', b'"data_offsets"', b'"BF16"', b'"F8_E4M3"', b'"weight_map"', b'"../x.safetensors"',
        '"model.layers.\u00b2.x"'.encode(), b'"model.layers.%s.x"' % (b"9" * 5000), b"9" * 4000, b"9" * 5000,
        b"[" + b"9" * 4000 + b"," + b"9" * 4000 + b"]", b"[" * 100_000, struct.pack("<Q", 2**63), b"[0,0]", b"[1]",
    )  # fmt: skip
    endless = _safetensors({"model.norm.weight": ("F32", [10**4000, 10**4000], 32)})  # whose product none can print
    corpus = [b"s" + valid, b"i" + json.dumps(index).encode(), b"s" + endless]
    return Target("safetensors", corpus, check, words, share=8, max_input_bytes=1 << 17)


def config_json(scratch: Path) -> Target:
    """config.json, up to frequencies and what is kept of each layer."""
    path = scratch / "config.json"
    llama3 = CONFIG | {  # numbers without a point: JSON has whole ones that no float can hold
        "rope_theta": 10000,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 32,
        },
    }
    qwen = CONFIG | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "layer_types": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    }
    del qwen["rope_theta"]
    qwen3 = CONFIG | {"model_type": "qwen3", "head_dim": 4, "layer_types": ["full_attention", "full_attention"]}

    def check(data: bytes) -> None:
        path.write_bytes(data)
        config = read_config(RawConfig(read_json_object(path, 1 << 20)))
        assert len(config.windows) == config.num_layers
        inverse_frequencies(config.rope, config.head_dim)
        for layer in range(config.num_layers):
            assert all(size > 0 for size in config.cache_shape(layer, num_blocks=2, block_size=16))

    words = (
        *(b'"%s":' % name.encode() for name in {**llama3, **qwen, **qwen3}),
        b'"head_dim":', b'"mistral"', b'"qwen3"', b'"type":', b'"sliding_attention"', b'"sliding_window":', b"9" * 400,
        b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b"1" + b"0" * 4000,
    )  # fmt: skip
    corpus = [json.dumps(config).encode() for config in (CONFIG, llama3, qwen, qwen3)]
    return Target("config_json", corpus, check, words, share=15, max_input_bytes=1 << 18)


def stage(scratch: Path) -> Target:
    """config.json beside the tensors of another one, loaded as far as they go together."""
    path = scratch / "config.json"
    save_tiny_model(scratch, {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 1})
    valid = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = open_checkpoint(scratch)
        layers = LayerRange(0, checkpoint.config.num_layers)
        Stage.load(checkpoint, layers, dtype=torch.float32, device=torch.device("cpu"))

    names = ("head_dim", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    words = (
        *(b'"%s": %d,' % (name.encode(), number) for name in names for number in (0, 1, 2**31 - 2, 2**31, 2**62)),
        *(b'"model_type": "%s",' % family for family in (b"llama", b"mistral", b"qwen2")),
    )
    return Target("stage", [valid], check, words, share=3, max_s=2.0, max_growth_bytes=64 << 20)


def gguf(scratch: Path) -> Target:
    """A whole GGUF file, imported as far as it goes."""
    path, target = scratch / "x.gguf", scratch / "imported"
    corpus = []
    for architecture, quantization, metadata in (
        ("llama", GGMLQuantizationType.F32, {}),
        ("qwen2", GGMLQuantizationType.Q8_0, {}),
        ("llama", GGMLQuantizationType.F32, _SENTENCE_PIECE),
    ):
        model = GGUFModel(
            architecture=architecture,
            metadata=metadata,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=32,
            hidden_size=32,
            intermediate_size=32,
            quantization=quantization,
        )
        corpus.append(_write_gguf(model, path))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with np.errstate(all="ignore"):  # weights may be no numbers
                import_gguf(str(path), target, free_bytes=lambda folder: 1 << 40)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    words = (
        *(name.encode() for name in ("general.alignment", "tokenizer.ggml.tokens", "rope_freqs.weight", "split.count")),
        *(struct.pack("<I", kind) for kind in range(14)),
        *(struct.pack("<Q", 2**bits) for bits in (16, 22, 31, 32, 40, 62, 63)),
        *(struct.pack("<I", number) for number in (2**16, 2**31 - 1, 2**32 - 1)),
        *(struct.pack("<f", number) for number in (math.nan, math.inf, -1.0, 0.0)),
        struct.pack("<Q", 20_000) + b"x" * 20_000,
        b"GGUF",
    )
    return Target("gguf", corpus, check, words, share=1, max_input_bytes=1 << 17, max_s=3.0)


def _write_gguf(model: GGUFModel, path: Path) -> bytes:
    """A valid file: its tensors are asked of the importer itself, from a first file that has only the embedding."""
    dice = np.random.default_rng(3)
    embedding = dice.normal(size=(model.vocab_size, model.hidden_size)).astype(np.float32)
    biased = {"blk.0.attn_q.bias": np.zeros(model.hidden_size, np.float32)} if model.architecture == "qwen2" else {}
    model.tensors = {"token_embd.weight": embedding, **biased}
    expected = Architecture(GGUFFile(model.write(path)))._expected_tensors()
    model.tensors = {plan.source: dice.normal(size=plan.shape).astype(np.float32) for plan in expected}
    return model.write(path).read_bytes()
