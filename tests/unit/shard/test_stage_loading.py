"""A stage opens its own tensors and no others, takes memory for those alone, and names the one that is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecoach.errors import CheckpointError, TopologyError
from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.stage_loader import check_threads
from tests.unit.shard.stage_chain import CPU, Running, StageChain
from tests.unit.shard.test_checkpoint import split_over_files
from tests.unit.shard.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

SINGLE = "model.safetensors"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER_TENSORS = (
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
)


def _load(folder: Path, layers: LayerRange, **options: Any) -> tuple[Checkpoint, Stage]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, Stage.load(checkpoint, layers, dtype=torch.float32, device=CPU, **options)


def _edit_tensors(folder: Path, **change: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / SINGLE), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("layers", [LayerRange(0, 2), LayerRange(1, 3), LayerRange(2, 4), LayerRange(0, 4)], ids=str)
def test_it_reads_the_tensors_of_its_layers_and_no_others(
    tmp_path: Path, layers: LayerRange, indexed: bool, tied: bool
) -> None:
    save_tiny_model(tmp_path, {**MODELS["llama"], "tie_word_embeddings": tied})
    if indexed:
        split_over_files(tmp_path)
    checkpoint, stage = _load(tmp_path, layers)
    expected = [f"model.layers.{index}.{name}" for index in range(layers.start, layers.end) for name in LAYER_TENSORS]
    expected += [EMBEDDING] if layers.start == 0 else []
    expected += [NORM] if layers.end == 4 else []
    if layers.end == 4 and not (tied and layers.start == 0):  # which has it already
        expected += [EMBEDDING if tied else HEAD]
    assert sorted(checkpoint.names_read) == sorted(expected)
    assert (stage.is_first, stage.is_last) == (layers.start == 0, layers.end == 4)
    assert stage.weights_bytes == sum(4 * math.prod(checkpoint.tensors[name].shape) for name in expected)


def test_progress_counts_up_to_the_number_of_tensors(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MODELS["qwen3-biases-layer-types"])
    seen: list[tuple[int, int]] = []
    checkpoint, _ = _load(tmp_path, LayerRange(1, 4), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done + 1, len(checkpoint.names_read)) for done in range(len(checkpoint.names_read))]


def test_layers_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    with pytest.raises(TopologyError) as caught:
        _load(tmp_path, LayerRange(2, 5))
    assert (caught.value.limit, caught.value.value) == ("0:4", "2:5")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.2.mlp.up_proj.weight", None, ["[80, 48]", "missing"]),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(79, 48), ["[79, 48]", "[80, 48]"]),
        ("model.layers.2.self_attn.q_proj.weight", torch.zeros(48, 24, 2), ["[48, 24, 2]", "[48, 48]"]),
        ("model.layers.3.self_attn.k_proj.weight", torch.zeros(24, 48, dtype=torch.int8), ["I8"]),
        ("model.layers.2.self_attn.q_proj.bias", torch.zeros(48), ["not a tensor of a layer"]),
        (NORM, torch.zeros(1), ["[1]", "[48]"]),
        (HEAD, torch.zeros(96, 48), ["[96, 48]", "[97, 48]"]),
        (HEAD, None, ["[97, 48]", "missing"]),
    ],
)
def test_a_wrong_tensor_is_named_by_the_stages_that_have_it_and_hurts_no_other(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: list[str]
) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    _edit_tensors(tmp_path, **{name: tensor})
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path, LayerRange(2, 4))
    assert caught.value.field == name
    assert all(word in caught.value.message for word in [name, *words])
    _load(tmp_path, LayerRange(0, 2))


def test_frequencies_stored_by_early_checkpoints_are_no_strangers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MODELS["llama"])
    _edit_tensors(tmp_path, **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    _load(tmp_path, LayerRange(0, 4))


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 2, 4]])
def test_a_head_beside_a_tied_embedding_is_used_as_transformers_uses_it(tmp_path: Path, boundaries: list[int]) -> None:
    model = save_tiny_model(tmp_path, MODELS["qwen2"])
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(3))
    _edit_tensors(tmp_path, **{HEAD: head})
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = random_tokens(9, seed=0)
    running = Running(token_ids, [0, 1, 2])
    StageChain(open_checkpoint(tmp_path), boundaries).step((running, 9))
    torch.testing.assert_close(running.stacked(), reference_logits(reloaded, token_ids), atol=1e-4, rtol=0)


def test_a_tied_embedding_may_be_stored_under_the_head_s_name(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS["qwen2"])
    _edit_tensors(tmp_path, **{HEAD: load_file(tmp_path / SINGLE)[EMBEDDING], EMBEDDING: None})
    token_ids = random_tokens(9, seed=0)
    running = Running(token_ids, [0, 1, 2])
    StageChain(open_checkpoint(tmp_path), [0, 2, 4]).step((running, 9))
    torch.testing.assert_close(running.stacked(), reference_logits(model, token_ids), atol=1e-4, rtol=0)


def test_it_keeps_nothing_of_a_file_that_changes_afterwards(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS["llama"])
    token_ids = random_tokens(9, seed=0)
    expected = reference_logits(model, token_ids)
    chain = StageChain(open_checkpoint(tmp_path), [0, 4])
    path = tmp_path / SINGLE
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, so that a map of it would change too
    running = Running(token_ids, [0, 1, 2])
    chain.step((running, 9))
    torch.testing.assert_close(running.stacked(), expected, atol=1e-4, rtol=0)


# Prints how much resident memory loading added, at its peak and in the end, and what the stage says its weights take.
_MEASURE = """
import gc, sys
from pathlib import Path
import psutil, torch
from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.models.linear import Linear
from stagecoach_shard.runtime.stage import Stage

torch.set_num_threads(1)
Linear(torch.zeros(64, 64, dtype=torch.bfloat16))  # the first one measures this CPU, and so pulls in libraries
resident = lambda: psutil.Process().memory_info().rss
checkpoint = open_checkpoint(Path(sys.argv[1]))
before, seen = resident(), []
stage = Stage.load(
    checkpoint,
    LayerRange.parse(sys.argv[2]),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    progress=lambda done, total: seen.append(resident()),
)
gc.collect()
print(resident() - before, max(seen) - before, stage.weights_bytes)
"""


def _measure(folder: Path, layers: str) -> tuple[int, int, int]:
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), layers], capture_output=True, text=True, check=True, timeout=60
    )
    kept, peak, weights_bytes = (int(number) for number in result.stdout.split())
    return kept, peak, weights_bytes


def test_half_the_layers_take_half_the_memory(tmp_path: Path) -> None:
    hidden, inner, num_layers = 512, 2048, 16
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, hidden), "v_proj": (hidden, hidden)}
    shapes = {f"self_attn.{name}": shape for name, shape in {**shapes, "o_proj": (hidden, hidden)}.items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    tensors = {
        f"model.layers.{index}.{name}.weight": torch.rand(shape).to(torch.bfloat16)
        for index in range(num_layers)
        for name, shape in shapes.items()
    }
    tensors |= {name: torch.rand(64, hidden).to(torch.bfloat16) for name in (EMBEDDING, HEAD)}
    tensors[NORM] = torch.rand(hidden).to(torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / SINGLE)
    whole_kept, _, whole_weights = _measure(tmp_path, f"0:{num_layers}")
    half_kept, half_peak, half_weights = _measure(tmp_path, f"0:{num_layers // 2}")
    assert half_weights == pytest.approx(whole_weights / 2, rel=0.01)
    assert whole_kept == pytest.approx(whole_weights, rel=0.25)
    assert half_kept < 0.65 * whole_kept
    # While loading, its own part of the file is mapped beside what was made of it; that is all.
    assert half_peak < half_kept + 1.2 * half_weights


def test_more_threads_than_cores_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    num_cores = len(os.sched_getaffinity(0))
    check_threads(num_cores, CPU)
    check_threads(num_cores + 1, torch.device("cuda:0"))
    assert caplog.text == ""
    check_threads(num_cores + 1, CPU)
    assert f"this process may use {num_cores} cores" in caplog.text
